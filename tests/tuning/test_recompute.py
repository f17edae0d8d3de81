"""Recomputation changes neither loss nor gradients, and keeps and computes what it says."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_ft.checkpoint.model import find_model, load_base
from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.models.parts import part_of
from llava_ft.planning.tracker import MemoryTracker
from llava_ft.tuning import recompute
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.quant import Quantization
from llava_ft.tuning.recompute import Recomputation, recompute_activations

pytestmark = pytest.mark.usefixtures("in_recordings")

ROWS, LENGTH, WIDTH = 2, 40, 64
METHODS = ["full", "lora", "PEFT's lora", "projector", "tower", "nf4", "nf4, PEFT's", "int8"]
RECOMPUTATIONS = [
    Recomputation("full"),
    Recomputation("full", every=2),
    Recomputation("full", offload=True),
    Recomputation("selective"),
    Recomputation("selective", every=2),
]


def make(method: str, *, kernel: str = "sdpa", dropout: float = 0.2, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small LLaVA in training; what is trained besides the projector depends on the method."""
    quantization = {"nf4": Quantization(4), "nf4, PEFT's": Quantization(4), "int8": Quantization(8)}.get(method)
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    model, _ = load_base(
        find_model("ckpt/llava15-tiny"),
        dtype_of=lambda name: dtype,
        attn_implementation=kernel,
        quantization=quantization,
    )
    result: nn.Module = model
    if method in ("lora", "PEFT's lora") or quantization is not None:
        result = add_lora(model, r=4, alpha=8, dropout=dropout, fast=method in ("lora", "nf4"))
    trained = {"full": ("language model", "embeddings", "head"), "tower": ("vision tower",)}.get(method, ())
    for name, parameter in result.named_parameters():
        part = part_of(name)
        if part == "LoRA":
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if parameter.is_floating_point():
            parameter.requires_grad_(part in ("LoRA", "projector", *trained))
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return result.train()


def make_batch(model: nn.Module) -> dict[str, Any]:
    """Two rows of different lengths, each with an image."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (ROWS, LENGTH), generator=generator)
    geometry = config.image_geometry
    ids[:, 1 : 1 + geometry.tokens_per_tile] = IMAGE_TOKEN_INDEX
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -8:-4] = ids[:, -8:-4]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -3:] = False
    pixels = torch.randn(ROWS, 3, geometry.input_size, geometry.input_size, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def step(model: nn.Module, autocast: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, with the same random numbers each time."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**make_batch(model)).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]):
    assert actual[0] == expected[0]
    assert expected[1].keys() == actual[1].keys()
    assert expected[1]
    assert [name for name, value in expected[1].items() if not torch.equal(actual[1][name], value)] == []


@contextlib.contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _of_product}) as counter:
        yield counter


def _of_product(shape, first, second, *args, **kwargs) -> int:
    return 2 * first[0] * first[1] * second[1]


def flops(model: nn.Module) -> int:
    with counted_flops() as counter:
        step(model)
    return counter.get_total_flops()


def kept(model: nn.Module) -> int:
    """Bytes that wait for the backward pass."""
    with MemoryTracker() as tracker:
        tracker.ignore([*model.parameters(), *model.buffers()])
        loss = model(**make_batch(model)).loss
        assert loss.requires_grad
        return tracker.now


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_bit_for_bit_those_without(method):
    expected = step(make(method))
    for recomputation in RECOMPUTATIONS:
        model = make(method)
        assert recompute_activations(model, recomputation) > 0
        assert_equal(step(model), expected)


@pytest.mark.parametrize("recomputation", [Recomputation("full"), Recomputation("selective")], ids=str)
@pytest.mark.parametrize("method", ["lora", "PEFT's lora", "full"])
def test_the_same_holds_for_eager_attention_and_under_autocast(method, recomputation):
    for options in ({"kernel": "eager"}, {"dtype": torch.bfloat16}):
        autocast = "dtype" in options
        expected = step(make(method, **options), autocast)
        model = make(method, **options)
        recompute_activations(model, recomputation)
        assert_equal(step(model, autocast), expected)


class TestWhatIsComputedAgain:
    def test_full_computes_layers_again(self):
        model = make("projector")
        plain = flops(make("projector"))
        recompute_activations(model, Recomputation("full"))
        decoder = sum(
            2 * p.numel() * ROWS * LENGTH
            for n, p in model.named_parameters()
            if "layers" in n and "vision" not in n and p.dim() == 2
        )
        assert flops(model) - plain > 0.5 * decoder  # what follows the last attention runs at supervised positions

    @pytest.mark.parametrize("method", ["full", "projector", "lora", "tower"])
    def test_selective_computes_no_product_again(self, method):
        model = make(method)
        recompute_activations(model, Recomputation("selective"))
        assert flops(model) == flops(make(method))

    def test_selective_computes_low_rank_products_again(self):
        model = make("PEFT's lora")
        recompute_activations(model, Recomputation("selective"))
        again = flops(model) - flops(make("PEFT's lora"))
        up = [p.numel() for name, p in model.named_parameters() if "lora_B" in name]
        assert 0 < again <= sum(2 * count * ROWS * LENGTH for count in up)

    def test_eager_attention_s_scores_are_computed_again(self):
        wide = torch.empty(1, 100, 4), torch.empty(1, 4, 100)
        narrow = torch.empty(1, 100, 100), torch.empty(1, 100, 4)
        bmm = torch.ops.aten.bmm.default
        assert recompute._choose(None, bmm, *wide) == recompute.CheckpointPolicy.PREFER_RECOMPUTE
        assert recompute._choose(None, bmm, *narrow) == recompute.CheckpointPolicy.MUST_SAVE

    @pytest.mark.parametrize("name", sorted(recompute._ATTENTION | recompute._QUANTIZED_PRODUCTS))
    def test_operations_go_by_names_that_libraries_have(self, name):
        """flash-attn needs a GPU to be built; the names of its operations are those of its versions 2 and 3."""
        namespace, _, operation = name.rpartition("::")
        if namespace == "bitsandbytes":
            pytest.importorskip("bitsandbytes")
        if namespace == "torch_attn":
            importlib.import_module("torch.nn.attention.varlen")
        if namespace == "":
            importlib.import_module("torch._higher_order_ops.wrap")
            found: Any = torch.ops.higher_order
        else:
            found = getattr(torch.ops, namespace)
        assert namespace.startswith("flash_attn") or hasattr(found, operation)


class TestMemory:
    @pytest.mark.parametrize("method", ["full", "projector", "PEFT's lora"])
    def test_less_is_kept_in_this_order(self, method):
        sizes = []
        for recomputation in (Recomputation(), Recomputation("selective"), Recomputation("full")):
            model = make(method, dropout=0.0)
            recompute_activations(model, recomputation)
            sizes.append(kept(model))
        assert sizes[0] > sizes[1] > sizes[2]

    def test_layers_that_keep_little_themselves_are_not_wrapped_again(self, monkeypatch):
        plain = kept(make("lora"))
        model = make("lora")
        recompute_activations(model, Recomputation("selective"))
        monkeypatch.setattr(recompute, "checkpoint", lambda *args, **kwargs: pytest.fail("wrapped"))
        assert kept(model) == plain

    def test_where_peft_s_modules_run_such_layers_are_wrapped(self, monkeypatch):
        model = make("lora")
        recompute_activations(model, Recomputation("selective"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
        calls, original = [], recompute.checkpoint
        monkeypatch.setattr(recompute, "checkpoint", lambda *a, **k: calls.append("wrapped") or original(*a, **k))
        step(model)
        assert len(calls) == 2


class TestInputsElsewhere:
    def test_are_those_of_the_layers_alone(self):
        packed, unpacked = [], []

        def offloading():
            hooks = (lambda tensor: packed.append(tensor.shape) or tensor, lambda tensor: unpacked.append(1) or tensor)
            return torch.autograd.graph.saved_tensors_hooks(*hooks)

        model = make("full")
        recompute_activations(model, Recomputation("full", offload=True), offloading=offloading)
        step(model)
        assert packed == [(ROWS, LENGTH, WIDTH)] * 2
        assert len(unpacked) == 2

    def test_torch_s_copy_is_the_default_pinned_where_there_is_a_gpu(self, monkeypatch):
        made = []
        monkeypatch.setattr(
            recompute, "save_on_cpu", lambda **options: made.append(options) or contextlib.nullcontext()
        )
        for has_gpu in (True, False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
            model = make("full")
            recompute_activations(model, Recomputation("full", offload=True))
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            step(model)
        assert made == [{"pin_memory": True}] * 2 + [{"pin_memory": False}] * 2


class TestWhichLayers:
    def layers(self, model: nn.Module) -> list[str]:
        return [
            ("tower" if "vision" in name else "decoder") + name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        ]

    @pytest.mark.parametrize(
        ("method", "every", "expected"),
        [
            ("lora", 1, ["decoder0", "decoder1"]),
            ("projector", 2, ["decoder0"]),
            ("tower", 2, ["decoder0", "tower0"]),
            ("tower", 1, ["decoder0", "decoder1", "tower0", "tower1"]),
        ],
    )
    def test_every_nth_and_a_tower_only_if_it_is_trained(self, method, every, expected):
        model = make(method)
        count = recompute_activations(model, Recomputation("full", every))
        found = [name for name in self.layers(model) if name != "tower2"]
        assert found == expected
        assert count == len(self.layers(model))

    def test_none_leaves_the_model_alone(self):
        model = make("lora")
        assert recompute_activations(model, Recomputation()) == 0
        assert self.layers(model) == []

    def test_nothing_is_recomputed_in_evaluation(self, monkeypatch):
        model = make("full").eval()
        recompute_activations(model, Recomputation("full"))
        monkeypatch.setattr(recompute, "checkpoint", lambda *args, **kwargs: pytest.fail("recomputes"))
        step(model)
        with pytest.raises(pytest.fail.Exception, match="recomputes"):
            step(model.train())

    def test_the_embeddings_are_not_made_to_need_a_gradient(self):
        model = make("lora")
        recompute_activations(model, Recomputation("full"))
        batch = make_batch(model)
        assert not model.get_input_embeddings()(batch["input_ids"].clamp(min=0)).requires_grad


@pytest.mark.parametrize(("dropout", "expected"), [(0.2, True), (0.0, False)])
def test_random_numbers_are_kept_where_some_are_drawn(monkeypatch, dropout, expected):
    seen = []

    def checkpoint(function, *args, **options):
        seen.append(options)
        return function(*args)

    monkeypatch.setattr(recompute, "checkpoint", checkpoint)
    model = make("PEFT's lora", dropout=dropout)
    recompute_activations(model, Recomputation("full"), options={"determinism_check": "none", "use_reentrant": True})
    step(model)
    wanted = {"preserve_rng_state": expected, "determinism_check": "none", "use_reentrant": False}
    assert seen == [wanted] * 2


class _ChangesItsProduct(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.linear(x).mul_(2.0)))


def test_a_product_that_was_changed_in_place_is_an_error_and_not_a_wrong_gradient():
    model = nn.Module()
    model.layers = nn.ModuleList([_ChangesItsProduct()])
    model.train()
    recompute_activations(model, Recomputation("selective"))
    result = model.layers[0](torch.randn(3, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match="has been mutated"):
        result.sum().backward()


def test_words_and_flags():
    recomputation = Recomputation("full", 4, offload=True)
    assert str(recomputation) == "full gradient checkpointing of every 4th layer, inputs in host memory"
    assert recomputation.flags == (
        "--gradient_checkpointing full --gradient_checkpointing_every 4 --activation_offload True"
    )
    assert str(Recomputation()) == "no gradient checkpointing"
    assert str(Recomputation("selective", 2)) == "selective gradient checkpointing of every 2nd layer"
