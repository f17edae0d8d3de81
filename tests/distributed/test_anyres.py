"""Tiled images on two ranks: `image_newline` is a parameter of no layer, and ZeRO-3 has to gather it all the same."""

from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.names import IMAGE_NEWLINE
from tests.distributed.matrix import ALONE, SHORT, TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

ANYRES = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}


@pytest.mark.parametrize("stage", ["none", "zero3"])
def test_two_ranks_give_what_one_process_gives(pools: Pools, stage: str):
    """Records are in random order, so ranks often have a batch with images beside one without."""
    expected = pools.straight("lora", ALONE, "float32", **ANYRES).result
    (newline,) = [name for name in expected.weights if name.endswith(IMAGE_NEWLINE)]
    result = pools.straight("lora", Setting(stage, 2), "float32", **ANYRES).result
    assert difference(expected, result) <= TOLERANCES["float32"]
    torch.testing.assert_close(result.weights[newline], expected.weights[newline], atol=1e-5, rtol=0)


def test_a_resumed_run_under_zero3_is_the_uninterrupted_one(pools: Pools, tmp_path: Path):
    setting = Setting("zero3", 2)
    straight = pools.straight("lora", setting, "float32", **ANYRES)
    resumed = pools.resume(straight, tmp_path, "lora", setting, "float32", **ANYRES)
    weights = straight.result.weights
    assert [name for name, value in weights.items() if not torch.equal(value, resumed.weights[name])] == []


def test_a_whole_model_under_zero3(pools: Pools, tmp_path: Path):
    expected = pools.train(tmp_path / "alone", "full", ALONE, "float32", **ANYRES, **SHORT)
    result = pools.train(tmp_path / "zero3", "full", Setting("zero3", 2), "float32", **ANYRES, **SHORT)
    assert difference(expected, result) <= TOLERANCES["float32"]


def test_s2_under_zero3(pools: Pools, tmp_path: Path):
    changes = SHORT | {"s2_scales": "56,112", "pretrain_mm_mlp_adapter": None}
    expected = pools.train(tmp_path / "alone", "lora", ALONE, "float32", **changes)
    result = pools.train(tmp_path / "zero3", "lora", Setting("zero3", 2), "float32", **changes)
    assert difference(expected, result) <= TOLERANCES["float32"]
