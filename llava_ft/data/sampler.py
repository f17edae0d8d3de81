"""The order in which an epoch visits the samples, the same on every rank.

An order is a permutation of all samples. The data loader cuts it into batches, and the ranks take the batches
in turn, so a group of `world_size` successive batches is one step. The functions below are pure: lengths and
a generator in, a list of positions out. `EpochSampler` calls them with a generator of its own, so that
neither another consumer of random numbers nor a resumed run changes the order.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import torch
from torch.utils.data import Sampler

from llava_ft.errors import UserError

STRATEGIES: Final = ("random", "sequential", "length", "modality_length")  # of an epoch; see `EpochSampler`
SORTED_BATCHES: Final = 50  # that the "length" strategy sorts together, as transformers does


def even_chunks(positions: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal `positions` into chunks of equal size and similar total length.

    Each position in turn goes to the chunk that is shortest so far and not yet full. When the chunks cannot
    have the same size, the positions are dealt like cards instead.
    """
    if len(positions) % num_chunks:
        return [list(positions[first::num_chunks]) for first in range(num_chunks)]
    capacity = len(positions) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0] * num_chunks
    is_open = list(range(num_chunks))
    for position in positions:
        shortest = min(is_open, key=totals.__getitem__)
        chunks[shortest].append(position)
        totals[shortest] += lengths[position]
        if len(chunks[shortest]) == capacity:
            is_open.remove(shortest)
    return chunks


def balanced_order(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Draw a random order whose steps have batches of similar total length on every rank.

    `lengths` are in tokens. A step has `world_size` batches, ranks times gradient accumulation.
    """
    shuffled = _permutation(len(lengths), generator)
    order: list[int] = []
    for step in _cut(shuffled, batch_size * world_size):
        step.sort(key=lengths.__getitem__, reverse=True)
        for batch in even_chunks(step, lengths, world_size):
            order.extend(batch)
    return order


def sorted_order(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Draw a random order in which neighbours have similar lengths, so that little is padded.

    The samples are shuffled, cut into groups of up to 50 steps, and each group is sorted from long to short.
    The longest sample comes first of all: what does not fit into memory fails at once. For the arguments see
    `balanced_order`.
    """
    step_size = batch_size * world_size
    num_steps = max(1, min(len(lengths) // (step_size * 4), SORTED_BATCHES))
    groups = list(_cut(_permutation(len(lengths), generator), num_steps * step_size))
    for group in groups:
        group.sort(key=lengths.__getitem__, reverse=True)
    if groups:
        longest = max(groups, key=lambda group: lengths[group[0]])
        groups[0][0], longest[0] = longest[0], groups[0][0]
    return [position for group in groups for position in group]


def modality_order(
    signed_lengths: Sequence[int], batch_size: int, world_size: int, generator: torch.Generator | None = None
) -> list[int]:
    """Draw a random order whose steps are all with images or all without, balanced over the ranks.

    What is left over of the two kinds makes one mixed step at the end. Lengths are negative for samples without images;
    0 counts as one of these (the original fails on it). For the other arguments see `balanced_order`.
    """
    kinds = [[i for i, n in enumerate(signed_lengths) if (n > 0) == has_images] for has_images in (True, False)]
    if not all(kinds):
        # With text alone the lengths stay negative, as in the original, whose order this has to be.
        return balanced_order(signed_lengths, batch_size, world_size, generator)
    orders: list[list[int]] = []
    for members in kinds:
        lengths = [abs(signed_lengths[position]) for position in members]
        orders.append([members[i] for i in balanced_order(lengths, batch_size, world_size, generator)])
    return mixed_steps(orders, batch_size * world_size, generator)


def mixed_steps(orders: Sequence[Sequence[int]], step_size: int, generator: torch.Generator | None = None) -> list[int]:
    """Cut each order (none empty) into steps, shuffle these, and put the last steps of all together at the end."""
    steps: list[list[int]] = []
    leftover: list[int] = []
    for order in orders:
        *whole, last = _cut(order, step_size)
        steps.extend(whole)
        leftover.extend(last)
    shuffled = [position for i in _permutation(len(steps), generator) for position in steps[i]]
    return shuffled + sorted(leftover)


def steps_per_epoch(
    num_samples: int, batch_size: int, world_size: int, accumulation: int = 1, *, drop_last: bool = False
) -> int:
    """Count the optimizer steps of an epoch.

    A sample may be a row of packed ones. Each of `world_size` ranks takes micro-batches of `batch_size`, `accumulation`
    of them a step, the last step perhaps fewer; `drop_last` leaves out those that not every rank can fill.
    """
    per_round = batch_size * world_size
    micro_batches = num_samples // per_round if drop_last else -(-num_samples // per_round)
    return max(1, -(-micro_batches // accumulation))


def _permutation(size: int, generator: torch.Generator | None) -> list[int]:
    return [int(position) for position in torch.randperm(size, generator=generator).numpy()]


def _cut(positions: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(positions), size):
        yield list(positions[start : start + size])


class HasLengths(Protocol):
    """What `EpochSampler` has to know of a data set."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        ...

    @property
    def modality_lengths(self) -> Sequence[int]:
        """Tokens of each sample, negative for a sample without images."""
        ...

    def __len__(self) -> int: ...


class EpochSampler(Sampler[int]):
    """Visits every sample once an epoch, in an order that depends on `(seed, epoch)` alone.

    Strategies: "random"; "sequential", the order of the records; "length", little padding (transformers'
    `group_by_length`); "modality_length", steps with images or without (LLaVA's `group_by_modality_length`).

    Args:
        dataset: What is visited.
        strategy: One of the above.
        batch_size: Samples of one rank in one step.
        world_size: Batches of one step: ranks times gradient accumulation, as in LLaVA.
        seed: Seed of the run.

    Raises:
        UserError: The strategy is unknown, or a size is not positive.
    """

    def __init__(
        self, dataset: HasLengths, *, strategy: str = "random", batch_size: int = 1, world_size: int = 1, seed: int = 0
    ):
        if strategy not in STRATEGIES:
            raise UserError(f"The sampling strategy is {strategy!r}; it can be {', '.join(STRATEGIES)}.")
        if batch_size < 1 or world_size < 1:
            raise UserError(f"batch_size is {batch_size} and world_size {world_size}; both must be at least 1.")
        self.num_samples = len(dataset)
        self.strategy = strategy
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self._lengths: Sequence[int] = ()
        if strategy == "length":
            self._lengths = dataset.lengths
        elif strategy == "modality_length":
            self._lengths = dataset.modality_lengths

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, that the next iteration visits."""
        self.epoch = epoch

    def order(self) -> list[int]:
        """Give the positions of the current epoch in the order of the visit."""
        if self.strategy == "sequential":
            return list(range(self.num_samples))
        # Both numbers mixed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self.epoch * 0xBF58476D1CE4E5B9 + 1) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        if self.strategy == "random":
            return _permutation(self.num_samples, generator)
        if self.strategy == "length":
            return sorted_order(self._lengths, self.batch_size, self.world_size, generator)
        return modality_order(self._lengths, self.batch_size, self.world_size, generator)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())

    def __len__(self) -> int:
        return self.num_samples
