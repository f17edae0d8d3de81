"""What is computed again on two ranks gives what one process gives, weights divided among the ranks or not."""

import json
from pathlib import Path

import pytest

from tests.distributed.matrix import ALONE, SHORT, TOLERANCES, Pools, Setting, difference
from tests.training.helpers import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

WAYS = {
    "full": {"gradient_checkpointing": "full"},
    "every second layer": {"gradient_checkpointing": "full", "gradient_checkpointing_every": "2"},
    "selective": {"gradient_checkpointing": "selective"},
    "selective, PEFT": {"gradient_checkpointing": "selective", "fast_lora": "False"},
}


@pytest.mark.parametrize("stage", ["none", "zero2", "zero3"])
def test_two_ranks_give_what_one_process_gives(pools: Pools, tmp_path: Path, stage: str):
    check(pools, tmp_path, "lora", stage, "selective, PEFT")


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("lora", "full"),
        ("lora", "every second layer"),
        ("lora", "selective"),
        ("lora", "selective, PEFT"),
        ("full", "full"),
        ("full", "selective"),
        ("projector", "selective"),
    ],
)
def test_weights_that_are_gathered_again_for_the_backward_pass_change_nothing(
    pools: Pools, tmp_path: Path, method: str, way: str
):
    """No weight stays whole between its uses, so what gathers it runs among the operations of both passes."""
    config = json.loads((REPOSITORY / "configs/zero3.json").read_text())
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    config["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(config))
    check(pools, tmp_path / "out", method, str(file), way)


def check(pools: Pools, output_dir: Path, method: str, stage: str, way: str) -> None:
    """Compare a run of two ranks with one process that recomputes nothing."""
    expected = pools.straight(method, ALONE, "float32", **SHORT).result
    result = pools.train(output_dir, method, Setting(stage, 2), "float32", **SHORT, **WAYS[way])
    assert len(expected.losses) == 3
    assert difference(expected, result) <= TOLERANCES["float32"]
