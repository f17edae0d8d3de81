"""How a model is exported, whatever the format."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported.

    Attributes:
        dtype: Type of the weights; that of most of the base's files when absent.
        max_shard_bytes: Size of a shard in bytes.
        adapter_only: Write the adapter for the other layout, without its base.
        verify: Compare logits and greedy answers of the source and the result; the model is loaded for it.
        force: Go on where source and base do not fit each other, saying what is passed over.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    adapter_only: bool = False
    verify: bool = True
    force: bool = False
