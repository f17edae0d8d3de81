"""Tiled images on two ranks: `image_newline` is a parameter of no layer, and ZeRO-3 has to gather it all the same."""

import shutil
from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.names import IMAGE_NEWLINE
from tests.distributed.matrix import TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
ALONE = Setting("none", 1)


@pytest.mark.parametrize(
    ("method", "stages"),
    [("lora", ["none", "zero2", "zero3"]), ("full", ["zero3"]), ("projector", ["zero3"])],
)
def test_two_ranks_give_what_one_process_gives(pools: Pools, tmp_path: Path, method: str, stages: list[str]):
    """Records are in random order, so ranks often have a batch with images beside one without."""
    expected = pools.train(tmp_path / "alone", method, ALONE, "float32", **ANYRES)
    (newline,) = [name for name in expected.weights if name.endswith(IMAGE_NEWLINE)]
    for stage in stages:
        result = pools.train(tmp_path / stage, method, Setting(stage, 2), "float32", **ANYRES)
        assert difference(expected, result) <= TOLERANCES["float32"], stage
        torch.testing.assert_close(result.weights[newline], expected.weights[newline], atol=1e-5, rtol=0)


def test_a_resumed_run_under_zero3_is_the_uninterrupted_one(pools: Pools, tmp_path: Path):
    setting = Setting("zero3", 2)
    straight = pools.train(tmp_path / "straight", "lora", setting, "float32", **ANYRES)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    resumed = pools.train(tmp_path / "stopped", "lora", setting, "float32", **ANYRES)
    assert [name for name, value in straight.weights.items() if not torch.equal(value, resumed.weights[name])] == []


def test_s2_under_zero3(pools: Pools, tmp_path: Path):
    changes = {"s2_scales": "56,112", "pretrain_mm_mlp_adapter": None}
    expected = pools.train(tmp_path / "alone", "lora", ALONE, "float32", **changes)
    result = pools.train(tmp_path / "zero3", "lora", Setting("zero3", 2), "float32", **changes)
    assert difference(expected, result) <= TOLERANCES["float32"]
