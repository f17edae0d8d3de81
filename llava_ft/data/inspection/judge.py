"""What a run makes of one tokenised record: how long it is with its images, and what of it stays.

`measure.py` does the same for all records at once, from files; this is for looking at records one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.preparation.samples import Limits
from llava_ft.data.preparation.truncation import find_cut
from llava_ft.data.records import Sample
from llava_ft.data.tokenize import TokenizedSample
from llava_ft.errors import BadSampleError
from llava_ft.geometry import SizeWH


@dataclass(frozen=True, slots=True)
class Judged:
    """A record that a run would train on.

    Attributes:
        num_tokens: Tokens with those of images, before truncation.
        cut: Tokens that stay, an image counted as one.
        kept_tokens: Tokens that stay, with those of images.
        num_image_tokens: Tokens of all its images together, before truncation.
        kept_images: Images that stay; they are the first ones.
        num_supervised: Tokens that have to be predicted, before truncation.
        kept_supervised: Those that stay.
        kept_answers: Answers that stay whole.
    """

    num_tokens: int
    cut: int
    kept_tokens: int
    num_image_tokens: int
    kept_images: int
    num_supervised: int
    kept_supervised: int
    kept_answers: int


def judge(sample: Sample, tokens: TokenizedSample, sizes_wh: Sequence[SizeWH | None], limits: Limits) -> Judged:
    """Measure a record and find what truncation leaves of it.

    Args:
        sample: The record.
        tokens: Its tokens.
        sizes_wh: Width and height of each of its images in pixels; None where nothing depends on them.
        limits: What decides how long it may be.

    Raises:
        BadSampleError: A run would not train on it. Kinds: "too-long", "truncated-answer", "no-supervised-token".
    """
    positions = [place for place, token in enumerate(tokens.input_ids) if token == IMAGE_TOKEN_INDEX]
    widths = [limits.geometry.num_tokens(size) if limits.geometry else 0 for size in sizes_wh]
    spans = target_spans(tokens.labels)
    cut = num_ids = len(tokens.input_ids)
    num_tokens = num_ids - len(widths) + sum(widths)
    if num_tokens > limits.max_length:
        images = list(zip(positions, widths, strict=True))
        cut = _cut(sample, num_tokens, find_cut(num_ids, images, spans, tokens.answer_ends, limits.max_length), limits)
    kept_supervised = num_predicted(spans, cut)
    if kept_supervised == 0:
        reason = "no token of it is supervised, so there is nothing to learn. Fix the record or leave it out."
        raise BadSampleError(sample.index, sample.id, "no-supervised-token", reason)
    kept_images = sum(place < cut for place in positions)
    return Judged(
        num_tokens=num_tokens,
        cut=cut,
        kept_tokens=cut - kept_images + sum(widths[:kept_images]),
        num_image_tokens=sum(widths),
        kept_images=kept_images,
        num_supervised=num_predicted(spans, num_ids),
        kept_supervised=kept_supervised,
        kept_answers=sum(end <= cut for end in tokens.answer_ends),
    )


def _cut(sample: Sample, num_tokens: int, cut: int | None, limits: Limits) -> int:
    if limits.truncation != "truncate":
        raise BadSampleError(
            sample.index,
            sample.id,
            "too-long",
            f"it has {num_tokens} tokens, more than model_max_length = {limits.max_length}. Raise model_max_length, "
            "shorten the record, or pass --truncation truncate.",
        )
    if cut is None:
        raise BadSampleError(
            sample.index,
            sample.id,
            "truncated-answer",
            f"of its {num_tokens} tokens model_max_length = {limits.max_length} leaves no part of an answer. Raise "
            "model_max_length, shorten the record or leave it out.",
        )
    return cut


def target_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """List the starts and ends of the supervised stretches."""
    spans: list[tuple[int, int]] = []
    start = None
    for position, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = position
        elif label == IGNORE_INDEX and start is not None:
            spans.append((start, position))
            start = None
    return spans


def num_predicted(spans: Sequence[tuple[int, int]], end: int) -> int:
    """Count the supervised tokens before `end`; the very first has nothing to be predicted from."""
    return sum(max(0, min(stop, end) - max(start, 1)) for start, stop in spans)
