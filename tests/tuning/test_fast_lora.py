"""LoRA's arithmetic written out equals PEFT's, and steps aside where it does not apply."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_ft.tuning.kernels import lora_layer
from llava_ft.tuning.kernels.lora_layer import LoraDecoderLayer, use_fast_layers
from llava_ft.tuning.kernels.lora_linear import LoraProduct
from llava_ft.tuning.lora import add_lora, target_pattern, wrap_with_peft
from llava_ft.tuning.quant import Quantization
from tests.models.test_forward import load
from tests.models.test_last_layer import joined, padded, samples

pytestmark = pytest.mark.usefixtures("in_recordings")
LAYOUT = ((0.5, None),)
LEAVES = {"all": None, "q and v": ["q_proj", "v_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}


def make(
    *, fast: bool, kernel: str = "sdpa", dropout: float = 0.0, leaves: str = "all", dtype=torch.float32
) -> PeftModel:
    base = load("ckpt/llava15-tiny", kernel).to(dtype)
    model = add_lora(base, r=4, alpha=8, dropout=dropout, leaf_names=LEAVES[leaves], fast=fast)
    fill(model)
    return model.train()


def fill(model: nn.Module) -> None:
    """Give every adapter values, and train adapters and embeddings: the first layer's input needs a gradient too."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "embed_tokens" in name)
        if "lora_" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def loss_and_gradients(model: nn.Module, batch: dict, autocast: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(actual: dict, expected: dict) -> float:
    assert actual.keys() == expected.keys()
    return max(((actual[name] - value).norm() / value.norm()).item() for name, value in expected.items())


def count_calls(monkeypatch) -> list[str]:
    """Notes each layer that computes the fast way."""
    calls, original = [], lora_layer.NormProject.apply
    monkeypatch.setattr(lora_layer.NormProject, "apply", lambda *args: calls.append("fast") or original(*args))
    return calls


@pytest.mark.parametrize("leaves", list(LEAVES))
@pytest.mark.parametrize("batch", [padded, joined])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_loss_and_gradients_are_peft_s(monkeypatch, kernel, batch, leaves):
    calls = count_calls(monkeypatch)
    loss, gradients = loss_and_gradients(make(fast=True, kernel=kernel, leaves=leaves), batch())
    assert calls
    calls.clear()
    plain_loss, plain = loss_and_gradients(make(fast=False, kernel=kernel, leaves=leaves), batch())
    assert not calls
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert largest_difference(gradients, plain) < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16_it_is_no_further_from_float32_than_peft(autocast):
    """Frozen weights in bfloat16; adapters in float32 under autocast, as without DeepSpeed, or in bfloat16, as with."""
    _, exact = loss_and_gradients(make(fast=False, dtype=torch.bfloat16).float(), joined())
    errors = []
    for fast in (True, False):
        model = make(fast=fast, dtype=torch.bfloat16)
        if not autocast:
            model = model.to(torch.bfloat16)
        _, gradients = loss_and_gradients(model, joined(), autocast)
        assert all(gradients[name].dtype == p.dtype for name, p in model.named_parameters() if name in gradients)
        squares = [(gradients[name].float() - value).square().sum() for name, value in exact.items()]
        errors.append(sum(squares).item() ** 0.5)
    size = sum(value.square().sum() for value in exact.values()).item() ** 0.5
    assert errors[0] < 1.2 * errors[1]
    assert errors[0] < 0.05 * size


@pytest.mark.parametrize("fast", [True, False])
def test_gradients_under_checkpointing_are_those_without(fast):
    expected = loss_and_gradients(make(fast=fast), joined())
    model = make(fast=fast)
    model.base_model.model._set_gradient_checkpointing(enable=True)
    actual = loss_and_gradients(model, joined())
    assert actual[0] == expected[0]
    assert all(torch.equal(actual[1][name], value) for name, value in expected[1].items())


def test_a_frozen_input_gets_no_gradient_and_adapters_the_same_ones():
    gradients = []
    for fast in (True, False):
        model = make(fast=fast)
        model.get_input_embeddings().requires_grad_(False)
        gradients.append(loss_and_gradients(model, padded())[1])
    assert largest_difference(*gradients) < 1e-5


class TestDropout:
    def test_gradients_are_those_of_the_mask_that_was_drawn(self):
        torch.manual_seed(0)
        x, residual, weight, down, up = (
            torch.randn(shape, dtype=torch.float64) for shape in ((5, 6), (5, 7), (7, 6), (2, 6), (7, 2))
        )

        def product(*inputs):
            torch.manual_seed(1)
            return LoraProduct.apply(inputs[0], inputs[1], 0.4, LAYOUT, weight, inputs[2], inputs[3])

        trained = [tensor.requires_grad_() for tensor in (x, residual, down, up)]
        assert torch.autograd.gradcheck(product, trained)

    def test_the_mean_is_the_product_without(self):
        torch.manual_seed(0)
        x, weight, down, up = (torch.randn(shape) for shape in ((3, 8), (4, 8), (2, 8), (4, 2)))
        drawn = torch.stack([LoraProduct.apply(x, None, 0.3, LAYOUT, weight, down, up) for _ in range(4000)])
        expected = x @ weight.T + 0.5 * x @ down.T @ up.T
        deviation = drawn.std(dim=0) / len(drawn) ** 0.5
        assert ((drawn.mean(dim=0) - expected).abs() < 5 * deviation + 1e-5).all()
        assert drawn.std(dim=0).min() > 0.01

    def test_variance_is_peft_s(self):
        """Each linear layer draws a mask of its own, as in PEFT: the spread of the loss is the same."""
        spreads = []
        for fast in (True, False):
            model = make(fast=fast, dropout=0.5)
            torch.manual_seed(2)
            with torch.no_grad():
                losses = torch.stack([model(**joined()).loss for _ in range(150)])
            spreads.append(losses.std().item())
        assert spreads[0] == pytest.approx(spreads[1], rel=0.35)

    def test_evaluation_drops_nothing(self):
        with torch.no_grad():
            fast, plain = (make(fast=fast, dropout=0.5).eval()(**joined()).loss.item() for fast in (True, False))
        assert fast == pytest.approx(plain, rel=1e-6)


class TestWhatPeftOffersStays:
    def test_disabled_adapters_change_nothing(self):
        model = make(fast=True).eval()
        batch = joined()
        del batch["labels"]
        base = load("ckpt/llava15-tiny", "sdpa")(**batch).logits
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, base, atol=1e-5, rtol=0)

    def test_merged_weights_answer_as_the_adapter(self):
        model = make(fast=True).eval()
        batch = joined()
        del batch["labels"]
        with torch.no_grad():
            before = model(**batch).logits
            merged = model.merge_and_unload()
            torch.testing.assert_close(merged(**batch).logits, before, atol=1e-4, rtol=0)

    def test_it_generates_as_peft_does(self):
        ids = samples()[0][0][None]
        fast, plain = (
            make(fast=fast).eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False) for fast in (1, 0)
        )
        assert torch.equal(fast, plain)

    def test_names_and_parameters_are_peft_s(self):
        fast, plain = (dict(make(fast=fast).named_parameters()) for fast in (True, False))
        assert list(fast) == list(plain)
        assert all(torch.equal(value, plain[name]) for name, value in fast.items())

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ("dora", "q_proj has a variant of LoRA such as DoRA"),
            ("two adapters", "q_proj has 2 active adapters"),
            ("bias", "q_proj has a bias"),
            ("trained norm", "its norms are trained"),
            ("trained base", "o_proj has a base weight that is trained"),
        ],
    )
    def test_what_is_not_plain_lora_runs_in_its_own_modules_and_is_logged_once(
        self, monkeypatch, caplog, change, reason
    ):
        calls = count_calls(monkeypatch)
        base = load("ckpt/llava15-tiny", "sdpa")
        config = LoraConfig(
            r=4, target_modules=target_pattern(base), use_dora=change == "dora", lora_bias=change == "bias"
        )
        if change == "bias":
            config.lora_bias = False
            for layer in base.model.layers:
                layer.self_attn.q_proj.bias = nn.Parameter(torch.randn(layer.self_attn.q_proj.out_features))
        model = wrap_with_peft(base, config)
        if change == "two adapters":
            model.add_adapter("second", copy.deepcopy(config))
            model.base_model.set_adapter(["default", "second"])
        fill(model)
        for name, parameter in model.named_parameters():
            is_norm, is_base = name.endswith("layernorm.weight"), name.endswith("o_proj.base_layer.weight")
            if (change == "trained norm" and is_norm) or (change == "trained base" and is_base):
                parameter.requires_grad_(True)
        model.train()
        plain_loss, plain = loss_and_gradients(model, joined())
        assert use_fast_layers(model) == len(base.model.layers)
        with caplog.at_level(logging.WARNING, "llava_ft"):
            loss, gradients = loss_and_gradients(model, joined())
            loss_and_gradients(model, joined())
        assert not calls
        [message] = [record.getMessage() for record in caplog.records]
        assert "2 of 2 decoder layers (0-1) are computed by PEFT's modules" in message
        assert reason in message
        assert loss == pytest.approx(plain_loss, rel=1e-6)
        assert largest_difference(gradients, plain) < 1e-5


class _ReferenceOfFusedNorm(TorchDispatchMode):
    """Runs torch's fused gradient of RMSNorm, which has no kernel on a CPU, as torch itself writes it out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._fused_rms_norm_backward.default:
            func = torch._decomp.decomposition_table[func]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_fused_norms_give_the_same(monkeypatch, dtype):
    """What a GPU runs in place of the norms written out here."""
    expected = loss_and_gradients(make(fast=True, dtype=dtype).to(dtype), joined())
    monkeypatch.setattr(lora_layer, "_has_fused_norm", lambda device: True)
    with _ReferenceOfFusedNorm():
        actual = loss_and_gradients(make(fast=True, dtype=dtype).to(dtype), joined())
    is_exact = dtype == torch.float32
    assert actual[0] == pytest.approx(expected[0], rel=1e-6 if is_exact else 2**-8)  # a bit of bfloat16
    assert largest_difference(actual[1], expected[1]) < (1e-5 if is_exact else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 4])
def test_on_a_gpu_it_is_no_further_from_float32_than_peft(bits):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if bits == 4:
        from tests.tuning.test_fast_lora_4bit import exact_gradients
        from tests.tuning.test_fast_lora_4bit import make as make_4bit

        quantization = Quantization(4)
        exact = exact_gradients(quantization, joined(), torch.float64)
        models = [make_4bit(quantization, fast=fast, dtype=torch.bfloat16).cuda() for fast in (True, False)]
    else:
        exact = loss_and_gradients(make(fast=False, dtype=torch.bfloat16).double(), joined())[1]
        models = [make(fast=fast, dtype=torch.bfloat16).cuda() for fast in (True, False)]
    errors = []
    for model in models:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**{name: tensor.cuda() for name, tensor in joined().items()}).loss
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        errors.append(sum((gradients[name] - value).square().sum().item() for name, value in exact.items()) ** 0.5)
    assert errors[0] < 1.2 * errors[1]


def bytes_kept(model: PeftModel, length: int) -> int:
    """What the first layer keeps for the backward pass of a row, beside its weights."""
    native = model.get_base_model()
    layer, sizes = native.model.layers[0], {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
    hidden = torch.randn(1, length, native.config.hidden_size, requires_grad=True)
    angles = native.model.rotary_emb(hidden, torch.arange(length)[None])

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, position_embeddings=angles, attention_mask=None).sum()
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def test_a_layer_keeps_two_thirds_of_what_peft_s_does():
    assert bytes_kept(make(fast=True), 64) < 0.67 * bytes_kept(make(fast=False), 64)


def test_every_decoder_layer_is_swapped():
    model = make(fast=True)
    assert all(type(layer) is LoraDecoderLayer for layer in model.get_base_model().model.layers)
