"""What a run makes of a tokenised record: whether it can be used, and where it is cut off when it is too long.

A cut keeps the tokens in front of it and drops the rest. It is made before images are expanded, where an image is one
token, so no image ever loses a part. Whole answers go first, from the end, each with its question: the cut is right
after the end of an earlier answer. Only where not even the first supervised answer fits is a cut made inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from llava_ft.data.tokenize import TokenizedSample
from llava_ft.errors import BadSampleError, UserError
from llava_ft.geometry import ImageGeometry

TruncationPolicy = Literal["error", "drop", "truncate"]
"""What is done with a sample that is too long: refuse the run, leave the sample out, or cut it off."""

TRUNCATION_POLICIES: Final = ("error", "drop", "truncate")


@dataclass(frozen=True, slots=True)
class Limits:
    """What decides how long a sample is, and what is done with one that is too long."""

    geometry: ImageGeometry | None  # counts the tokens of images; None for a model without vision tower
    max_length: int  # tokens, an image with all of its own
    truncation: TruncationPolicy = "truncate"

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATION_POLICIES:
            raise UserError(f"truncation is {self.truncation!r}; it can be {', '.join(TRUNCATION_POLICIES)}.")


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a record there is up to one of its tokens."""

    ids: int  # tokens, an image counted as one
    tokens: int  # tokens, an image with all of its own
    images: int  # the first ones
    supervised: int  # tokens that have to be predicted; the very first has nothing to be predicted from


def judge(sample: TokenizedSample, image_tokens: Sequence[int], limits: Limits) -> Extent:
    """Say what a run trains on: all of a record, or what truncation leaves of it.

    `image_tokens` are the tokens that each of its images is expanded to.

    Raises:
        BadSampleError: It does not train on the record. Kinds: "too-long" unless records are truncated,
            "truncated-answer", "no-supervised-token".
    """
    images = list(zip(sample.image_positions, image_tokens, strict=True))
    cut = len(sample.input_ids)
    num_tokens = cut - len(images) + sum(image_tokens)
    if num_tokens > limits.max_length:
        if limits.truncation != "truncate":
            raise BadSampleError(sample.index, sample.id, "too-long", too_long_reason(num_tokens, limits))
        found = find_cut(cut, images, sample.target_spans, sample.answer_ends, limits.max_length)
        if found is None:
            reason = (
                f"of its {num_tokens} tokens model_max_length = {limits.max_length} leaves no part of an answer. "
                "Raise model_max_length, shorten the record or leave it out."
            )
            raise BadSampleError(sample.index, sample.id, "truncated-answer", reason)
        cut = found
    supervised = sum(max(0, min(end, cut) - max(start, 1)) for start, end in sample.target_spans)
    if supervised == 0:
        reason = "no token of it is supervised, so there is nothing to learn. Fix the record or leave it out."
        raise BadSampleError(sample.index, sample.id, "no-supervised-token", reason)
    kept = [size for position, size in images if position < cut]
    return Extent(cut, cut - len(kept) + sum(kept), len(kept), supervised)


def too_long_reason(num_tokens: int, limits: Limits) -> str:
    """Say why a record of so many tokens is not used, where records are not truncated."""
    return (
        f"it has {num_tokens} tokens, more than model_max_length = {limits.max_length}. Raise model_max_length, "
        "shorten the record, or pass --truncation truncate."
    )


def find_cut(
    num_tokens: int,
    images: Sequence[tuple[int, int]],
    target_spans: Sequence[tuple[int, int]],
    answer_ends: Sequence[int],
    max_length: int,
) -> int | None:
    """Find how many tokens of a sample stay; an image is one of them.

    `images` are positions and sizes; only `max_length` counts images with all their tokens.

    Returns:
        Tokens that stay, `num_tokens` for a sample that fits; None if nothing would stay that has to be predicted.
    """
    # The last token that fits, an image either whole or not at all.
    room, start = max_length, 0
    for position, size in images:
        if position - start + size > room:
            last = min(position, start + room)
            break
        room -= position - start + size
        start = position + 1
    else:
        last = min(num_tokens, start + room)
    if last == num_tokens:
        return num_tokens
    first_target = first_predicted(target_spans)
    if first_target is None or last <= first_target:
        return None
    whole_answers = [end for end in answer_ends if first_target < end <= last]
    return max(whole_answers, default=last)


def first_predicted(target_spans: Sequence[tuple[int, int]]) -> int | None:
    """Find the first token that has to be predicted; the very first has nothing to be predicted from."""
    return next((max(start, 1) for start, end in target_spans if end > max(start, 1)), None)
