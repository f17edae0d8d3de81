"""What quantised linear layers do with memory, for a step on fake tensors.

bitsandbytes' kernels need values, which a plan does not have. These stand in for its `MatMul4Bit`, `MatMul8bitLt` and
(on a CPU) `MatMul8bitFp`: they allocate what those do, in the same order, and compute nothing.

- 4 bits: the weight is dequantised into the compute dtype for the product and again in the backward pass; the input is
  not kept. Scales without values are there too: `kernels/lora_weights.py` has them dequantised by bitsandbytes' own
  operations, which run on fake tensors.
- 8 bits: the input is kept. On a GPU it is quantised and the product is summed in int32; the weight is dequantised in
  the backward pass alone. On a CPU it is dequantised in both.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llava_ft.tuning.quant import Quantization

_BLOCK = 64
_BLOCK_OF_SCALES = 256


def stored_bytes(out_features: int, in_features: int, quantization: Quantization) -> int:
    """Return the bytes of a quantised weight with its scales, as bitsandbytes holds it.

    4 bits: two values a byte, and a float32 scale for each block of 64; with double quantisation the scales are bytes
    themselves, with a float32 scale for each 256 of them and one offset. 8 bits: a byte a value and a float32 scale for
    each row.
    """
    num_values = out_features * in_features
    if quantization.bits == 8:
        return num_values + 4 * out_features
    blocks = math.ceil(num_values / _BLOCK)
    scales = blocks + 4 * math.ceil(blocks / _BLOCK_OF_SCALES) + 4 if quantization.double_quant else 4 * blocks
    return math.ceil(num_values / 2) + scales


def replace_kernel(layer: Any, quantization: Quantization, *, on_gpu: bool) -> None:
    """Make bitsandbytes' `Linear4bit` or `Linear8bitLt` run on fake tensors; its weight becomes one of packed size."""
    shape = (layer.out_features, layer.in_features)
    packed = torch.empty(stored_bytes(*shape, quantization), dtype=torch.uint8)
    layer._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
    if quantization.bits == 8:
        layer.forward = lambda x: _Product8bit.apply(x, shape, on_gpu)
        return
    dtype = layer.compute_dtype
    layer.quant_state = _empty_state(shape, quantization, dtype)
    layer.forward = lambda x: _Product4bit.apply(x.to(dtype), shape).to(x.dtype)


def _empty_state(shape: tuple[int, int], quantization: Quantization, dtype: torch.dtype) -> Any:
    """The scales of a weight in 4 bits, without values."""
    from bitsandbytes.functional import QuantState

    num_blocks = math.ceil(math.prod(shape) / _BLOCK)
    state: dict[str, Any] = {"shape": shape, "blocksize": _BLOCK, "quant_type": quantization.quant_type, "dtype": dtype}
    if not quantization.double_quant:
        return QuantState(absmax=torch.empty(num_blocks), **state)
    scales = QuantState(
        absmax=torch.empty(math.ceil(num_blocks / _BLOCK_OF_SCALES)),
        code=torch.empty(256),
        blocksize=_BLOCK_OF_SCALES,
        dtype=torch.float32,
    )
    return QuantState(absmax=torch.empty(num_blocks, dtype=torch.uint8), offset=torch.empty(()), state2=scales, **state)


class _Product4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None


class _Product8bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shape: tuple[int, int], on_gpu: bool) -> torch.Tensor:
        ctx.shape = shape
        ctx.kept = x
        if not on_gpu:
            return F.linear(x, x.new_empty(shape))
        quantized = torch.empty_like(x.to(torch.float16), dtype=torch.int8)
        sums = x.new_empty((*x.shape[:-1], shape[0]), dtype=torch.int32)
        del quantized
        return sums.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        weight = ctx.kept.new_empty(ctx.shape)
        return gradients[0].to(ctx.kept.dtype) @ weight, None, None
