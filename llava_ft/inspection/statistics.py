"""Numbers about the usable records: how long they are, what truncation takes away, what packing will give."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from llava_ft.data.packing import pack
from llava_ft.data.preparation.tokenized_rows import Array
from llava_ft.data.preparation.truncation import Limits
from llava_ft.inspection.check_source import SourceCheck

_MOST_BINS: Final = 16
_NICE_STEPS: Final = (1, 2, 4, 5, 8, 10)
_SHARE_IN_BINS: Final = 0.995
"""Records that the bins of equal width hold at least; the rest share the last bin."""


@dataclass(frozen=True)
class Histogram:
    """Numbers of records by length: where each bin starts, ascending, the last one without end; and their counts."""

    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Lengths:
    """Tokens of records before truncation, with those of images; 99% of the records do not exceed `p99`."""

    shortest: int
    median: int
    mean: float
    p99: int
    longest: int
    histogram: Histogram


@dataclass(frozen=True)
class Truncation:
    """What is lost of the usable records at `model_max_length`, and how many are dropped for their length."""

    max_length: int
    policy: str
    records_cut: int
    records_dropped: int
    tokens_lost: int
    supervised_lost: int
    answers_lost: int  # those that are not whole any more
    images_lost: int


@dataclass(frozen=True)
class Statistics:
    """Everything that is counted in one source; the keys of the JSON report in `docs/check_data.md`."""

    records: int
    usable: int
    images: int  # each time that a record names one
    image_files: int  # different ones
    image_bytes: int  # of those that can be used
    unusable_images: int
    tokens: int  # of the usable records, after truncation
    supervised: int
    lengths: Lengths | None  # None without a usable record
    truncation: Truncation

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that have to be predicted."""
        return self.supervised / max(1, self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Give the numbers as JSON values."""
        return {**asdict(self), "supervised_share": round(self.supervised_share, 6)}


def count_all(check: SourceCheck, limits: Limits) -> Statistics:
    """Count what was found in a source under the limits of a run."""
    columns, decoded = check.columns, check.images.decoded

    def lost(name: str) -> int:
        return int((columns[name] - columns[f"kept_{name}"]).sum())

    return Statistics(
        records=len(check.source),
        usable=len(columns["index"]),
        images=len(check.images.numbers),
        image_files=len(decoded),
        image_bytes=sum(image.num_bytes for image in decoded),
        unusable_images=sum(image.error is not None for image in decoded),
        tokens=int(columns["kept_tokens"].sum()),
        supervised=int(columns["kept_supervised"].sum()),
        lengths=_lengths(columns["tokens"]) if len(columns["index"]) else None,
        truncation=Truncation(
            max_length=limits.max_length,
            policy=limits.truncation,
            records_cut=int((columns["kept_tokens"] < columns["tokens"]).sum()),
            records_dropped=len(check.dropped.indices),
            tokens_lost=lost("tokens"),
            supervised_lost=lost("supervised"),
            answers_lost=lost("answers"),
            images_lost=lost("images"),
        ),
    )


def _lengths(tokens: Array) -> Lengths:
    ordered = np.sort(tokens)
    return Lengths(
        shortest=int(ordered[0]),
        median=int(ordered[(len(ordered) - 1) // 2]),
        mean=round(float(ordered.mean()), 1),
        p99=int(ordered[math.ceil(0.99 * len(ordered)) - 1]),
        longest=int(ordered[-1]),
        histogram=make_histogram(ordered),
    )


def make_histogram(ordered: Array) -> Histogram:
    """Count lengths in bins of one round width; the last bin takes everything beyond."""
    most = int(ordered[math.ceil(_SHARE_IN_BINS * len(ordered)) - 1])
    first = int(ordered[0])
    step = (most + 1 - first) / _MOST_BINS
    power = 10 ** max(0, math.floor(math.log10(max(step, 1))))
    width = next(power * nice for nice in _NICE_STEPS if power * nice >= step)
    edges = list(range(first // width * width, most + 1, width))
    counts = np.histogram(ordered, bins=[*edges, max(edges[-1] + width, int(ordered[-1]) + 1)])[0]
    return Histogram(edges, counts.tolist())


@dataclass(frozen=True)
class Packing:
    """What `--packing true` would give: efficiency is the share of computed positions that hold a token.

    `padded_efficiency` is that without packing, records in random order padded to the longest of their batch.
    """

    rows: int
    max_length: int
    records_per_row: float
    efficiency: float
    padded_efficiency: float
    batch_size: int


@dataclass(frozen=True)
class Epoch:
    """What an epoch of the training data is made of, each record as often as it is taken, after truncation."""

    records: int
    tokens: int
    supervised: int
    packing: Packing


def count_epoch(lengths: Array, supervised: Array, *, max_length: int, batch_size: int, seed: int) -> Epoch:
    """Put the records of an epoch together, given the tokens of each after truncation and those to be predicted.

    `batch_size` is that of one rank, for the comparison of packing with padding. There is at least one record.
    """
    rows = len(pack(lengths, max_length, seed))
    shuffled = np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(shuffled), batch_size)
    sizes = np.minimum(batch_size, len(shuffled) - starts)
    padded = int((np.maximum.reduceat(shuffled, starts) * sizes).sum())
    total = int(lengths.sum())
    packing = Packing(
        rows=rows,
        max_length=max_length,
        records_per_row=round(len(lengths) / rows, 2),
        efficiency=round(total / (rows * max_length), 4),
        padded_efficiency=round(total / padded, 4),
        batch_size=batch_size,
    )
    return Epoch(len(lengths), total, int(supervised.sum()), packing)
