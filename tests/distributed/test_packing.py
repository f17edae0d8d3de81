"""Packed rows on several ranks: the same rows, the same losses."""

from pathlib import Path

import pytest

from tests.distributed.matrix import ALONE, TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

# 21 rows: in step 6 two ranks fill up the last row of the epoch with the first one, as they do with samples.
PACKED = {"packing": True, "model_max_length": 128, "save_strategy": "no", "max_steps": 5}


def test_two_ranks_under_zero_3_give_what_one_process_gives(pools: Pools, tmp_path: Path):
    """Rows of one step are divided among the ranks, so a rank may have no image in its row while the other has some."""
    alone = pools.train(tmp_path / "1", "lora", ALONE, "float32", **PACKED)
    divided = pools.train(tmp_path / "2", "lora", Setting("zero3", 2), "float32", **PACKED)
    assert difference(alone, divided) <= TOLERANCES["float32"]
    assert len(alone.losses) == 5


def test_joined_samples_on_two_ranks(pools: Pools, tmp_path: Path):
    """Ranks have different numbers of positions here."""
    changes = {"padding_free": True, "save_strategy": "no", "per_device_train_batch_size": 2, "max_steps": 3}
    alone = pools.train(tmp_path / "1", "lora", ALONE, "float32", gradient_accumulation_steps=2, **changes)
    divided = pools.train(
        tmp_path / "2", "lora", Setting("zero2", 2), "float32", gradient_accumulation_steps=1, **changes
    )
    assert difference(alone, divided) <= TOLERANCES["float32"]
