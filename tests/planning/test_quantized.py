"""Quantised layers take what bitsandbytes' take, at rest and in a step."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_ft.planning.quantized import replace_kernel, stored_bytes
from llava_ft.planning.tracker import MemoryTracker
from llava_ft.tuning.kernels.lora_linear import LoraProduct
from llava_ft.tuning.kernels.lora_weights import Flat, weights_of
from llava_ft.tuning.quant import Quantization, quantize_linears, set_quantized_weight, size_in_memory

pytest.importorskip("bitsandbytes")

EVERY = [Quantization(8), Quantization(4), Quantization(4, "fp4"), Quantization(4, "nf4", double_quant=False)]


class Decoder(nn.Module):
    """One linear layer under the name that those of the decoder have."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        layer = nn.Module()
        layer.proj = nn.Linear(in_features, out_features, bias=False, device="meta")
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([layer])


def quantized_layer(shape: tuple[int, int], quantization: Quantization) -> nn.Module:
    model = Decoder(shape[1], shape[0])
    quantize_linears(model, quantization, lambda _: torch.float32)
    return model.model.layers[0].proj


@pytest.mark.parametrize("quantization", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (96, 320), (1376, 512)])
def test_stored_bytes_are_those_of_the_layer(shape, quantization):
    layer = quantized_layer(shape, quantization)
    stored = set_quantized_weight(layer, torch.randn(shape))
    assert stored_bytes(*shape, quantization) == stored == size_in_memory(layer.weight)[1]


def peak_of_step(layer: nn.Module, x: torch.Tensor) -> int:
    with MemoryTracker() as tracker:
        tracker.ignore([layer.weight, x])
        layer(functools.reduce(torch.mul, [x, x])).square().sum().backward()
    return max(sum(peak.values()) for peak in tracker.peaks.values())


@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(4)], ids=str)
@pytest.mark.parametrize("positions", [8, 512])
def test_a_step_takes_what_the_layer_takes(quantization, positions):
    shape = (512, 384)
    layer = quantized_layer(shape, quantization)
    set_quantized_weight(layer, torch.randn(shape))
    real = peak_of_step(layer, torch.randn(2, positions, 384, requires_grad=True))
    planned = quantized_layer(shape, quantization)
    with FakeTensorMode():
        replace_kernel(planned, quantization, on_gpu=False)
        fake = peak_of_step(planned, torch.empty(2, positions, 384, requires_grad=True))
    assert fake == pytest.approx(real, rel=0.05)


def adapted_peak(layer: nn.Module, make: Callable[..., torch.Tensor]) -> int:
    """Peak of a step through the layer's weight and an adapter of rank 8, by the functions of `--fast_lora`."""
    found = weights_of(layer)
    assert isinstance(found, tuple)
    x, down, up = make(1, 512, 384), make(8, 384), make(512, 8)
    flat = Flat.of([found[0]._replace(down=down, up=up, scale=2.0)])
    with MemoryTracker() as tracker:
        tracker.ignore([layer.weight, x, down, up])
        LoraProduct.apply(x, None, 0.0, flat.layout, *flat.tensors).square().sum().backward()
    return max(sum(peak.values()) for peak in tracker.peaks.values())


@pytest.mark.parametrize("quantization", EVERY[1:], ids=str)
def test_an_adapted_layer_in_4_bits_takes_what_is_planned(quantization):
    shape = (512, 384)
    layer = quantized_layer(shape, quantization)
    set_quantized_weight(layer, torch.randn(shape))
    real = adapted_peak(layer, functools.partial(torch.randn, requires_grad=True))
    planned = quantized_layer(shape, quantization)
    with FakeTensorMode():
        replace_kernel(planned, quantization, on_gpu=False)
        fake = adapted_peak(planned, functools.partial(torch.empty, requires_grad=True))
    assert fake == pytest.approx(real, rel=0.01)
    assert fake > 4 * 512 * 384  # the weight, unpacked


def test_a_gpu_sums_8_bit_products_in_int32():
    layer = quantized_layer((256, 64), Quantization(8))
    with FakeTensorMode():
        replace_kernel(layer, Quantization(8), on_gpu=True)
        x = torch.empty(1, 1024, 64, dtype=torch.bfloat16, requires_grad=True)
        with MemoryTracker() as tracker:
            tracker.ignore([layer.weight, x])
            layer(x)
    assert sum(tracker.peaks["forward"].values()) >= 1024 * 256 * (4 + 2)
