"""The weights of linear layers with adapters, as the functions of `lora_layer.py` take them.

A frozen weight is one tensor, or packed in 4 bits (QLoRA, arXiv:2305.14314): then it is unpacked into the compute dtype
for each product and dropped after it, so that one at a time exists. The kernels are those of bitsandbytes.

A weight in 8 bits (LLM.int8(), arXiv:2208.07339) is not taken: its product rounds the input as well and treats columns
with outliers apart, so that it is not the product with a matrix that could be unpacked.

Shapes: I inputs, O outputs, R rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from llava_ft.tuning.quant import is_quantized

_PEFT_LINEARS = (PeftLinear.__name__, "Linear4bit")


class Packing(NamedTuple):
    """How a weight in 4 bits is packed."""

    shape: tuple[int, int]  # (O, I)
    quant_type: str  # nf4 or fp4
    blocksize: int  # values that share a scale
    scale_blocksize: int  # scales that share a scale of their own; 0 where scales are not quantised
    dtype: torch.dtype  # in which products with it are computed

    @property
    def num_tensors(self) -> int:
        """Tensors that hold the weight: values and scales; or values, scales, their scales, code and offset."""
        return 5 if self.scale_blocksize else 2


class LoraWeights(NamedTuple):
    """A frozen linear layer without bias and its adapter."""

    weight: tuple[torch.Tensor, ...]  # (O, I) alone, or the tensors that `packing` says
    down: torch.Tensor | None  # LoRA A, (R, I); None without an adapter
    up: torch.Tensor | None  # LoRA B, (O, R); None without an adapter
    scale: float  # factor of the adapter's part
    packing: Packing | None = None  # None where the weight is one tensor

    @property
    def rank(self) -> int:
        """R; 0 without an adapter."""
        return 0 if self.down is None else self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """In which products with the frozen weight are computed, outside autocast."""
        return self.weight[0].dtype if self.packing is None else self.packing.dtype

    def frozen(self, dtype: torch.dtype) -> torch.Tensor:
        """The frozen weight in a dtype, `(O, I)`."""
        if self.packing is None:
            return self.weight[0].to(dtype)
        shape, quant_type, blocksize, scale_blocksize, _ = self.packing
        values, scales = self.weight[:2]
        if scale_blocksize:
            scales_of_scales, code, offset = self.weight[2:]
            unpack_scales: Any = torch.ops.bitsandbytes.dequantize_blockwise.default
            scales = unpack_scales(scales, scales_of_scales, code, scale_blocksize, torch.float32) + offset
        unpack: Any = torch.ops.bitsandbytes.dequantize_4bit.default
        return unpack(values, scales, blocksize, quant_type, shape, dtype)


class Flat(NamedTuple):
    """Weights of several layers as the flat arguments of an autograd function."""

    tensors: tuple[torch.Tensor | None, ...]  # weight, A and B of each layer in turn; None where no adapter is
    layout: tuple[tuple[float, Packing | None], ...]  # scale of each layer, and how its weight is packed

    @classmethod
    def of(cls, layers: Sequence[LoraWeights]) -> "Flat":
        """Flatten."""
        tensors: list[torch.Tensor | None] = []
        for layer in layers:
            tensors += [*layer.weight, layer.down, layer.up]
        return cls(tuple(tensors), tuple((layer.scale, layer.packing) for layer in layers))

    def layers(self) -> list[LoraWeights]:
        """The layers again."""
        found: list[LoraWeights] = []
        start = 0
        for scale, packing in self.layout:
            end = start + (1 if packing is None else packing.num_tensors)
            weight: Any = self.tensors[start:end]
            found.append(LoraWeights(tuple(weight), self.tensors[end], self.tensors[end + 1], scale, packing))
            start = end + 2
        return found


def weights_of(module: nn.Module) -> tuple[LoraWeights, float] | str:
    """Find the weights of a linear layer with or without an adapter of PEFT's, and the dropout before the adapter.

    Returns:
        The weights, and the probability of dropout as the module's mode has it; or why the module is not a frozen
        linear layer with at most one plain adapter, in words that complete "the layer has ...".
    """
    is_adapted = isinstance(module, LoraLayer)
    base = module.get_base_layer() if is_adapted else module
    found = _frozen_weight(base)
    if isinstance(found, str):
        return found
    weight, packing = found
    if is_adapted and type(module).__name__ not in _PEFT_LINEARS:
        return f"an adapter of type {type(module).__name__}"
    names = [name for name in module.active_adapters if name in module.lora_A] if is_adapted else []
    if not is_adapted or module.disable_adapters or module.merged or not names:
        return LoraWeights(weight, None, None, 0.0, packing), 0.0
    if len(names) > 1:
        return f"{len(names)} active adapters"
    if module.lora_variant:
        return "a variant of LoRA such as DoRA"
    if any(module.lora_bias.values()):
        return "a bias in its adapter"
    [name] = names
    dropout = module.lora_dropout[name]
    if not isinstance(dropout, nn.Dropout | nn.Identity):
        return f"dropout of type {type(dropout).__name__}"
    probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    adapter: tuple[Any, Any] = module.lora_A[name], module.lora_B[name]
    return LoraWeights(weight, adapter[0].weight, adapter[1].weight, module.scaling[name], packing), probability


def _frozen_weight(base: Any) -> tuple[tuple[torch.Tensor, ...], Packing | None] | str:
    kind: str = type(base).__name__
    is_packed = kind == "Linear4bit"
    if type(base) is not nn.Linear and not is_packed:
        return "weights in 8 bits" if is_quantized(base) else f"a base of type {kind}"
    if base.bias is not None:
        return "a bias"
    if base.weight.requires_grad:
        return "a base weight that is trained"
    if not is_packed:
        return (base.weight,), None
    state: Any = getattr(base.weight, "quant_state", None) or base.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return "weights in 4 bits that are packed for inference"
    with torch._C.DisableTorchFunctionSubclass():  # a plain tensor, and not one of bitsandbytes' parameters
        values: torch.Tensor = base.weight.data
    tensors = [values, state.absmax]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return tuple(tensors), Packing(
        shape=(int(state.shape[0]), int(state.shape[1])),
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        scale_blocksize=state.state2.blocksize if state.nested else 0,
        dtype=getattr(base, "compute_dtype", None) or state.dtype,
    )
