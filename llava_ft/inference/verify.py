"""Comparing two models that ought to say the same: the proof at the end of a merge."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.errors import RunError
from llava_ft.geometry import ImageGeometry
from llava_ft.inference.load import LoadedModel, load_model
from llava_ft.tuning.quant import Quantization

logger = logging.getLogger(__name__)

RELATIVE_BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest allowed difference of logits, as a share of the largest logit, by the dtype the merged weights are rounded
to. float16 rounds a weight by 2^-11 of its size and bfloat16 by 2^-8; a sum over layers of such errors stays well below
these bounds, and any forgotten or doubled tensor is far above them."""

BOUND_IN_8_BITS = 6e-2
"""The same for comparison with weights in 8 bits, which round the inputs of each layer to 8 bits as well."""


@dataclass(frozen=True)
class LogitComparison:
    """Difference of two models on fixed input.

    Attributes:
        max_difference: Largest absolute difference of logits.
        scale: Largest absolute logit.
        bound: Largest allowed difference.
    """

    max_difference: float
    scale: float
    bound: float

    def __str__(self) -> str:
        """Return one line for a report."""
        return (
            f"max |difference of logits| {self.max_difference:.3g} "
            f"(bound {self.bound:.3g}, largest logit {self.scale:.3g})"
        )


def fixed_inputs(loaded: LoadedModel) -> list[dict[str, torch.Tensor]]:
    """Return a text input and, if the model sees, one with an image: both the same on every machine."""
    vocab_size = loaded.model.config.vocab_size
    words = [1 + (index * 7919) % (vocab_size - 1) for index in range(24)]
    inputs = [{"input_ids": torch.tensor([words])}]
    geometry: ImageGeometry | None = loaded.model.config.image_geometry
    if geometry is not None:
        side = geometry.input_size
        row = torch.linspace(-1.5, 1.5, side)
        pixels = torch.stack([row.expand(side, side), row.expand(side, side).T, row.outer(row)])
        size_wh = (3 * side // 2, side)
        ids = [*words[:8], *[IMAGE_TOKEN_INDEX] * geometry.num_tokens(size_wh), *words[8:]]
        tiles = [pixels * (1.0 - 0.05 * index) for index in range(geometry.num_tiles(size_wh))]
        images = {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor([size_wh])}
        inputs.append({"input_ids": torch.tensor([ids]), **images})
    return inputs


@torch.no_grad()
def fixed_logits(loaded: LoadedModel) -> list[torch.Tensor]:
    """Return the float32 logits on `fixed_inputs`, on the CPU."""
    device = next(loaded.model.parameters()).device
    return [
        loaded.model(**{name: value.to(device) for name, value in inputs.items()}).logits.float().cpu()
        for inputs in fixed_inputs(loaded)
    ]


def compare_merged(
    merged: Path,
    model_path: str,
    model_base: str | None,
    *,
    vision_tower: str | None = None,
    merged_dtype: torch.dtype = torch.float32,
    force: Force = False,
    quantization: Quantization | None = None,
) -> LogitComparison:
    """Compare a merged model with the adapter beside its base, quantised if it was merged into such weights.

    The two models are in memory one after the other. Both are computed in float32, or in `merged_dtype` if float32
    weights would not fit into the memory that is free.

    Raises:
        RunError: They differ by more than rounding explains.
    """
    dtype = computing_dtype(merged, merged_dtype, free_memory())
    loaded = load_model(
        model_path,
        model_base,
        vision_tower=vision_tower,
        dtype=dtype,
        device="cpu",
        force=force,
        adapter="beside",
        quantization=quantization,
    )
    expected = fixed_logits(loaded)
    tower = vision_tower or loaded.model.config.mm_vision_tower
    del loaded
    got = fixed_logits(load_model(str(merged), vision_tower=tower, dtype=dtype, device="cpu"))
    scale = max(float(logits.abs().max()) for logits in expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))
    relative = RELATIVE_BOUNDS.get(merged_dtype, 1e-4)
    if quantization is not None and quantization.bits == 8:
        relative = max(relative, BOUND_IN_8_BITS)
    comparison = LogitComparison(difference, scale, relative * scale)
    if not difference <= comparison.bound:
        raise RunError(f"The merged model is not the adapter on its base: {comparison}. Nothing was written.")
    return comparison


def computing_dtype(merged: Path, merged_dtype: torch.dtype, free_bytes: int) -> torch.dtype:
    """Choose the dtype of a comparison: float32 if a model's weights take at most 80% of the free memory in it."""
    num_values = sum(info.num_bytes // info.dtype.itemsize for info in WeightFiles.open(merged).tensors.values())
    if torch.float32.itemsize * num_values <= 0.8 * free_bytes:
        return torch.float32
    logger.warning("The logits are compared in %s: the memory that is free is too small for float32.", merged_dtype)
    return merged_dtype


def free_memory() -> int:
    """Memory in bytes that a process can take without swapping; Linux's own estimate."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
