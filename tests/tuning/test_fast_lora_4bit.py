"""LoRA's arithmetic written out, on frozen weights in 4 bits, equals PEFT's with bitsandbytes' layers."""

import logging
import weakref

import pytest
import torch
from peft import PeftModel

from llava_ft.tuning.kernels.lora_layer import LoraDecoderLayer
from llava_ft.tuning.kernels.lora_weights import Packing, weights_of
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.quant import Quantization
from tests.models.test_last_layer import joined, padded
from tests.tuning.test_fast_lora import bytes_kept, count_calls, fill, largest_difference, loss_and_gradients
from tests.tuning.test_quant import dequantized, load

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("in_recordings")
KINDS = [Quantization(4), Quantization(4, "nf4", False), Quantization(4, "fp4", True), Quantization(4, "fp4", False)]
kinds = pytest.mark.parametrize("quantization", KINDS, ids=str)


def make(quantization: Quantization | None, *, fast: bool, dtype=torch.float32, dropout: float = 0.0) -> PeftModel:
    model = add_lora(load(quantization, dtype), r=4, alpha=8, dropout=dropout, fast=fast)
    fill(model)
    return model.train()


def exact_gradients(quantization: Quantization, batch: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of the unpacked weights with PEFT's adapters in a dtype."""
    model = add_lora(dequantized(quantization), r=4, alpha=8, dropout=0.0, fast=False)
    fill(model)
    return loss_and_gradients(model.to(dtype).train(), batch)[1]


def difference(actual: dict, expected: dict) -> float:
    """Norm of the difference of all gradients, as a share of their norm."""
    assert actual.keys() == expected.keys()
    square = sum((actual[name].to(value.dtype) - value).square().sum() for name, value in expected.items())
    return (square / sum(value.square().sum() for value in expected.values())).sqrt().item()


@kinds
@pytest.mark.parametrize("batch", [padded, joined])
def test_loss_and_gradients_are_peft_s(monkeypatch, quantization, batch):
    calls = count_calls(monkeypatch)
    loss, gradients = loss_and_gradients(make(quantization, fast=True), batch())
    assert len(calls) == 2
    plain_loss, plain = loss_and_gradients(make(quantization, fast=False), batch())
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert largest_difference(gradients, plain) < 1e-5
    exact = exact_gradients(quantization, batch(), torch.float64)
    errors = [difference(found, exact) for found in (gradients, plain)]
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 2e-6


@kinds
def test_the_unpacked_weight_is_what_quantisation_made_of_it(quantization):
    packed, plain = load(quantization), dequantized(quantization)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        found = weights_of(packed.get_submodule(name))
        assert isinstance(found, tuple)
        assert isinstance(found[0].packing, Packing)
        expected = plain.get_submodule(name).weight
        assert torch.equal(found[0].frozen(torch.float32), expected)
        assert torch.equal(found[0].frozen(torch.bfloat16), expected.to(torch.bfloat16))


@kinds
def test_in_bfloat16_it_is_no_further_from_float32_than_peft(quantization):
    exact = exact_gradients(quantization, joined(), torch.float32)
    errors = []
    for fast in (True, False):
        _, gradients = loss_and_gradients(make(quantization, fast=fast, dtype=torch.bfloat16), joined(), autocast=True)
        errors.append(difference(gradients, exact))
    assert errors[0] < 1.2 * errors[1]
    assert errors[0] < 0.05


def test_evaluation_and_training_after_it_are_those_of_peft():
    models = [make(KINDS[0], fast=fast) for fast in (True, False)]
    with torch.no_grad():
        fast, plain = (model.eval()(**joined()).loss.item() for model in models)
    assert fast == pytest.approx(plain, rel=1e-6)
    for model in models:
        loss_and_gradients(model.train(), joined())
    fast, plain = ({n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models)
    assert difference(fast, plain) < 1e-6


def test_gradients_under_checkpointing_are_those_without():
    expected = loss_and_gradients(make(KINDS[0], fast=True), joined())
    model = make(KINDS[0], fast=True)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    actual = loss_and_gradients(model, joined())
    assert actual[0] == expected[0]
    assert all(torch.equal(actual[1][name], value) for name, value in expected[1].items())


def unpacked_sizes(monkeypatch, model: PeftModel) -> tuple[list[int], int]:
    """Sizes of the weights that a step unpacks, and how many of them were alive at once at most."""
    alive: weakref.WeakSet = weakref.WeakSet()
    sizes, most = [], 0
    original = type(weights_of(model.get_base_model().model.layers[0].mlp.up_proj)[0]).frozen

    def frozen(self, dtype):
        nonlocal most
        weight = original(self, dtype)
        alive.add(weight)
        sizes.append(weight.numel())
        most = max(most, len(alive))
        return weight

    monkeypatch.setattr("llava_ft.tuning.kernels.lora_weights.LoraWeights.frozen", frozen)
    loss_and_gradients(model, joined())
    return sizes, most


def test_each_weight_is_unpacked_once_forward_and_once_backward_and_one_at_a_time(monkeypatch):
    sizes, most = unpacked_sizes(monkeypatch, make(KINDS[0], fast=True))
    assert len(sizes) == 2 * 7 * 2
    assert most == 1


def test_a_layer_keeps_two_thirds_of_what_peft_s_does():
    assert bytes_kept(make(KINDS[0], fast=True), 256) < 0.67 * bytes_kept(make(KINDS[0], fast=False), 256)


def test_weights_in_8_bits_are_left_to_peft_and_the_log_says_so_once(monkeypatch, caplog):
    calls = count_calls(monkeypatch)
    model = make(Quantization(8), fast=True)
    assert all(type(layer) is LoraDecoderLayer for layer in model.get_base_model().model.layers)
    with caplog.at_level(logging.WARNING, "llava_ft"):
        for _ in range(2):
            loss_and_gradients(model, joined())
    assert not calls
    assert [record.getMessage() for record in caplog.records] == [
        "fast_lora: 2 of 2 decoder layers (0-1) are computed by PEFT's modules, with the same result, more slowly and "
        "with more memory: q_proj has weights in 8 bits."
    ]
