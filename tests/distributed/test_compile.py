"""Layers compiled one by one give on two ranks what plain ones give in one process, weights divided or not."""

from pathlib import Path

import pytest

from tests.distributed.matrix import ALONE, SHORT, TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

COMPILED = {"torch_compile": "True", "torch_compile_backend": "eager"}
"""Graphs are made and run as they are: what ranks need of compiling is that hooks and gathered weights reach them."""


@pytest.mark.parametrize(
    ("method", "stage", "extra"),
    [
        ("lora", "none", {}),
        ("lora", "zero3", {}),
        ("lora", "zero3", {"fast_lora": "False", "gradient_checkpointing": "full"}),
        ("full", "zero3", {}),
    ],
)
def test_two_ranks_give_what_one_process_gives(pools: Pools, tmp_path: Path, method: str, stage: str, extra: dict):
    expected = pools.straight(method, ALONE, "float32", **SHORT).result
    result = pools.train(tmp_path, method, Setting(stage, 2), "float32", **SHORT, **COMPILED, **extra)
    assert len(expected.losses) == 3
    assert difference(expected, result) <= TOLERANCES["float32"]
