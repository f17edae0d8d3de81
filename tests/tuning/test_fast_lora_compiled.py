"""LoRA's arithmetic written out under torch.compile, layer by layer: no break in its graph, the same numbers."""

import re

import pytest
import torch
from peft import PeftModel

from llava_ft.tuning.kernels.lora_linear import LoraProduct
from llava_ft.tuning.quant import Quantization
from tests.models.test_last_layer import joined, padded
from tests.tuning import test_fast_lora_4bit
from tests.tuning.test_fast_lora import LAYOUT, largest_difference, loss_and_gradients, make

pytestmark = pytest.mark.usefixtures("in_recordings", "fresh_compiler")


def compiled(model: PeftModel) -> PeftModel:
    """The model with each decoder layer compiled."""
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    return model


def breaks() -> set[str]:
    """Names of the functions that were left out of a graph, one by one."""
    reasons = torch._dynamo.utils.counters["graph_break"]
    return {name for reason in reasons for name in re.findall(r"Skip calling function `<function (\w+)", reason)} | {
        reason for reason in reasons if "Skip calling function" not in reason
    }


def make_any(bits: int, dtype: torch.dtype) -> PeftModel:
    if bits == 16:
        return make(fast=True, dtype=dtype)
    return test_fast_lora_4bit.make(Quantization(4), fast=True, dtype=dtype)


@pytest.mark.parametrize(("bits", "batch"), [(16, padded), (4, padded), (4, joined)])
def test_loss_and_gradients_are_those_without(bits, batch):
    """Looking for the weights is left out of graphs, and by itself attention of joined samples; nothing else is."""
    expected = loss_and_gradients(make_any(bits, torch.float32), batch())
    torch._dynamo.utils.counters.clear()
    actual = loss_and_gradients(compiled(make_any(bits, torch.float32)), batch())
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert largest_difference(actual[1], expected[1]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert breaks() <= {"_weights_of", "_run"}


def test_in_bfloat16_it_is_no_further_from_float32_than_without():
    _, exact = loss_and_gradients(make(fast=False, dtype=torch.bfloat16).float(), joined())
    models = [make(fast=True, dtype=torch.bfloat16) for _ in range(2)]
    compiled(models[0])
    errors = [
        test_fast_lora_4bit.difference(loss_and_gradients(model, joined(), autocast=True)[1], exact) for model in models
    ]
    assert errors[0] < 1.2 * errors[1]


def test_checkpointing_around_a_compiled_layer_changes_nothing():
    expected = loss_and_gradients(make(fast=True), joined())
    model = compiled(make(fast=True))
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = loss_and_gradients(model, joined())
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert largest_difference(actual[1], expected[1]) < 1e-5


def test_gradients_are_those_of_the_dropout_that_was_drawn():
    torch.manual_seed(0)
    x, residual, weight, down, up = (
        torch.randn(shape, dtype=torch.float64) for shape in ((5, 6), (5, 7), (7, 6), (2, 6), (7, 2))
    )
    product = torch.compile(LoraProduct.apply, backend="aot_eager", fullgraph=True)

    def seeded(*inputs):
        torch.manual_seed(1)
        return product(inputs[0], inputs[1], 0.4, LAYOUT, weight, inputs[2], inputs[3])

    trained = [tensor.requires_grad_() for tensor in (x, residual, down, up)]
    assert not torch.equal(seeded(*trained), product(x, residual, 0.0, LAYOUT, weight, down, up))
    assert torch.autograd.gradcheck(seeded, trained)
