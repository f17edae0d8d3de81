"""What the flags say of recomputation reaches the layers of a run, and changes nothing of what it learns."""

from pathlib import Path

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_ft.args import parse_args
from llava_ft.training.model_setup import recomputation_of
from llava_ft.tuning.recompute import Recomputation
from tests.training.helpers import flags, prepare, state_of, train

pytestmark = pytest.mark.usefixtures("in_recordings")

WAYS = [
    {"gradient_checkpointing": "full"},
    {"gradient_checkpointing": "True", "gradient_checkpointing_every": "2", "activation_offload": "True"},
    {"gradient_checkpointing": "selective"},
    {"activation_checkpointing": "selective", "gradient_checkpointing_kwargs": '{"determinism_check": "none"}'},
]


@pytest.mark.parametrize("fast", ["True", "False"])
def test_a_run_with_dropout_is_bit_for_bit_the_same(tmp_path: Path, fast: str):
    changes = {"max_steps": "2", "save_strategy": "no", "lora_dropout": "0.2", "fast_lora": fast}
    expected = state_of(train(tmp_path / "plain", **changes))
    for number, way in enumerate(WAYS):
        actual = state_of(train(tmp_path / str(number), **changes, **way))
        assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


@pytest.mark.parametrize(("every", "expected"), [("1", [True, True]), ("2", [True, False])])
@pytest.mark.parametrize("method", ["lora", "projector", "full"])
def test_decoder_layers_recompute_and_the_frozen_tower_does_not(tmp_path: Path, method: str, every: str, expected):
    changes = {"gradient_checkpointing": "full", "gradient_checkpointing_every": every}
    model = prepare(tmp_path, method, **changes).trainer.model
    switched = {
        name: module.gradient_checkpointing
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer)
    }
    assert [value for name, value in switched.items() if "vision" not in name] == expected
    assert not any(value for name, value in switched.items() if "vision" in name)
    assert len(switched) > 2


def test_nothing_recomputes_unless_asked(tmp_path: Path):
    model = prepare(tmp_path).trainer.model
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="llava_ft")
    return caplog


def test_a_cpu_has_no_other_memory_to_go_to(tmp_path: Path, log: pytest.LogCaptureFixture):
    args = parse_args(flags(tmp_path, gradient_checkpointing="full", activation_offload="True"))
    assert recomputation_of(args) == Recomputation("full", offload=True)
    assert "activation_offload has no effect: the CPU is used, whose memory is the host's." in log.text


def test_selective_is_left_to_the_compiler(tmp_path: Path, log: pytest.LogCaptureFixture):
    changes = {"torch_compile": "True", "torch_compile_backend": "aot_eager"}
    args = parse_args(flags(tmp_path, gradient_checkpointing="selective", **changes))
    assert recomputation_of(args) == Recomputation()
    assert "gradient_checkpointing=selective is left to torch_compile" in log.text
    args = parse_args(flags(tmp_path, gradient_checkpointing="full", **changes))
    assert recomputation_of(args) == Recomputation("full")
