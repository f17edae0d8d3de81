"""Which blocks of positions `flex_attention` has to look at, for causal attention within samples.

torch's own `create_block_mask` looks at every pair of positions of the row. Here the blocks follow from the lengths of
the samples, so the whole matrix is never made: a block of queries sees the blocks from the one in which its first
position's sample begins up to itself, and of these some need no mask inside.

Shapes: T positions, K blocks of positions.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
from torch.nn.attention.flex_attention import BlockMask

BLOCK_SIZE: Final = 128
"""Positions of a block."""


def causal_block_mask(lengths: Sequence[int], device: torch.device | str) -> BlockMask:
    """Make the mask of a row of joined samples.

    Args:
        lengths: Positions of each sample.
        device: Where the row is.
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
    sample_T = to_device(sample_T.to(torch.int32), device)

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (sample_T[query] == sample_T[key]) & (query >= key)

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
