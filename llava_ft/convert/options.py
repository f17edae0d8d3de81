"""How a model is merged or exported."""

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import torch

from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.save import shard_bytes
from llava_ft.tuning.quant import Quantization


@dataclass(frozen=True)
class ConversionOptions:
    """What merging and exporting have in common.

    Attributes:
        dtype: Type of the weights; that of the base's files when absent.
        max_shard_bytes: Size of a shard in bytes.
        verify: Compare logits and greedy answers of the source and the result; both models are loaded for it.
        force: What is passed over, such as a base other than the one the adapter was trained on.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    verify: bool = True
    force: Force = False


@dataclass(frozen=True)
class MergeOptions(ConversionOptions):
    """How a merged model is written.

    Attributes:
        weights_format: Kind of files.
        save_vision_tower: Whether the tower is written although the base does not hold it.
        quantization: Merge into the values that the base's linear layers have after being quantised like this; into
            the base's own when absent.
    """

    weights_format: Literal["bin", "safetensors"] = "safetensors"
    save_vision_tower: bool = False
    quantization: Quantization | None = None


@dataclass(frozen=True)
class ExportOptions(ConversionOptions):
    """How a model is exported.

    Attributes:
        adapter_only: Write the adapter for the other layout, without its base.
    """

    adapter_only: bool = False


def common_options(request: argparse.Namespace) -> dict[str, Any]:
    """Read those fields of `ConversionOptions` that both command lines have.

    Raises:
        UserError: The size of a shard is none.
    """
    return {
        "dtype": None if request.dtype == "auto" else getattr(torch, request.dtype),
        "max_shard_bytes": shard_bytes(request.max_shard_size),
        "verify": not request.no_verify,
    }
