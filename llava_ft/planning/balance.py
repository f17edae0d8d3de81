"""How much longer the slowest rank takes, and how much is padding, for the lengths and the order of a run.

Ranks wait for each other. With samples of unequal length the one with the most work decides: what counts is the
expected maximum over ranks, not the mean. It is found by drawing steps as the run's sampler does.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch

from llava_ft.data.sampler import SORTED_BATCHES, balanced_order
from llava_ft.planning.flops import Counts, Flops

Array = np.ndarray[Any, np.dtype[Any]]
Rows = Literal["padded", "packed", "joined"]

DRAWN_STEPS: Final = 24
"""Steps that are drawn where they have few samples."""

DRAWN_SAMPLES: Final = 8192
"""Samples after which no further step is drawn."""


@dataclass(frozen=True)
class Samples:
    """The samples of a run, in any order.

    Attributes:
        lengths: Positions of each.
        supervised: Supervised positions of each.
        tiles: Tiles of the images of each.
    """

    lengths: Array
    supervised: Array
    tiles: Array

    @classmethod
    def alike(cls, length: int, supervised: int, tiles: int) -> "Samples":
        """Samples that do not differ; one stands for all."""
        return cls(*(np.array([value], dtype=np.int64) for value in (length, supervised, tiles)))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def chosen(self, indices: Array) -> "Samples":
        """Those at these indices, in that order and shape."""
        return Samples(self.lengths[indices], self.supervised[indices], self.tiles[indices])


@dataclass(frozen=True)
class Drawing:
    """How samples become micro-batches.

    Attributes:
        order: The sampler's strategy; see `EpochSampler`.
        rows: What a row of a batch is.
        batch_size: Samples, or packed rows, of a rank's micro-batch.
        ranks: Number of ranks.
        accumulation: Micro-batches of a step.
        waits_each: Whether ranks wait for each other in each micro-batch, and not only once a step.
        row_length: Positions of a packed row.
        samples_per_row: Samples of a packed row on average; 1 without packing.
    """

    order: str
    rows: Rows
    batch_size: int
    ranks: int
    accumulation: int
    waits_each: bool
    row_length: int = 0
    samples_per_row: float = 1.0


@dataclass(frozen=True)
class Balance:
    """What an average micro-batch holds, and how ranks differ.

    Attributes:
        useful: Counts of the samples themselves, causal pairs.
        computed: Counts with padding.
        waiting: Work of the slowest rank over that of the average one; 1 where all are alike.
    """

    useful: Counts
    computed: Counts
    waiting: float


def draw_balance(samples: Samples, drawing: Drawing, flops: Flops, seed: int = 0) -> Balance:
    """Draw steps and compare the ranks.

    Args:
        samples: The run's samples.
        drawing: How they become micro-batches.
        flops: Work of a micro-batch.
        seed: Of the drawing; the same seed gives the same result.
    """
    if drawing.rows == "packed":
        return _packed(samples, drawing)
    kinds = [samples]
    if drawing.order == "modality_length":
        has_images = samples.tiles > 0
        kinds = [samples.chosen(np.flatnonzero(mask)) for mask in (has_images, ~has_images) if mask.any()]
    useful, computed, mean, slowest = [], [], 0.0, 0.0
    for kind in kinds:
        share = len(kind) / len(samples)
        steps = kind.chosen(_steps(kind, drawing, seed))  # (step, micro-batch, rank, sample)
        padded = _counts(steps, is_padded=drawing.rows == "padded")
        work = np.asarray(flops.of(padded))
        if not drawing.waits_each:
            work = work.sum(axis=1, keepdims=True)
        mean += share * float(work.mean())
        slowest += share * float(work.max(axis=2).mean())
        useful.append((share, _counts(steps, is_padded=False)))
        computed.append((share, padded))
    return Balance(_average(useful), _average(computed), slowest / mean if mean else 1.0)


def _steps(samples: Samples, drawing: Drawing, seed: int) -> Array:
    """Draw whole steps: indices by step, micro-batch, rank and sample. Few samples are taken again and again."""
    batches = drawing.ranks * drawing.accumulation
    size = batches * drawing.batch_size
    num_steps = 1 if samples.lengths.min() == samples.lengths.max() else max(1, min(DRAWN_STEPS, DRAWN_SAMPLES // size))
    if drawing.order == "length":  # one of the groups that the sampler sorts
        num_steps = max(1, min(len(samples) // (4 * size), SORTED_BATCHES))
    random = np.random.default_rng(seed)
    rounds = -(-num_steps * size // len(samples))
    pool = np.concatenate([random.permutation(len(samples)) for _ in range(rounds)])[: num_steps * size]
    if drawing.order == "length":
        pool = pool[np.argsort(-samples.lengths[pool], kind="stable")]
    elif drawing.order == "modality_length":
        generator = torch.Generator().manual_seed(seed)
        pool = pool[balanced_order(samples.lengths[pool].tolist(), drawing.batch_size, batches, generator)]
    return pool.reshape(num_steps, drawing.accumulation, drawing.ranks, drawing.batch_size)


def _counts(steps: Samples, *, is_padded: bool) -> Counts:
    lengths = steps.lengths
    if is_padded:
        lengths = np.broadcast_to(lengths.max(axis=-1, keepdims=True), lengths.shape)
    return Counts(
        positions=lengths.sum(axis=-1),
        supervised=steps.supervised.sum(axis=-1),
        pairs=(lengths * (lengths + 1) / 2).sum(axis=-1),
        tiles=steps.tiles.sum(axis=-1),
    )


def _average(parts: list[tuple[float, Counts]]) -> Counts:
    names = ("positions", "supervised", "pairs", "tiles")
    return Counts(*(sum(share * float(np.mean(getattr(counts, name))) for share, counts in parts) for name in names))


def _packed(samples: Samples, drawing: Drawing) -> Balance:
    """Rows are full, so every rank has the same number of positions; how pairs and images differ is left out."""
    lengths, times = samples.lengths.astype(np.float64), drawing.batch_size * drawing.samples_per_row
    useful = Counts(
        positions=times * float(lengths.mean()),
        supervised=times * float(samples.supervised.mean()),
        pairs=times * float((lengths * (lengths + 1) / 2).mean()),
        tiles=times * float(samples.tiles.mean()),
    )
    computed = Counts(drawing.batch_size * drawing.row_length, useful.supervised, useful.pairs, useful.tiles)
    return Balance(useful, computed, 1.0)
