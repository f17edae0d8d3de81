"""Where the samples of a batch begin and end, in the form that attention kernels need it.

A batch of joined samples says so once, as the lengths of its samples on the host. Every layer gets the same object, so
none has to look at a tensor on the device, which would make the host wait for it.

Shapes: B rows of T positions, B T of them in the flattened batch, N samples, S positions that are read, K blocks of
positions.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Final

import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE: Final = 128
"""Positions of a block."""


class SampleBoundaries:
    """The samples of a batch, which lie one behind the other in its flattened rows.

    An ordinary class, because torch.compile would make a graph for each value of a frozen dataclass's fields.

    Args:
        lengths: Positions of each sample, in order.
        num_rows: Rows of the batch.
        device: Where the batch is.
        read_counts: How many positions of each sample are read, where it is known.

    Attributes:
        are_rows: Whether each row is one sample.
        starts: Where each sample begins, and where the last one ends.
        max_length: Positions of the longest sample.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        num_rows: int,
        device: torch.device | str,
        read_counts: tuple[int, ...] | None = None,
    ):
        self.lengths = tuple(lengths)
        self.starts = tuple(accumulate(self.lengths, initial=0))
        self.max_length = max(self.lengths)
        self.num_rows = num_rows
        self.are_rows = len(self.lengths) == num_rows
        self.read_counts = read_counts
        self._device = device
        self._block_masks: dict[int | None, BlockMask] = {}

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """`starts` on the device, `(N + 1,)` int32, copied once for all layers."""
        return to_device(torch.tensor(self.starts, dtype=torch.int32), self._device)

    def count_reads(self, positions_S: torch.Tensor) -> "SampleBoundaries":
        """Return the same boundaries with the number of positions of each sample that are read.

        Kernels use it in batches of one row alone; others come back as they are.

        Args:
            positions_S: `(S,)` int64, ascending positions in the flattened batch. With several samples they are looked
                at here, once, and not in a layer.
        """
        if self.num_rows > 1:
            return self
        counts = (len(positions_S),)
        if len(self.lengths) > 1:
            ends = torch.searchsorted(positions_S, self.cu_seqlens[1:].to(positions_S.dtype)).tolist()
            counts = tuple(end - start for start, end in zip([0, *ends], ends, strict=False))
        return SampleBoundaries(self.lengths, self.num_rows, self._device, counts)

    def position_ids(self) -> torch.Tensor:
        """Positions within samples: `(B, T)` int64, 0 where a sample begins."""
        flat = torch.cat([torch.arange(length) for length in self.lengths])
        return to_device(flat, self._device).view(self.num_rows, -1)

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The mask of `flex_attention`, made once for all layers with the same window; see `causal_block_mask`."""
        if window not in self._block_masks:
            self._block_masks[window] = causal_block_mask(self.lengths, self._device, window)
        return self._block_masks[window]


def find_boundaries(
    num_rows: int,
    row_length: int,
    device: torch.device | str,
    *,
    sample_lengths: Sequence[int] | None = None,
    position_ids: torch.Tensor | None = None,
) -> SampleBoundaries:
    """Find the samples of a batch without padding and without a cache.

    Args:
        num_rows: Rows of the batch, B.
        row_length: Positions of each, T.
        device: Where the batch is.
        sample_lengths: Positions of each sample, in the order of the flattened batch.
        position_ids: `(B, T)` or `(1, T)`, looked at if there are no `sample_lengths`, which waits for the device: a
            sample begins wherever they do not go on counting. Without them each row is a sample.

    Raises:
        ValueError: The lengths are not those of the batch.
    """
    if sample_lengths is None and position_ids is None:
        return SampleBoundaries([row_length] * num_rows, num_rows, device)
    if sample_lengths is None:
        assert position_ids is not None
        positions_BT = position_ids.expand(num_rows, -1).cpu()
        is_start_BT = torch.ones_like(positions_BT, dtype=torch.bool)
        is_start_BT[:, 1:] = positions_BT.diff(dim=1) != 1
        starts = is_start_BT.flatten().nonzero()[:, 0]
        lengths = starts.diff(append=starts.new_tensor([num_rows * row_length])).tolist()
        return SampleBoundaries(lengths, num_rows, device)
    lengths, ends = list(sample_lengths), list(accumulate(sample_lengths))
    row_ends = range(row_length, num_rows * row_length + 1, row_length)
    if min(lengths, default=0) < 1 or ends[-1] != row_ends[-1] or not set(row_ends) <= set(ends):
        raise ValueError(
            f"sample_lengths are {lengths}, {sum(lengths)} in all, but the batch has {num_rows} rows of {row_length} "
            "positions. Each sample has at least one position and lies in one row, and together they are all "
            "positions, padding included. Leave sample_lengths out where each row is one sample."
        )
    return SampleBoundaries(lengths, num_rows, device)


def causal_block_mask(lengths: Sequence[int], device: torch.device | str, window: int | None = None) -> BlockMask:
    """Make the mask of `flex_attention` for a row of joined samples of these lengths: which blocks it looks at.

    With a window a position sees so many, itself the last.

    torch's own `create_block_mask` looks at every pair of positions of the row. Here the blocks follow from the
    lengths, so the whole matrix is never made: a block of queries sees the blocks from the one in which its first
    position's sample begins up to itself, and of these some need no mask inside.
    """
    counts = torch.tensor(lengths)
    total, starts = sum(lengths), torch.tensor(list(accumulate(lengths, initial=0)))[:-1]
    sample_T = torch.arange(len(lengths)).repeat_interleave(counts)
    start_T = starts[sample_T]
    first_K = torch.arange(0, total, BLOCK_SIZE)
    last_K = (first_K + BLOCK_SIZE).clamp(max=total) - 1
    key_K, query_K1 = torch.arange(len(first_K)), torch.arange(len(first_K))[:, None]
    is_whole_K1 = (last_K - first_K + 1 == BLOCK_SIZE)[:, None]  # the last block of queries may go over the end
    is_seen_KK = (key_K >= start_T[first_K][:, None] // BLOCK_SIZE) & (key_K <= query_K1)
    is_full_KK = (first_K >= start_T[last_K][:, None]) & (key_K < query_K1) & is_whole_K1
    if window is not None:
        is_seen_KK &= last_K > first_K[:, None] - window
        is_full_KK &= first_K > last_K[:, None] - window
    sample_T = to_device(sample_T.to(torch.int32), device)

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_before = (sample_T[query] == sample_T[key]) & (query >= key)
        return is_before if window is None else is_before & (query - key < window)

    return BlockMask.from_kv_blocks(
        *_ordered(to_device(is_seen_KK & ~is_full_KK, device)),
        *_ordered(to_device(is_full_KK, device)),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=is_seen,
        seq_lengths=(total, total),
    )


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy from the host without waiting: what waits in a GPU's queue is read from memory that stays in place."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _ordered(chosen_KK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each block of queries has, `(1, 1, K)`, and all blocks, those first, `(1, 1, K, K)`."""
    order = chosen_KK.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_KK.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
