"""What a run makes of a tokenised record: whether it can be used, and where it is cut off when it is too long.

A cut keeps the tokens in front of it and drops the rest. It is made before images are expanded, where an image is one
token, so no image ever loses a part. Whole answers go first, from the end, each with its question: the cut is right
after the end of an earlier answer. Only where not even the first supervised answer fits is a cut made inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from llava_ft.errors import BadSampleError, UserError
from llava_ft.geometry import SizeWH

TruncationPolicy = Literal["error", "drop", "truncate"]
"""What is done with a sample that is too long: refuse the run, leave the sample out, or cut it off."""

TRUNCATION_POLICIES: Final = ("error", "drop", "truncate")


def check_policy(policy: str) -> None:
    """Check the name of a policy.

    Raises:
        UserError: It is unknown.
    """
    if policy not in TRUNCATION_POLICIES:
        raise UserError(f"truncation is {policy!r}; it can be {', '.join(TRUNCATION_POLICIES)}.")


class CountsTokens(Protocol):
    """Knows how many tokens an image takes; `ImageGeometry` is one."""

    @property
    def needs_image_sizes(self) -> bool:
        """Whether that depends on the image's size."""
        ...

    def num_tokens(self, size_wh: SizeWH | None = None) -> int:
        """Count the tokens of an image, by its width and height in pixels where they matter."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What decides how long a sample is, and what is done with one that is too long.

    Attributes:
        geometry: Counts the tokens of images; None for a model without vision tower.
        max_length: Tokens that a sample may have.
        truncation: What is done with one that has more.
    """

    geometry: CountsTokens | None
    max_length: int
    truncation: TruncationPolicy = "truncate"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a record there is up to one of its tokens.

    Attributes:
        ids: Tokens, an image counted as one.
        tokens: Tokens, an image with all of its own.
        images: Images; they are the first ones.
        supervised: Tokens that have to be predicted; the very first has nothing to be predicted from.
        answers: Answers that are whole.
    """

    ids: int
    tokens: int
    images: int
    supervised: int
    answers: int


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where images, answers and supervised tokens of a tokenised record are. Positions count an image as one token.

    Attributes:
        index: Position of the record in its source.
        sample_id: Its id, "" without one.
        num_ids: Its tokens, an image counted as one.
        images: Position of each image, ascending, and the tokens it is expanded to.
        target_spans: Starts and ends of the supervised stretches, ascending.
        answer_ends: Position after each answer, ascending.
    """

    index: int
    sample_id: str
    num_ids: int
    images: Sequence[tuple[int, int]]
    target_spans: Sequence[tuple[int, int]]
    answer_ends: Sequence[int]

    def extent(self, end: int) -> Extent:
        """Measure the record up to the token before `end`."""
        sizes = [size for position, size in self.images if position < end]
        return Extent(
            ids=end,
            tokens=end - len(sizes) + sum(sizes),
            images=len(sizes),
            supervised=sum(max(0, min(stop, end) - max(start, 1)) for start, stop in self.target_spans),
            answers=sum(answer_end <= end for answer_end in self.answer_ends),
        )

    def judge(self, limits: Limits) -> Extent:
        """Say what a run trains on: all of the record, or what truncation leaves of it.

        Raises:
            BadSampleError: It does not train on the record. Kinds: "too-long" unless records are truncated,
                "truncated-answer", "no-supervised-token".
        """
        cut, num_tokens = self.num_ids, self.extent(self.num_ids).tokens
        if num_tokens > limits.max_length:
            if limits.truncation != "truncate":
                raise BadSampleError(self.index, self.sample_id, "too-long", too_long_reason(num_tokens, limits))
            found = find_cut(self.num_ids, self.images, self.target_spans, self.answer_ends, limits.max_length)
            if found is None:
                reason = (
                    f"of its {num_tokens} tokens model_max_length = {limits.max_length} leaves no part of an answer. "
                    "Raise model_max_length, shorten the record or leave it out."
                )
                raise BadSampleError(self.index, self.sample_id, "truncated-answer", reason)
            cut = found
        kept = self.extent(cut)
        if kept.supervised == 0:
            reason = "no token of it is supervised, so there is nothing to learn. Fix the record or leave it out."
            raise BadSampleError(self.index, self.sample_id, "no-supervised-token", reason)
        return kept


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
    """Find how many tokens of a sample stay.

    All positions count an image as one token.

    Args:
        num_tokens: Tokens of the sample.
        images: Position of each image, ascending, and the tokens it is expanded to.
        target_spans: Starts and ends of the supervised stretches, ascending.
        answer_ends: Position after each answer, ascending: where a conversation may end.
        max_length: Tokens that may stay after expansion.

    Returns:
        Tokens that stay, `num_tokens` for a sample that fits; None if nothing would stay that has to be predicted.
    """
    last = _last_fitting(num_tokens, images, max_length)
    if last == num_tokens:
        return num_tokens
    first_target = first_predicted(target_spans)
    if first_target is None or last <= first_target:
        return None
    whole_answers = [end for end in answer_ends if first_target < end <= last]
    return max(whole_answers, default=last)


def first_predicted(target_spans: Sequence[tuple[int, int]]) -> int | None:
    """Find the first token that has to be predicted; the very first has nothing to be predicted from."""
    for start, end in target_spans:
        if end > max(start, 1):
            return max(start, 1)
    return None


def _last_fitting(num_tokens: int, images: Sequence[tuple[int, int]], max_length: int) -> int:
    """Count the tokens that fit, an image either whole or not at all."""
    room, start = max_length, 0
    for position, size in images:
        if position - start + size > room:
            return min(position, start + room)
        room -= position - start + size
        start = position + 1
    return min(num_tokens, start + room)
