"""What a run makes of its records: the one place for training, planning, `check-data` and `inspect data`.

`DataPlan.judge` says it of one raw record: parsed, tokenised, its images looked at, cut where it is too long.
`find_samples` says the same of all tokenised records of a source, and holds a few numbers for each. Tokens are looked
at only in records that are too long, and `truncation.judge` judges these one by one as well: 665,000 records take
seconds, and another length limit, vision tower or policy takes no new tokenisation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.image_files import ImagePlace, is_relative
from llava_ft.data.preparation.image_facts import ImageChecks, ImageFacts, look_at_image
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows
from llava_ft.data.preparation.truncation import Limits, judge
from llava_ft.data.records import Sample
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.tokenize import SampleTokenizer, TokenizedSample
from llava_ft.errors import BadSampleError, ImageError
from llava_ft.geometry import SizeWH


@dataclass(frozen=True)
class DataPlan:
    """How a run reads its data."""

    tokenize: SampleTokenizer
    limits: Limits
    checks: ImageChecks  # what is found out about images before training
    image_folder: str | None = None  # for sources without one of their own
    preparation: PreparationSettings = field(default_factory=PreparationSettings)

    def place_of(self, source: RecordSource) -> ImagePlace:
        """Say where the images of a source are."""
        return ImagePlace(source.image_folder or self.image_folder, source)

    def judge(
        self,
        sample: Sample,
        source: RecordSource,
        look: Callable[[str, ImagePlace, ImageChecks], SizeWH | None] = look_at_image,
    ) -> tuple[TokenizedSample, list[int] | None, int]:
        """Say what the run makes of one record; `look` gives the size of an image, or raises what is wrong with it.

        Returns:
            Its tokens; the tokens that each of its images is expanded to, None where that is not known: without a
            vision tower, or with anyres without a folder to look into; and how many of its tokens stay.

        Raises:
            BadSampleError: The run cannot use the record.
        """
        tokens = self.tokenize(sample)
        geometry, place = self.limits.geometry, self.place_of(source)
        sizes: list[SizeWH | None] = []
        for image in tokens.images:
            try:
                is_nowhere = place.folder is None and is_relative(image)
                sizes.append(None if is_nowhere else look(image, place, self.checks))
            except ImageError as error:
                raise BadSampleError(sample.index, sample.id, error.kind, str(error)) from None
        if sizes and (geometry is None or (geometry.needs_image_sizes and None in sizes)):
            return tokens, None, len(tokens.input_ids)
        image_tokens = [geometry.num_tokens(size) for size in sizes] if geometry is not None else []
        return tokens, image_tokens, judge(tokens, image_tokens, self.limits).ids


@dataclass(frozen=True, slots=True)
class Samples:
    """The usable samples of one source, in the order of their records, each as the model will see it."""

    rows: TokenizedRows
    limits: Limits  # how they were measured
    record_indices: Array  # `(S,)` int64, position of each sample's record in its source, ascending
    cuts: Array  # `(S,)` int32, tokens that stay of each row, an image counted as one
    lengths: Array  # `(S,)` int32, tokens of each sample after expansion and truncation
    num_supervised: Array  # `(S,)` int32, how many of these have to be predicted
    num_images: Array  # `(S,)` int32, images of each sample that truncation leaves
    was_truncated: Array  # `(S,)` bool
    sizes_wh: Array | None  # `(M, 2)` int32, pixels of each image that is left; None where nothing depends on them
    errors: list[BadSampleError]  # why other records cannot be used, in their order
    too_long: Array  # `(L,)` int64, records that have more tokens than allowed, usable or not, ascending
    longest: int  # tokens of the longest of them; 0 if there are none
    num_lost_tokens: int  # cut off usable samples, and all of those left out for their length
    full_lengths: Array  # `(R,)` int64, tokens of each record before truncation; 0 for one that was not tokenised
    full_supervised: Array  # `(R,)` int64, how many of these have to be predicted
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
        for start, end in self.rows.target_spans(record):
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


def find_samples(rows: TokenizedRows, limits: Limits, facts: ImageFacts | None = None) -> Samples:
    """Find out which records of a source can be used, and how long they are.

    A record that is too long is cut with "truncate", and left out otherwise. `facts` are what is known about the
    images; None if nothing was looked at.
    """
    num_ids = rows.counts("input_ids")  # an image counted as one
    image_bounds = _bounds(rows.counts("image_positions"))
    image_tokens = _count_image_tokens(int(image_bounds[-1]), limits, facts)
    full_lengths = num_ids - np.diff(image_bounds) + _sums(image_tokens, image_bounds)
    spans = rows.joined("target_spans")
    # The first token has nothing to be predicted from.
    full_supervised = _sums(
        np.maximum(spans[1::2], 1) - np.maximum(spans[::2], 1), _bounds(rows.counts("target_spans") // 2)
    )

    def error_of(record: int, kind: str, reason: str) -> BadSampleError:
        return BadSampleError(record, rows.sample_id(record), kind, reason)

    # What is wrong with the record itself comes before the first image that cannot be used.
    errors = {record: error_of(record, kind, reason) for record, (kind, reason) in rows.errors().items()}
    if facts is not None and facts.errors:
        bad = np.flatnonzero(np.isin(facts.numbers, np.fromiter(facts.errors, dtype=np.int64)))
        owners: list[int] = (np.searchsorted(image_bounds, bad, side="right") - 1).tolist()
        for image, record in zip(bad.tolist(), owners, strict=True):
            error = facts.errors[int(facts.numbers[image])]
            errors.setdefault(record, error_of(record, error.kind, str(error)))

    good = _without(np.arange(len(rows)), list(errors))
    is_long = full_lengths > limits.max_length
    cuts, lengths = num_ids.copy(), full_lengths.copy()
    num_images, num_supervised = np.diff(image_bounds), full_supervised.copy()
    dropped: list[int] = []
    # A record that fits and has something to learn stays whole; the others are judged one by one.
    for record in good[is_long[good] | (full_supervised[good] == 0)].tolist():
        tokens: list[int] = image_tokens[image_bounds[record] : image_bounds[record + 1]].tolist()
        try:
            kept = judge(rows.sample(record), tokens, limits)
        except BadSampleError as error:
            if error.kind == "too-long":
                dropped.append(record)
            else:
                errors[record] = error
            continue
        cuts[record], lengths[record] = kept.ids, kept.tokens
        num_images[record], num_supervised[record] = kept.images, kept.supervised

    usable = _without(_without(good, list(errors)), dropped)
    too_long, images_kept = good[is_long[good]], num_images[usable]
    sizes_wh = None
    if limits.geometry is not None and limits.geometry.needs_image_sizes and facts is not None:
        firsts = np.repeat(image_bounds[usable] - (np.cumsum(images_kept) - images_kept), images_kept)
        sizes_wh = facts.sizes_wh[facts.numbers[firsts + np.arange(len(firsts))]].astype(np.int32)
    return Samples(
        rows=rows,
        limits=limits,
        record_indices=usable,
        cuts=cuts[usable].astype(np.int32),
        lengths=lengths[usable].astype(np.int32),
        num_supervised=num_supervised[usable].astype(np.int32),
        num_images=images_kept.astype(np.int32),
        was_truncated=cuts[usable] < num_ids[usable],
        sizes_wh=sizes_wh,
        errors=[errors[record] for record in sorted(errors)],
        too_long=too_long,
        longest=int(full_lengths[too_long].max(initial=0)),
        num_lost_tokens=int((full_lengths - lengths)[usable].sum() + full_lengths[dropped].sum()),
        full_lengths=full_lengths,
        full_supervised=full_supervised,
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


def _bounds(counts: Array) -> Array:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))


def _sums(values: Array, bounds: Array) -> Array:
    return np.diff(_bounds(values)[bounds])
