"""Packing: samples side by side in rows of one length, so that next to nothing is computed for padding.

Which samples share a row is decided once per run, from their lengths and the seed alone. The samples are shuffled, and
a window slides over them: the next row starts with the sample that has waited longest in the window, and goes on with
the longest that fits, as first-fit decreasing does, until one or two samples of the window fill it exactly. Rows are
then a map-style data set like any other: the sampler, the number of steps and resuming count rows, for any number of
ranks.

Why not first-fit decreasing alone: it puts the longest samples together and the shortest together, which leaves 4% to
9% of the rows empty when only three or four samples with images fit into one. Among 4096 samples there are nearly
always one or two that end a row exactly; docs/how-to/packing.md has the numbers.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_ft.data.sampler import HasLengths
from llava_ft.errors import UserError

WINDOW: Final = 4096  # samples among which a row is put together
MOST_SLACK: Final = 8  # positions that a full row may have left over; fewer in rows below 2048 tokens

Array = np.ndarray[Any, np.dtype[Any]]


class DatasetWithLengths(HasLengths, Protocol):
    """A map-style data set whose lengths are known before any item is read."""

    def __getitem__(self, position: int) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Which samples stand in which row."""

    members: Array  # `(N,)` int64, positions of the samples, row by row; each sample once
    ends: Array  # `(R + 1,)` int64, where each row starts and ends in `members`

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> Array:
        row = range(len(self))[row]
        return self.members[self.ends[row] : self.ends[row + 1]]

    def totals(self, values: Sequence[int] | Array) -> Array:
        """Add up a value of each sample, `(N,)` whole numbers, over each row: `(R,)` int64."""
        sums = np.concatenate(([0], np.cumsum(np.asarray(values, dtype=np.int64)[self.members])))
        return np.diff(sums[self.ends])


def pack(lengths: Sequence[int] | Array, max_length: int, seed: int) -> Rows:
    """Put samples into rows of at most `max_length` tokens.

    The result depends on the arguments alone, so every rank comes to the same one. `lengths` are the tokens of each
    sample, `(N,)`; `seed` is that of the shuffle which the windows are cut from.

    Raises:
        UserError: A sample is longer than a row.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if max_length < 1 or (len(tokens) and int(tokens.max()) > max_length):
        longest = int(tokens.max()) if len(tokens) else 0
        raise UserError(
            f"The longest sample has {longest} tokens, but a row has room for {max_length}. Packing needs a row "
            "length of at least the longest sample; raise model_max_length."
        )
    generator = torch.Generator().manual_seed(seed % 2**63)
    order = torch.randperm(len(tokens), generator=generator).numpy()
    window = _Window(order.tolist(), tokens.tolist(), max_length)
    members: list[int] = []
    ends = [0]
    slack = min(MOST_SLACK, max_length // 256)
    while window.refill():
        members += window.take_row(slack)
        ends.append(len(members))
    return Rows(np.array(members, dtype=np.int64), np.array(ends, dtype=np.int64))


def one_each(num_samples: int) -> Rows:
    """Give every sample a row of its own, in order."""
    return Rows(np.arange(num_samples, dtype=np.int64), np.arange(num_samples + 1, dtype=np.int64))


class _Window:
    """Samples that wait for a row, by length.

    Which lengths there are is a bit mask, and a mirrored copy of it: bit n of the first and bit `max_length - n` of the
    second. Shifted against each other they show all pairs of a given sum at once.
    """

    def __init__(self, order: Sequence[int], lengths: Sequence[int], max_length: int):
        self._order = order
        self._lengths = lengths
        self._max_length = max_length
        self._waiting: defaultdict[int, deque[int]] = defaultdict(deque)
        self._mask = 0
        self._mirror = 0
        self._size = 0
        self._next = 0
        self._oldest = 0
        self._is_taken = bytearray(len(order))

    def refill(self) -> bool:
        """Let samples in, in their order, until the window is full or none is left; say whether there is any."""
        while self._size < WINDOW and self._next < len(self._order):
            sample = self._order[self._next]
            length = self._lengths[sample]
            if not self._waiting[length]:
                self._flip(length)
            self._waiting[length].append(sample)
            self._next += 1
            self._size += 1
        return self._size > 0

    def take_row(self, slack: int) -> list[int]:
        """Take out the samples of one row, which may have `slack` positions left over."""
        # First the sample that has waited longest of all.
        while self._is_taken[self._order[self._oldest]]:
            self._oldest += 1
        length = self._lengths[self._order[self._oldest]]
        row, room = [self._take(length)], self._max_length - length
        while room > slack:
            longest = (self._mask & ((2 << room) - 1)).bit_length() - 1  # that fits; -1 without any
            if longest < 0:
                break
            if room - longest > slack:
                sums = range(room, max(room - slack, 2) - 1, -1)
                if pair := next(filter(None, map(self._pair, sums)), None):
                    return [*row, *map(self._take, pair)]
            row.append(self._take(longest))
            room -= longest
        return row

    def _take(self, length: int) -> int:
        """Take out the sample of a length that has waited longest."""
        sample = self._waiting[length].popleft()
        if not self._waiting[length]:
            self._flip(length)
        self._size -= 1
        self._is_taken[sample] = 1
        return sample

    def _pair(self, total: int) -> tuple[int, int] | None:
        """Give two lengths with this sum, as similar as possible, or None."""
        half = total // 2
        pairs = (self._mask & (self._mirror >> (self._max_length - total))) >> (total - half)
        if total % 2 == 0 and len(self._waiting[half]) == 1:
            pairs &= ~1  # one sample is no pair
        if not pairs:
            return None
        longer = total - half + (pairs & -pairs).bit_length() - 1
        return longer, total - longer

    def _flip(self, length: int) -> None:
        self._mask ^= 1 << length
        self._mirror ^= 1 << (self._max_length - length)


class RowDataset(Dataset[dict[str, Any]]):
    """The samples of a data set, row by row."""

    def __init__(self, dataset: DatasetWithLengths, rows: Rows):
        self.dataset = dataset
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Give one row: `samples`, a list of the items of the data set in reading order."""
        return {"samples": [self.dataset[int(member)] for member in self.rows[position]]}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.rows.totals(self.dataset.lengths).tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Tokens of each row, negative for a row without images."""
        signed = np.asarray(self.dataset.modality_lengths)
        lengths = self.rows.totals(np.abs(signed))
        return np.where(self.rows.totals(signed > 0) > 0, lengths, -lengths).tolist()


class PackedDataset(RowDataset):
    """Samples in rows of at most `max_length` tokens; see `pack`."""

    def __init__(self, dataset: DatasetWithLengths, max_length: int, seed: int):
        super().__init__(dataset, pack(dataset.lengths, max_length, seed))
        self.max_length = max_length

    @property
    def efficiency(self) -> float:
        """Share of the computed positions that hold a token of a sample."""
        return sum(self.dataset.lengths) / max(1, len(self) * self.max_length)
