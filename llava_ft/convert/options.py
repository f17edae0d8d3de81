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
    """What merging and exporting have in common."""

    dtype: torch.dtype | None = None  # of the weights; that of the base's files when absent
    max_shard_bytes: int = 5 * 10**9
    verify: bool = True  # compare logits and greedy answers; source and result are loaded for it
    force: Force = False  # what is passed over, such as a base other than the one the adapter was trained on


@dataclass(frozen=True)
class MergeOptions(ConversionOptions):
    """How a merged model is written."""

    weights_format: Literal["bin", "safetensors"] = "safetensors"
    save_vision_tower: bool = False  # also where the base does not hold it
    quantization: Quantization | None = None  # merge into what the base's layers are worth when quantised like this


@dataclass(frozen=True)
class ExportOptions(ConversionOptions):
    """How a model is exported."""

    adapter_only: bool = False  # write the adapter for the other layout, without its base


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
