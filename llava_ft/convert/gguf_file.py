"""GGUF files of a LLaVA: names, types and order of their tensors, and writing and reading them with `gguf`.

llama.cpp reads a LLaVA as a language model of architecture `llama` and a file of architecture `clip` that holds the
vision tower and the projector. Names are the gguf package's, and types those that llama.cpp's own converter gives:

- matrices in the type that was asked for; vectors, norms and position embeddings in float32; the patch embedding,
  which is a convolution, in float16 or float32 alone;
- rows of the query and key projections of the language model in another order. transformers rotates a head's first
  half against its second (`0 1 2 .. | n/2 n/2+1 ..`), llama.cpp neighbours (`0 n/2 1 n/2+1 ..`).

Layers of the tower behind the one whose features LLaVA reads are left out, and so is the tower's last norm.

A GGUF file lists all names, shapes and types before the first value, so it is announced from shapes alone and each
tensor follows in its turn. Memory holds one tensor at a time, however large the model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
import torch

from llava_ft.checkpoint.names import PROJECTOR_PREFIX
from llava_ft.errors import CheckpointError, UserError
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.parts import LANGUAGE_MODEL, VISION_PREFIX, module_part
from llava_ft.models.towers.tower import hidden_state_index

File = Literal["language", "vision"]
"""`language` is the language model's file, `vision` the one with tower and projector (llama.cpp's "mmproj")."""

DTYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types that matrices may have, with GGUF's names for them."""

_TOWER_LAYER: Final = re.compile(re.escape(VISION_PREFIX) + r"encoder\.layers\.(\d+)\.")
_TOWER_END: Final = VISION_PREFIX + "post_layernorm."
_POSITIONS: Final = "v.position_embd.weight"
_CONVOLUTION: Final = "v.patch_embd.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file."""

    file: File
    name: str  # in that file
    native: str  # its native LLaVA name
    shape: tuple[int, ...]  # as PyTorch has it; GGUF lists the same numbers the other way round
    dtype: torch.dtype  # in the file
    num_heads: int = 0  # of a query or key projection: number of heads whose rows change places

    @property
    def num_bytes(self) -> int:
        """Size of its data in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: LlavaModelConfig, dtype: torch.dtype
) -> list[GgufTensor]:
    """Say where each tensor of a model goes, in the order of the files.

    Args:
        shapes: Shape of each tensor by native name, the vision tower's included.
        config: The model's.
        dtype: Type of the matrices, one of `DTYPES`.

    Raises:
        CheckpointError: llama.cpp has no place for a tensor.
    """
    gguf = import_gguf()
    num_read = num_tower_layers(config) if config.mm_vision_config is not None else 0
    names = {
        "language": gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers),
        "vision": gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, num_read),
    }
    plan: list[GgufTensor] = []
    unknown: list[str] = []
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or 0}
    for native, shape in shapes.items():
        layer = _TOWER_LAYER.match(native)
        if native.startswith(_TOWER_END) or (layer is not None and int(layer[1]) >= num_read):
            continue
        file: File = "language" if module_part(native) in LANGUAGE_MODEL else "vision"
        if module_part(native) == "projector":  # the package knows it by the names of transformers' layout alone
            name = native.replace(PROJECTOR_PREFIX, "mm.")
        else:
            name = names[file].get_name(native.replace("model.vision_tower.", "", 1), (".weight", ".bias"))
        if name is None:
            unknown.append(native)
            continue
        is_float32 = len(shape) < 2 or name == _POSITIONS or (name == _CONVOLUTION and dtype == torch.bfloat16)
        num_heads = rotated.get(native.split(".")[-2], 0) if file == "language" else 0
        plan.append(GgufTensor(file, name, native, tuple(shape), torch.float32 if is_float32 else dtype, num_heads))
    if unknown:
        raise CheckpointError(
            f"A GGUF file has no place for {len(unknown)} tensors of this model, such as {unknown[0]}. What can be "
            "exported is a LLaMA with a CLIP tower and an mlp2x_gelu projector; export with --format llava instead."
        )

    def file_order(tensor: GgufTensor) -> tuple[str, int, str]:
        """Language model first; in each file what stands outside the layers, then layer by layer."""
        layer = re.search(r"blk\.(\d+)\.", tensor.name)
        return tensor.file, int(layer[1]) if layer else -1, tensor.name

    return sorted(plan, key=file_order)


def rotate_rows(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Bring the rows of a query or key projection into llama.cpp's order.

    Args:
        tensor: `(heads x n, ...)` weight or bias, n rows a head: the first half of them rotates with the second.
        num_heads: Number of heads; 0 returns the tensor as it is.

    Returns:
        The same rows, rotating pairs side by side within each head.
    """
    if not num_heads:
        return tensor
    rest = tensor.shape[1:]
    return tensor.reshape(num_heads, 2, -1, *rest).transpose(1, 2).reshape(-1, *rest)


def restore_rows(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo `rotate_rows`."""
    if not num_heads:
        return tensor
    rest = tensor.shape[1:]
    return tensor.reshape(num_heads, -1, 2, *rest).transpose(1, 2).reshape(-1, *rest)


def num_tower_layers(config: LlavaModelConfig) -> int:
    """Layers of the vision tower in front of the features that LLaVA reads: the ones that are exported."""
    tower = config.tower_facts
    assert tower is not None
    return hidden_state_index(config.mm_vision_select_layer, tower.depth)


Fields = dict[str, Any]
"""What a file says beside its tensors. Whole numbers are counts or ids, uint32; others are float32; lists, int32 or
float32 or texts, are not empty."""


def real(value: float) -> float:
    """Round a number to float32, as the file holds it."""
    return float(np.float32(value))


def import_gguf() -> ModuleType:
    """Import the `gguf` package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"Exporting to GGUF needs the package gguf, which cannot be imported ({error}). Install it with "
            "pip install 'llava-ft[gguf]'."
        ) from None
    return gguf


def round_once(value: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
    """Round a value in float32 to the type that it has in a file.

    Raises:
        CheckpointError: The type cannot hold the value.
    """
    rounded = value.to(tensor.dtype)
    if tensor.dtype == torch.float16 and not torch.isfinite(rounded).all() and torch.isfinite(value).all():
        raise CheckpointError(
            f"{tensor.native} holds {value.abs().max().item():.6g}, and float16 ends at 65504. Export with --dtype "
            "bfloat16 or float32."
        )
    return rounded


def write_gguf(
    path: Path,
    architecture: str,
    fields: Fields,
    tensors: Sequence[GgufTensor],
    value_of: Callable[[GgufTensor], torch.Tensor],
) -> None:
    """Write a file; memory holds one tensor at a time.

    `value_of` gives the value of each in turn, in the type that it has in the file, rows as in PyTorch.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind)
    for tensor in tensors:
        raw_dtype = gguf.GGMLQuantizationType[DTYPES[tensor.dtype]]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.num_bytes, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        # As bytes: numpy has no bfloat16.
        data = rotate_rows(value_of(tensor), tensor.num_heads).contiguous()
        writer.write_tensor_data(data.view(-1).view(torch.uint8).numpy())
    writer.close()


class GgufContent:
    """A GGUF file for reading: what its keys say, and its tensors; values are mapped, not loaded."""

    def __init__(self, path: Path):
        self._reader = import_gguf().GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.fields: dict[str, Any] = {key: field.contents() for key, field in self._reader.fields.items()}
        self.names = list(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the file."""
        kind = self._tensors[name].tensor_type.name
        return next(dtype for dtype, known in DTYPES.items() if known == kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as PyTorch has it."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str, num_heads: int = 0) -> torch.Tensor:
        """Read one tensor, its rows as PyTorch has them; `num_heads` as for `restore_rows`."""
        raw = torch.frombuffer(bytearray(self._tensors[name].data.tobytes()), dtype=torch.uint8)
        return restore_rows(raw.view(self.dtype(name)).view(self.shape(name)), num_heads)
