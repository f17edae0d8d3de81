"""What is computed again on two ranks gives what one process gives, weights divided among the ranks or not."""

import json
from pathlib import Path

import pytest

from tests.distributed.matrix import TOLERANCES, Pools, Setting, difference
from tests.training.helpers import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

ALONE = Setting("none", 1)
WAYS = {
    "full": {"gradient_checkpointing": "full"},
    "every second layer": {"gradient_checkpointing": "full", "gradient_checkpointing_every": "2"},
    "selective": {"gradient_checkpointing": "selective"},
    "selective, PEFT": {"gradient_checkpointing": "selective", "fast_lora": "False"},
}


@pytest.mark.parametrize(
    ("method", "stage", "way"),
    [
        ("lora", "none", "selective, PEFT"),
        ("lora", "zero2", "selective, PEFT"),
        ("lora", "zero3", "full"),
        ("lora", "zero3", "every second layer"),
        ("lora", "zero3", "selective"),
        ("lora", "zero3", "selective, PEFT"),
        ("full", "zero3", "full"),
        ("full", "zero3", "selective"),
        ("projector", "zero3", "selective"),
    ],
)
def test_two_ranks_give_what_one_process_gives(pools: Pools, tmp_path: Path, method: str, stage: str, way: str):
    expected = pools.train(tmp_path / "alone", method, ALONE, "float32", max_steps=3)
    result = pools.train(tmp_path / "ranks", method, Setting(stage, 2), "float32", max_steps=3, **WAYS[way])
    assert len(expected.losses) == 3
    assert difference(expected, result) <= TOLERANCES["float32"]


@pytest.mark.parametrize(("method", "way"), [("full", "selective"), ("lora", "selective, PEFT"), ("lora", "full")])
def test_weights_that_are_gathered_again_for_the_backward_pass_change_nothing(
    pools: Pools, tmp_path: Path, method: str, way: str
):
    """No weight stays whole between its uses, so what gathers it runs among the operations of both passes."""
    config = json.loads((REPOSITORY / "configs/zero3.json").read_text())
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    config["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(config))
    expected = pools.train(tmp_path / "alone", method, ALONE, "float32", max_steps=3)
    result = pools.train(tmp_path / "ranks", method, Setting(str(file), 2), "float32", max_steps=3, **WAYS[way])
    assert difference(expected, result) <= TOLERANCES["float32"]
