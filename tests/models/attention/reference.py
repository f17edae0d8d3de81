"""Causal attention within samples, written out in float64, and stand-ins with the signatures of kernels of GPUs."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attend within samples.

    Args:
        query: `(P, H, W)`.
        key: `(P, G, W)`, H a multiple of G.
        value: `(P, G, W)`.
        lengths: Positions of each sample.
        scale: Factor of the scores.
        window: How many positions each sees, itself the last.

    Returns:
        `(P, H, W)` float64.
    """
    query, key, value = query.double(), key.double(), value.double()
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhw,khw->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(query.device)
    place = torch.arange(len(query), device=query.device)
    is_seen = (sample[:, None] == sample) & (place[:, None] >= place)
    if window is not None:
        is_seen &= place[:, None] - place < window
    return torch.einsum("hqk,khw->qhw", scores.masked_fill(~is_seen, float("-inf")).softmax(-1), value)


def lengths_of(ends: torch.Tensor) -> list[int]:
    return [end - start for start, end in pairwise(ends.tolist())]


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` for causal attention of samples to themselves."""
    assert return_aux is seqused_k is block_table is num_splits is None
    assert window_size[1] == 0
    window = None if window_size[0] == -1 else window_size[0] + 1
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return _checked(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """The function of that name of the package flash-attn."""
    assert causal
    assert (dropout_p, softcap) == (0.0, 0.0)
    window = None if window_size[0] == -1 else window_size[0] + 1
    return _checked(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale, window)


def _checked(
    query: Any, key: Any, value: Any, ends: Any, longest: tuple[int, int], scale: float | None, window: int | None
) -> Any:
    assert query.dim() == 3
    assert query.dtype == key.dtype == value.dtype
    assert ends[0].dtype == ends[1].dtype == torch.int32
    assert torch.equal(ends[0], ends[1])
    lengths = lengths_of(ends[0])
    assert list(accumulate(lengths))[-1] == len(query) == len(key)
    assert longest == (max(lengths), max(lengths))
    assert all(type(length) is int for length in longest)
    return attend(query, key, value, lengths, scale, window).to(query.dtype)
