"""Tensors of the two GGUF files: their names, types and order, and LLaMA's rotary layout.

llama.cpp reads a LLaVA as a language model of architecture `llama` and a file of architecture `clip` that holds the
vision tower and the projector. Both names and types are those that its own converter gives:

- matrices in the type that was asked for; vectors, norms and position embeddings in float32; the patch embedding,
  which is a convolution, in float16 or float32 alone;
- rows of the query and key projections of the language model in another order. transformers rotates a head's first
  half against its second (`0 1 2 .. | n/2 n/2+1 ..`), llama.cpp neighbours (`0 n/2 1 n/2+1 ..`).

Layers of the tower behind the one whose features LLaVA reads are left out, and so is the tower's last norm.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

from llava_ft.checkpoint.names import IMAGE_NEWLINE, VISION_PREFIX
from llava_ft.errors import CheckpointError
from llava_ft.models.config import LlavaLlamaConfig, hidden_state_index

File = Literal["language", "vision"]
"""`language` is the language model's file, `vision` the one with tower and projector (llama.cpp's "mmproj")."""

DTYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types that matrices may have, with GGUF's names for them."""

_LAYER: Final = r"(\d+)\."
_LANGUAGE: Final = {
    r"model\.embed_tokens\.": "token_embd.",
    r"model\.norm\.": "output_norm.",
    r"lm_head\.": "output.",
    rf"model\.layers\.{_LAYER}input_layernorm\.": r"blk.\1.attn_norm.",
    rf"model\.layers\.{_LAYER}post_attention_layernorm\.": r"blk.\1.ffn_norm.",
    rf"model\.layers\.{_LAYER}self_attn\.([qkv])_proj\.": r"blk.\1.attn_\2.",
    rf"model\.layers\.{_LAYER}self_attn\.o_proj\.": r"blk.\1.attn_output.",
    rf"model\.layers\.{_LAYER}mlp\.(gate|up|down)_proj\.": r"blk.\1.ffn_\2.",
}
_TOWER: Final = re.escape(VISION_PREFIX)
_VISION: Final = {
    rf"{_TOWER}embeddings\.class_embedding$": "v.class_embd",
    rf"{_TOWER}embeddings\.patch_embedding\.": "v.patch_embd.",
    rf"{_TOWER}embeddings\.position_embedding\.": "v.position_embd.",
    rf"{_TOWER}pre_layrnorm\.": "v.pre_ln.",
    rf"{_TOWER}encoder\.layers\.{_LAYER}layer_norm([12])\.": r"v.blk.\1.ln\2.",
    rf"{_TOWER}encoder\.layers\.{_LAYER}self_attn\.([qkv])_proj\.": r"v.blk.\1.attn_\2.",
    rf"{_TOWER}encoder\.layers\.{_LAYER}self_attn\.out_proj\.": r"v.blk.\1.attn_out.",
    rf"{_TOWER}encoder\.layers\.{_LAYER}mlp\.fc1\.": r"v.blk.\1.ffn_up.",
    rf"{_TOWER}encoder\.layers\.{_LAYER}mlp\.fc2\.": r"v.blk.\1.ffn_down.",
    r"model\.mm_projector\.([02])\.": r"mm.\1.",
    re.escape(IMAGE_NEWLINE) + "$": "v.image_newline",
}
_FILES: Final[dict[File, dict[re.Pattern[str], str]]] = {
    "language": {re.compile(pattern): name for pattern, name in _LANGUAGE.items()},
    "vision": {re.compile(pattern): name for pattern, name in _VISION.items()},
}
_UNUSED: Final = re.compile(rf"{_TOWER}post_layernorm\.")
_TOWER_LAYER: Final = re.compile(rf"{_TOWER}encoder\.layers\.{_LAYER}")
_ALWAYS_FLOAT32: Final = ("v.position_embd.weight",)
_CONVOLUTION: Final = "v.patch_embd.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        file: The file it belongs to.
        name: Its name there.
        native: Its native LLaVA name.
        shape: Its shape as PyTorch has it; GGUF lists the same numbers the other way round.
        dtype: Its type in the file.
        num_heads: For query and key projections: number of heads whose rows change places; 0 for all others.
    """

    file: File
    name: str
    native: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_heads: int = 0

    @property
    def num_bytes(self) -> int:
        """Size of its data in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def gguf_name(native: str) -> tuple[File, str] | None:
    """Return the file and the name there of a tensor given by its native name, or None for what llama.cpp has not."""
    for file, table in _FILES.items():
        for pattern, name in table.items():
            if pattern.match(native):
                return file, pattern.sub(name, native)
    return None


def plan_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: LlavaLlamaConfig, dtype: torch.dtype
) -> list[GgufTensor]:
    """Say where each tensor of a model goes, in the order of the files.

    Args:
        shapes: Shape of each tensor by native name, the vision tower's included.
        config: The model's configuration.
        dtype: Type of the matrices, one of `DTYPES`.

    Raises:
        CheckpointError: llama.cpp has no place for a tensor.
    """
    plan: list[GgufTensor] = []
    unknown: list[str] = []
    for native, shape in shapes.items():
        if _is_unused(native, config):
            continue
        found = gguf_name(native)
        if found is None:
            unknown.append(native)
            continue
        file, name = found
        heads = _num_rotated_heads(native, config)
        plan.append(GgufTensor(file, name, native, tuple(shape), _stored_dtype(name, shape, dtype), heads))
    if unknown:
        raise CheckpointError(
            f"A GGUF file has no place for {len(unknown)} tensors of this model, such as {unknown[0]}. What can be "
            "exported is a LLaMA with a CLIP tower and an mlp2x_gelu projector; export with --format llava instead."
        )
    return sorted(plan, key=_file_order)


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


def num_tower_layers(config: LlavaLlamaConfig) -> int:
    """Layers of the vision tower in front of the features that LLaVA reads: the ones that are exported."""
    vision = config.vision_config
    assert vision is not None
    return hidden_state_index(config.mm_vision_select_layer, vision.num_hidden_layers)


def file_tensors(plan: Iterable[GgufTensor], file: File) -> list[GgufTensor]:
    """Those tensors of a plan that belong to one file."""
    return [tensor for tensor in plan if tensor.file == file]


def _is_unused(native: str, config: LlavaLlamaConfig) -> bool:
    layer = _TOWER_LAYER.match(native)
    if layer is not None:
        return int(layer[1]) >= num_tower_layers(config)
    return _UNUSED.match(native) is not None


def _num_rotated_heads(native: str, config: LlavaLlamaConfig) -> int:
    if native.startswith(VISION_PREFIX) or ".self_attn." not in native:
        return 0
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(native.split(".")[-2]) or 0


def _stored_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    if len(shape) < 2 or name in _ALWAYS_FLOAT32:
        return torch.float32
    if name == _CONVOLUTION and dtype == torch.bfloat16:
        return torch.float32
    return dtype


def _file_order(tensor: GgufTensor) -> tuple[str, int, str]:
    """Language model first; in each file what stands outside the layers, then layer by layer."""
    layer = re.search(r"blk\.(\d+)\.", tensor.name)
    return tensor.file, int(layer[1]) if layer else -1, tensor.name
