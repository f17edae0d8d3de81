"""Starting from an earlier run on two ranks: one merges while the other waits, and ZeRO-3 divides what is restored."""

import shutil
from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.lineage import read_lineage
from tests.distributed.matrix import TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

START = {
    "model_name_or_path": None,
    "vision_tower": None,
    "pretrain_mm_mlp_adapter": None,
    "mm_projector_type": None,
    "mm_vision_select_layer": None,
}
ALONE = Setting("none", 1)


def test_two_ranks_start_where_one_does(pools: Pools, tmp_path: Path):
    earlier = tmp_path / "earlier"
    pools.train(earlier, "lora", ALONE, "float32", mm_use_im_start_end="True")
    for mode in ("continue", "new", "merge_first"):
        changes = START | {"init_from": earlier, "adapter_mode": mode}
        expected = pools.train(tmp_path / f"{mode}-alone", "lora", ALONE, "float32", **changes)
        for stage in ("none", "zero3") if mode == "merge_first" else ("zero3",):
            directory = tmp_path / f"{mode}-{stage}"
            result = pools.train(directory, "lora", Setting(stage, 2), "float32", **changes)
            assert difference(expected, result) <= TOLERANCES["float32"], (mode, stage)
            assert read_lineage(directory) is not None
            assert (directory / "merged_base/llava_ft.json").is_file() == (mode == "merge_first")


def test_a_resumed_run_merges_once(pools: Pools, tmp_path: Path):
    pools.train(tmp_path / "earlier", "lora", ALONE, "float32")
    changes = START | {"init_from": tmp_path / "earlier", "adapter_mode": "merge_first"}
    setting = Setting("zero3", 2)
    straight = pools.train(tmp_path / "out", "lora", setting, "float32", **changes)
    merged = (tmp_path / "out/merged_base/llava_ft.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    resumed = pools.train(tmp_path / "out", "lora", setting, "float32", **changes)
    assert resumed.resumed == "checkpoint-3"
    assert (tmp_path / "out/merged_base/llava_ft.json").stat().st_mtime_ns == merged
    assert [name for name, value in straight.weights.items() if not torch.equal(value, resumed.weights[name])] == []
