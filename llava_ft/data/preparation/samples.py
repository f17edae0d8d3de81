"""From tokenised records to usable samples of known length: images counted, too long ones cut or left out.

No token is looked at for that: 665,000 records take seconds, and another length limit, vision tower or policy takes no
new tokenisation. The tokens stay on disk, mapped into memory; what is held here is a few numbers for each sample.
"""

from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.preparation.image_facts import ImageFacts
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows, spans_of
from llava_ft.data.preparation.truncation import TruncationPolicy, find_cut
from llava_ft.errors import BadSampleError
from llava_ft.geometry import SizeWH

_NOTHING_SUPERVISED: Final = (
    "no token of it is supervised, so there is nothing to learn. Fix the record or pass --on_bad_sample skip."
)


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
class Samples:
    """The usable samples of one source, in the order of their records, each as the model will see it.

    Attributes:
        rows: The tokenised records.
        limits: How they were measured.
        record_indices: `(S,)` int64, position of each sample's record in its source, ascending.
        cuts: `(S,)` int32, tokens that stay of each row, an image counted as one.
        lengths: `(S,)` int32, tokens of each sample after expansion and truncation.
        num_supervised: `(S,)` int32, how many of these have to be predicted.
        num_images: `(S,)` int32, images of each sample that truncation leaves.
        was_truncated: `(S,)` bool.
        sizes_wh: `(M, 2)` int32, width and height in pixels of each image that is left, sample by sample; None where
            nothing depends on them.
        errors: Why other records cannot be used, in their order.
        too_long: `(L,)` int64, records that have more tokens than allowed, usable or not, ascending.
        longest: Tokens of the longest of them; 0 if there are none.
        num_lost_tokens: Tokens that were cut off usable samples, and all of those left out for their length.
    """

    rows: TokenizedRows
    limits: Limits
    record_indices: Array
    cuts: Array
    lengths: Array
    num_supervised: Array
    num_images: Array
    was_truncated: Array
    sizes_wh: Array | None
    errors: list[BadSampleError]
    too_long: Array
    longest: int
    num_lost_tokens: int
    _image_ends: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_image_ends", np.cumsum(self.num_images, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.record_indices)

    def arrays(self, row: int) -> tuple[Array, Array]:
        """Give ids and labels of one sample as the model sees them, both `(T,)` int64."""
        record, cut = int(self.record_indices[row]), int(self.cuts[row])
        input_ids = self.rows.numbers("input_ids", record)[:cut].astype(np.int64)
        labels = np.full(cut, IGNORE_INDEX, dtype=np.int64)
        for start, end in spans_of(self.rows.numbers("target_spans", record)):
            labels[start:end] = input_ids[start:end]
        num_images, geometry = int(self.num_images[row]), self.limits.geometry
        if num_images == 0:
            return input_ids, labels
        assert geometry is not None
        sizes = self.image_sizes(row)
        repeats = np.ones(cut, dtype=np.int64)
        repeats[self.rows.numbers("image_positions", record)[:num_images]] = (
            [geometry.num_tokens(size_wh) for size_wh in sizes] if sizes else geometry.num_tokens()
        )
        return np.repeat(input_ids, repeats), np.repeat(labels, repeats)

    def images(self, row: int) -> list[str]:
        """Name the images of one sample that truncation leaves, as in its record."""
        return self.rows.images(int(self.record_indices[row]))[: int(self.num_images[row])]

    def image_sizes(self, row: int) -> list[SizeWH]:
        """Give width and height in pixels of the images of one sample; empty where nothing depends on them."""
        if self.sizes_wh is None:
            return []
        end = int(self._image_ends[row])
        sizes: list[list[int]] = self.sizes_wh[end - int(self.num_images[row]) : end].tolist()
        return [(width, height) for width, height in sizes]

    def bad_sample(self, row: int, kind: str, reason: str) -> BadSampleError:
        """Make the error that says why a sample cannot be used."""
        record = int(self.record_indices[row])
        return BadSampleError(record, self.rows.sample_id(record), kind, reason)


def find_samples(rows: TokenizedRows, limits: Limits, facts: ImageFacts | None = None) -> Samples:
    """Find out which records of a source can be used, and how long they are.

    A record that is too long is cut with "truncate", and left out otherwise.

    Args:
        rows: The tokenised records.
        limits: What decides that.
        facts: What is known about their images; None if nothing was looked at.
    """
    num_tokens = rows.counts("input_ids")  # an image counted as one, until it is said otherwise
    image_bounds = _bounds(rows.counts("image_positions"))
    image_tokens = _count_image_tokens(int(image_bounds[-1]), limits, facts)
    full_lengths = num_tokens - np.diff(image_bounds) + _sums(image_tokens, image_bounds)
    spans = rows.joined("target_spans")
    # The first token has nothing to be predicted from.
    num_supervised = _sums(
        np.maximum(spans[1::2], 1) - np.maximum(spans[::2], 1), _bounds(rows.counts("target_spans") // 2)
    )

    def error_of(record: int, kind: str, reason: str) -> BadSampleError:
        return BadSampleError(record, rows.sample_id(record), kind, reason)

    # What is wrong with the record itself comes before the first image that cannot be used.
    errors = {record: error_of(record, kind, reason) for record, (kind, reason) in rows.errors().items()}
    if facts is not None and facts.errors:
        bad = np.flatnonzero(np.isin(facts.numbers, np.fromiter(facts.errors, dtype=np.int64)))
        for image, record in zip(bad.tolist(), _owners(bad, image_bounds), strict=True):
            error = facts.errors[int(facts.numbers[image])]
            errors.setdefault(record, error_of(record, error.kind, str(error)))

    good = _without(np.arange(len(rows)), list(errors))
    too_long = good[full_lengths[good] > limits.max_length]
    cuts = num_tokens.copy()
    dropped: list[int] = [] if limits.truncation == "truncate" else too_long.tolist()
    for record in too_long.tolist() if limits.truncation == "truncate" else ():
        positions: list[int] = rows.numbers("image_positions", record).tolist()
        tokens: list[int] = image_tokens[image_bounds[record] : image_bounds[record + 1]].tolist()
        targets = spans_of(rows.numbers("target_spans", record))
        ends: list[int] = rows.numbers("answer_ends", record).tolist()
        images = list(zip(positions, tokens, strict=True))
        cut = find_cut(int(num_tokens[record]), images, targets, ends, limits.max_length)
        if cut is None:
            errors[record] = error_of(
                record,
                "truncated-answer",
                f"the {limits.max_length} tokens that model_max_length = {limits.max_length} leaves hold no part of an "
                "answer. Raise model_max_length, shorten the record or pass --on_bad_sample skip.",
            )
            continue
        cuts[record] = cut
        num_supervised[record] = sum(max(0, min(end, cut) - max(start, 1)) for start, end in targets)
    for record in good[num_supervised[good] == 0].tolist():
        errors.setdefault(record, error_of(record, "no-supervised-token", _NOTHING_SUPERVISED))

    usable = _without(_without(good, list(errors)), dropped)
    num_images, lengths = np.diff(image_bounds)[usable], full_lengths[usable]
    was_truncated = cuts[usable] < num_tokens[usable]
    for sample in np.flatnonzero(was_truncated).tolist():
        record = int(usable[sample])
        kept = int(np.count_nonzero(rows.numbers("image_positions", record) < cuts[record]))
        first = int(image_bounds[record])
        num_images[sample] = kept
        lengths[sample] = cuts[record] - kept + image_tokens[first : first + kept].sum()
    sizes_wh = None
    if limits.geometry is not None and limits.geometry.needs_image_sizes and facts is not None:
        firsts = np.repeat(image_bounds[usable] - (np.cumsum(num_images) - num_images), num_images)
        sizes_wh = facts.sizes_wh[facts.numbers[firsts + np.arange(len(firsts))]].astype(np.int32)
    return Samples(
        rows=rows,
        limits=limits,
        record_indices=usable,
        cuts=cuts[usable].astype(np.int32),
        lengths=lengths.astype(np.int32),
        num_supervised=num_supervised[usable].astype(np.int32),
        num_images=num_images.astype(np.int32),
        was_truncated=was_truncated,
        sizes_wh=sizes_wh,
        errors=[errors[record] for record in sorted(errors)],
        too_long=too_long,
        longest=int(full_lengths[too_long].max(initial=0)),
        num_lost_tokens=int(full_lengths[usable].sum() - lengths.sum() + full_lengths[dropped].sum()),
    )


def _count_image_tokens(num_images: int, limits: Limits, facts: ImageFacts | None) -> Array:
    """Count the tokens of each image of each record, `(M,)` int64."""
    geometry = limits.geometry
    if geometry is None or num_images == 0:
        return np.zeros(num_images, dtype=np.int64)
    if not geometry.needs_image_sizes:
        return np.full(num_images, geometry.num_tokens())
    assert facts is not None, "the lengths depend on the sizes of images"
    sizes, which = np.unique(facts.sizes_wh, axis=0, return_inverse=True)
    # An image without a size cannot be used, and neither can its record.
    tokens = [geometry.num_tokens((int(width), int(height))) if width else 0 for width, height in sizes]
    return np.array(tokens, dtype=np.int64)[which.reshape(-1)][facts.numbers]


def _without(records: Array, some: list[int]) -> Array:
    return records[~np.isin(records, np.array(some, dtype=np.int64))]


def _owners(entries: Array, bounds: Array) -> list[int]:
    """Find the record that each entry belongs to."""
    return (np.searchsorted(bounds, entries, side="right") - 1).tolist()


def _bounds(counts: Array) -> Array:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))


def _sums(values: Array, bounds: Array) -> Array:
    """Add up each stretch of `values`."""
    return np.diff(_bounds(values)[bounds])
