"""Starting from an earlier run on two ranks: one merges while the other waits, and ZeRO-3 divides what is restored."""

from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.lineage import read_lineage
from tests.distributed.matrix import ALONE, TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

START = {
    "model_name_or_path": None,
    "vision_tower": None,
    "pretrain_mm_mlp_adapter": None,
    "mm_projector_type": None,
    "mm_vision_select_layer": None,
}
MODES = ("continue", "new", "merge_first")


def start(pools: Pools, mode: str) -> dict[str, object]:
    """What a run says that starts from an earlier one."""
    earlier = pools.straight("lora + im_start_end", ALONE, "float32").path
    return START | {"init_from": earlier, "adapter_mode": mode}


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_start_where_one_does(pools: Pools, tmp_path: Path, mode: str):
    expected = pools.train(tmp_path, "lora", ALONE, "float32", **start(pools, mode))
    straight = pools.straight("lora", Setting("zero3", 2), "float32", **start(pools, mode))
    assert difference(expected, straight.result) <= TOLERANCES["float32"]
    assert read_lineage(straight.path) is not None
    assert (straight.path / "merged_base/llava_ft.json").is_file() == (mode == "merge_first")


def test_two_ranks_without_deepspeed_merge_once(pools: Pools, tmp_path: Path):
    """One merges while the other waits."""
    expected = pools.straight("lora", Setting("zero3", 2), "float32", **start(pools, "merge_first")).result
    result = pools.train(tmp_path, "lora", Setting("none", 2), "float32", **start(pools, "merge_first"))
    assert difference(expected, result) <= TOLERANCES["float32"]


def test_a_resumed_run_merges_no_more(pools: Pools, tmp_path: Path):
    setting, changes = Setting("zero3", 2), start(pools, "merge_first")
    straight = pools.straight("lora", setting, "float32", **changes)
    merged = (straight.path / "merged_base/llava_ft.json").stat().st_mtime_ns
    resumed = pools.resume(straight, tmp_path, "lora", setting, "float32", **changes)
    assert (tmp_path / "merged_base/llava_ft.json").stat().st_mtime_ns == merged
    weights = straight.result.weights
    assert [name for name, value in weights.items() if not torch.equal(value, resumed.weights[name])] == []
