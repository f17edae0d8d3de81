"""Attention of joined samples, one sample at a time: torch's causal kernel on each, and no mask.

A mask over a joined row makes the kernel compute every pair of positions of the row and throw away those of different
samples. `position_ids` restart at 0 with each sample, so they say where to cut.

The kernel also takes queries of chosen positions alone, which the decoder's last layer makes use of.

Shapes: T positions of the row, S of them with a query, H heads, W width of a head.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME: Final = "sdpa_by_sample"


def attend_by_sample(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    position_ids: torch.Tensor,
    query_positions: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within samples; with padding or a cache as transformers' `sdpa` does.

    Args:
        module: The layer that asks.
        query: `(1, H, T, W)` if rows are joined to one, `(B, H, T, W)` else; `(1, H, S, W)` with `query_positions`.
        key: `(1, H_kv, T, W)`.
        value: `(1, H_kv, T, W)`.
        attention_mask: None if rows are joined.
        position_ids: `(1, T)`, 0 where a sample starts.
        query_positions: `(S,)` int64 ascending positions of the queries; None is all.
        dropout: Probability with which a weight is dropped.
        scaling: Factor of the scores.
        **kwargs: For transformers' `sdpa`.

    Returns:
        `(1, T, H, W)`, or `(1, S, H, W)` with `query_positions`; and no weights.
    """
    if query_positions is None and not is_joined(len(query), query.shape[2], key.shape[2], attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_tensor([key.shape[2]])).tolist()
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    if query_positions is None:
        outputs = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
            for q, k, v in zip(query.split(lengths, dim=2), keys, values, strict=True)
        ]
    else:
        sample_S = torch.searchsorted(starts, query_positions, right=True) - 1
        counts = sample_S.bincount(minlength=len(lengths)).tolist()
        within_S = position_ids[0, query_positions]
        outputs = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=_causal(within, k.shape[2]), **options)
            if q.shape[2]
            else q
            for q, k, v, within in zip(query.split(counts, dim=2), keys, values, within_S.split(counts), strict=True)
        ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _causal(positions_S: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Which keys each query sees: `(S, T)` bool."""
    return positions_S[:, None] >= torch.arange(num_keys, device=positions_S.device)


def is_joined(num_rows: int, num_queries: int, num_keys: int, attention_mask: torch.Tensor | None) -> bool:
    """Whether samples are told apart by `position_ids`, and not by a mask: one row, no padding, no cache."""
    return num_rows == 1 and num_queries == num_keys and attention_mask is None


def register() -> None:
    """Make the kernel known to transformers under `NAME`."""
    AttentionInterface.register(NAME, attend_by_sample)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*, batch_size: int, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any):
    if is_joined(batch_size, q_length, kv_length, attention_mask):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )
