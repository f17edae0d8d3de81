"""Layers compiled one by one compute the same, in few graphs, and leave no trace in what is saved."""

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_ft.args import parse_args
from llava_ft.constants import IGNORE_INDEX
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.training.compile import compile_layers
from llava_ft.training.data_setup import length_multiple
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.recompute import Recomputation, recompute_activations
from tests.models.test_forward import load
from tests.training.helpers import flags, prepare, state_of, train
from tests.tuning.test_fast_lora import fill, largest_difference, loss_and_gradients

pytestmark = pytest.mark.usefixtures("in_recordings", "fresh_compiler")
COMPILED = {"torch_compile": "True", "torch_compile_backend": "eager", "lora_dropout": "0"}


class Counting:
    """A backend that counts its graphs."""

    def __init__(self, name: str):
        self.count = 0
        self._backend: Callable[..., Any] = lookup_backend(name)

    def __call__(self, graph: Any, inputs: Sequence[Any], **kwargs: Any) -> Any:
        self.count += 1
        return self._backend(graph, inputs, **kwargs)


def make(method: str = "lora", num_layers: int = 4, checkpointing: str = "none") -> nn.Module:
    """A tiny model, its first layer repeated before the last one."""
    model: Any = load("ckpt/llava15-tiny", "sdpa")
    first, last = model.model.layers[0], model.model.layers[-1]
    layers = [*(copy.deepcopy(first) for _ in range(num_layers - 1)), last]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx, layer.self_attn.config = number, model.config
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = num_layers
    if method == "full":
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
    else:
        model = add_lora(model, r=4, alpha=8, dropout=0.0, fast=method == "lora")
        fill(model)
    recompute_activations(model, Recomputation(checkpointing))  # type: ignore[arg-type]
    return model.train()


def batch(lengths: Sequence[int], *, joined: bool) -> dict[str, Any]:
    """Samples of these lengths, joined to one row or padded on the right to the longest."""
    numbers = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(3, 500, (length,), generator=numbers) for length in lengths]
    labels = [torch.where(torch.arange(len(row)) % 3 == 1, row, IGNORE_INDEX) for row in ids]
    if joined:
        return {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "sample_lengths": list(lengths)}
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


def test_no_batch_of_another_length_needs_a_graph_of_its_own():
    """30 batches in 8 lengths: a graph for the first length and one for any, on both sides of attention."""
    compiled, plain, backend = make(), make(), Counting("aot_eager")
    assert compile_layers(compiled, backend=backend) == 4 + 2  # type: ignore[arg-type]
    numbers = random.Random(0)
    counts = []
    for number in range(30):
        samples = batch([16 * numbers.randint(1, 8), 16, 16], joined=False)
        actual = loss_and_gradients(compiled, samples)
        if number in (0, 1, 29):
            expected = loss_and_gradients(plain, samples)
            assert actual[0] == pytest.approx(expected[0], rel=1e-6)
            assert largest_difference(actual[1], expected[1]) < 1e-5
        counts.append(backend.count)
    kinds = 2  # all but the last layer, which reads chosen positions, share their graphs
    assert counts[0] == 2 * kinds
    assert counts[-1] <= 2 * counts[0]
    assert counts[-1] == counts[5]


@pytest.mark.parametrize(
    ("method", "checkpointing", "joined"),
    [
        ("lora", "none", True),  # checkpointing around it: tests/tuning/test_fast_lora_compiled.py
        pytest.param("peft", "full", False, marks=pytest.mark.slow),
        pytest.param("full", "none", True, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_without(method: str, checkpointing: str, joined: bool):
    compiled, plain = make(method, 2, checkpointing), make(method, 2)
    compile_layers(compiled, backend="eager")
    for lengths in [(11, 7, 14), (20, 9, 5)]:
        samples = batch(lengths, joined=joined)
        actual, expected = loss_and_gradients(compiled, samples), loss_and_gradients(plain, samples)
        assert actual[0] == pytest.approx(expected[0], rel=1e-6)
        assert largest_difference(actual[1], expected[1]) < 1e-5
    compiled.eval()
    plain.eval()
    with torch.no_grad():
        assert compiled(**samples).loss.item() == pytest.approx(plain(**samples).loss.item(), rel=1e-6)


@pytest.mark.slow
def test_inductor_computes_the_same():
    compiled, plain = make("lora", 2), make("lora", 2)
    compile_layers(compiled)
    samples = batch([16, 32, 16], joined=True)
    actual, expected = loss_and_gradients(compiled, samples), loss_and_gradients(plain, samples)
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert largest_difference(actual[1], expected[1]) < 1e-5


def test_names_stay_and_compiling_twice_is_compiling_once():
    model = make("lora", 2)
    names = list(model.state_dict())
    compile_layers(model, backend="eager")
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    compile_layers(model, backend="eager")
    assert list(model.state_dict()) == names
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is kernel


def test_a_tower_that_does_not_run_is_left_alone():
    model: Any = load("ckpt/llava15-tiny", "sdpa")
    assert isinstance(model, LlavaForCausalLM)
    model.runs_tower = False
    assert compile_layers(model, backend="eager") == len(model.model.layers)


class TestRun:
    def test_it_trains_evaluates_and_resumes_as_without(self, tmp_path: Path):
        changes = {"validation_data_path": "data/mix.json", "eval_strategy": "steps", "eval_steps": "3"}
        plain = train(tmp_path / "plain", length_multiple="128", lora_dropout="0", **changes)
        straight = train(tmp_path / "straight", **COMPILED, **changes)
        train(tmp_path / "again", **COMPILED, **changes | {"max_steps": "6", "num_train_epochs": "1"})
        for one, other in zip(plain.trainer.state.log_history, straight.trainer.state.log_history, strict=True):
            for name in {"loss", "eval_loss"} & set(one):
                assert other[name] == pytest.approx(one[name], rel=1e-5)
        saved = torch.load(tmp_path / "straight" / "adapter_model.bin", weights_only=True)
        assert set(saved) == set(torch.load(tmp_path / "plain" / "adapter_model.bin", weights_only=True))
        resumed = train(
            tmp_path / "again", **COMPILED, **changes, resume_from_checkpoint=tmp_path / "again" / "checkpoint-3"
        )
        expected, actual = state_of(straight), state_of(resumed)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], value) for name, value in expected.items())

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, 0),
            ({"torch_compile": "True"}, 128),
            ({"torch_compile": "True", "length_multiple": "0"}, 0),
            ({"length_multiple": "64"}, 64),
        ],
    )
    def test_compiled_runs_have_rows_of_few_lengths(self, tmp_path: Path, changes: dict, expected: int):
        assert length_multiple(parse_args(flags(tmp_path / "out", **changes))) == expected

    def test_nothing_else_compiles_the_model(self, tmp_path: Path):
        run = prepare(tmp_path / "out", **COMPILED)
        run.stop.release()
        accelerator = run.trainer.accelerator
        assert accelerator.state.dynamo_plugin.backend.value == "NO"
        assert accelerator.ddp_handler.gradient_as_bucket_view is True
        wrapped = accelerator.prepare_model(run.trainer.model)
        assert not any(type(module).__name__ == "OptimizedModule" for module in wrapped.modules())
