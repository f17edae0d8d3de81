"""From tokenised records to usable samples of known length: images counted, too long ones cut or left out.

It looks at no token: 665,000 records take seconds, and another length limit, vision tower or policy takes no new
tokenisation.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from llava_ft.data.preparation.image_facts import ImageFacts
from llava_ft.data.preparation.prepared import Limits, PreparedSamples
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows, spans_of
from llava_ft.data.preparation.truncation import find_cut
from llava_ft.errors import BadSampleError

_NOTHING_SUPERVISED: Final = (
    "no token of it is supervised, so there is nothing to learn. Fix the record or pass --on_bad_sample skip."
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What measuring found in one source.

    Attributes:
        samples: What can be used.
        errors: Why other records cannot, in their order.
        too_long: `(L,)` int64, records that have more tokens than allowed, usable or not, ascending.
        longest: Tokens of the longest of them; 0 if there are none.
        num_lost_tokens: Tokens that were cut off usable samples, and all of those left out for their length.
    """

    samples: PreparedSamples
    errors: list[BadSampleError]
    too_long: Array
    longest: int
    num_lost_tokens: int


def measure(rows: TokenizedRows, limits: Limits, facts: ImageFacts | None = None) -> Measured:
    """Find out which records can be used, and how long they are.

    A record that is too long is cut with "truncate", and left out otherwise.

    Args:
        rows: The tokenised records.
        limits: What decides that.
        facts: What is known about their images; None if nothing was looked at.
    """
    table = _Table(rows, limits, facts)
    errors = table.errors()
    good = _without(np.arange(len(rows)), list(errors))
    too_long = good[table.full_lengths[good] > limits.max_length]
    cuts, num_supervised = table.num_tokens.copy(), table.num_supervised.copy()
    dropped: list[int] = []
    for record in too_long.tolist():
        if limits.truncation != "truncate":
            dropped.append(record)
        elif (cut := table.find_cut(record)) is not None:
            cuts[record], num_supervised[record] = cut, table.num_supervised_before(record, cut)
        else:
            errors[record] = table.error(record, "truncated-answer", _no_answer_left(limits.max_length))
    for record in good[num_supervised[good] == 0].tolist():
        errors.setdefault(record, table.error(record, "no-supervised-token", _NOTHING_SUPERVISED))
    usable = _without(_without(good, list(errors)), dropped)
    samples = table.samples(usable, cuts[usable], num_supervised[usable])
    lost = table.full_lengths[usable].sum() - samples.lengths.sum() + table.full_lengths[dropped].sum()
    return Measured(
        samples=samples,
        errors=[errors[record] for record in sorted(errors)],
        too_long=too_long,
        longest=int(table.full_lengths[too_long].max(initial=0)),
        num_lost_tokens=int(lost),
    )


def _without(records: Array, some: list[int]) -> Array:
    return records[~np.isin(records, np.array(some, dtype=np.int64))]


def _no_answer_left(max_length: int) -> str:
    return (
        f"the {max_length} tokens that model_max_length = {max_length} leaves hold no part of an answer. "
        "Raise model_max_length, shorten the record or pass --on_bad_sample skip."
    )


class _Table:
    """Numbers of all records of a source, in arrays.

    Attributes:
        num_tokens: `(R,)` int64, tokens of each record, an image counted as one.
        full_lengths: `(R,)` int64, tokens with those of the images.
        num_supervised: `(R,)` int64, tokens that have to be predicted.
    """

    def __init__(self, rows: TokenizedRows, limits: Limits, facts: ImageFacts | None):
        self._rows = rows
        self._limits = limits
        self._facts = facts
        self._image_bounds = _bounds(rows.counts("image_positions"))
        self._image_tokens = self._count_image_tokens()
        self.num_tokens = rows.counts("input_ids")
        in_images = _sums(self._image_tokens, self._image_bounds)
        self.full_lengths = self.num_tokens - np.diff(self._image_bounds) + in_images
        spans = rows.joined("target_spans")
        # The first token has nothing to be predicted from.
        sizes = np.maximum(spans[1::2], 1) - np.maximum(spans[::2], 1)
        self.num_supervised = _sums(sizes, _bounds(rows.counts("target_spans") // 2))

    def _count_image_tokens(self) -> Array:
        """Count the tokens of each image of each record, `(M,)` int64."""
        num_images, geometry = int(self._image_bounds[-1]), self._limits.geometry
        if geometry is None or num_images == 0:
            return np.zeros(num_images, dtype=np.int64)
        if not geometry.needs_image_sizes:
            return np.full(num_images, geometry.num_tokens())
        assert self._facts is not None, "the lengths depend on the sizes of images"
        sizes, which = np.unique(self._facts.sizes_wh, axis=0, return_inverse=True)
        # An image without a size cannot be used, and neither can its record.
        tokens = [geometry.num_tokens((int(width), int(height))) if width else 0 for width, height in sizes]
        return np.array(tokens, dtype=np.int64)[which.reshape(-1)][self._facts.numbers]

    def errors(self) -> dict[int, BadSampleError]:
        """Say why records cannot be used at all: what is wrong with them, or the first image that is."""
        found = {row: self.error(row, kind, reason) for row, (kind, reason) in self._rows.errors().items()}
        if self._facts is None or not self._facts.errors:
            return found
        numbers = self._facts.numbers
        bad = np.flatnonzero(np.isin(numbers, np.fromiter(self._facts.errors, dtype=np.int64)))
        records = np.searchsorted(self._image_bounds, bad, side="right") - 1
        for image, record in zip(bad.tolist(), records.tolist(), strict=True):
            error = self._facts.errors[int(numbers[image])]
            found.setdefault(record, self.error(record, error.kind, str(error)))
        return found

    def error(self, record: int, kind: str, reason: str) -> BadSampleError:
        """Make the error of a record."""
        return BadSampleError(record, self._rows.sample_id(record), kind, reason)

    def find_cut(self, record: int) -> int | None:
        """Find how many tokens of a record stay, None if no answer would."""
        first, last = self._image_bounds[record], self._image_bounds[record + 1]
        positions: list[int] = self._rows.numbers("image_positions", record).tolist()
        return find_cut(
            int(self.num_tokens[record]),
            list(zip(positions, self._image_tokens[first:last].tolist(), strict=True)),
            spans_of(self._rows.numbers("target_spans", record)),
            self._rows.numbers("answer_ends", record).tolist(),
            self._limits.max_length,
        )

    def num_supervised_before(self, record: int, cut: int) -> int:
        """Count the tokens in front of a cut that have to be predicted."""
        spans = spans_of(self._rows.numbers("target_spans", record))
        return sum(max(0, min(end, cut) - max(start, 1)) for start, end in spans)

    def samples(self, records: Array, cuts: Array, num_supervised: Array) -> PreparedSamples:
        """Put together what is known of the records that can be used."""
        num_images = np.diff(self._image_bounds)[records]
        lengths = self.full_lengths[records]
        was_truncated = cuts < self.num_tokens[records]
        for sample in np.flatnonzero(was_truncated).tolist():
            record = int(records[sample])
            kept = int(np.count_nonzero(self._rows.numbers("image_positions", record) < cuts[sample]))
            first = int(self._image_bounds[record])
            num_images[sample] = kept
            lengths[sample] = cuts[sample] - kept + self._image_tokens[first : first + kept].sum()
        sizes_wh = None
        if self._limits.geometry is not None and self._limits.geometry.needs_image_sizes and self._facts is not None:
            firsts = np.repeat(self._image_bounds[records] - (np.cumsum(num_images) - num_images), num_images)
            images = firsts + np.arange(len(firsts))
            sizes_wh = self._facts.sizes_wh[self._facts.numbers[images]].astype(np.int32)
        return PreparedSamples(
            rows=self._rows,
            limits=self._limits,
            record_indices=records,
            cuts=cuts.astype(np.int32),
            lengths=lengths.astype(np.int32),
            num_supervised=num_supervised.astype(np.int32),
            num_images=num_images.astype(np.int32),
            was_truncated=was_truncated,
            sizes_wh=sizes_wh,
        )


def _bounds(counts: Array) -> Array:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))


def _sums(values: Array, bounds: Array) -> Array:
    """Add up each stretch of `values`."""
    return np.diff(_bounds(values)[bounds])
