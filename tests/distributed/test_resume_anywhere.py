"""A run continues on other ranks, under another ZeRO stage or without DeepSpeed, as if nothing had happened."""

import re
from pathlib import Path

import pytest
import torch

from tests.distributed import tasks
from tests.distributed.matrix import ALONE, TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]


@pytest.mark.parametrize(
    ("method", "stage", "dtype"),
    [
        ("lora", "none", "float32"),
        ("full", "none", "bfloat16"),
        ("lora", "zero1", "bfloat16"),
        ("lora", "zero2", "float32"),
        ("full", "zero2", "bfloat16"),
        ("lora", "zero3", "bfloat16"),
        ("full", "zero3", "float32"),
    ],
)
def test_with_the_same_ranks_and_stage_it_is_bit_equal(
    pools: Pools, tmp_path: Path, method: str, stage: str, dtype: str
):
    setting = Setting(stage, 2)
    straight = pools.straight(method, setting, dtype)
    expected = straight.result
    result = pools.resume(straight, tmp_path, method, setting, dtype)
    assert difference(expected, result, first_step=4) == 0.0
    assert [name for name in expected.weights if not torch.equal(expected.weights[name], result.weights[name])] == []


@pytest.mark.parametrize(
    ("method", "origin", "target", "dtype"),
    [
        ("lora", Setting("none", 2), ALONE, "float32"),
        ("lora", ALONE, Setting("zero3", 2), "float32"),
        ("lora", Setting("zero2", 2), Setting("zero3", 2), "float32"),
        ("lora", Setting("zero3", 2), Setting("zero2_offload", 2), "float32"),
        ("lora", Setting("zero3", 2), Setting("zero3", 4), "float32"),
        ("full", Setting("zero3", 2), ALONE, "float32"),
        ("projector", Setting("zero3", 2), Setting("zero2", 1), "float32"),
        ("lora + im_start_end", Setting("zero2", 2), Setting("zero3", 1), "float32"),
        ("lora", Setting("zero1", 2), Setting("zero3", 1), "bfloat16"),
        ("full", ALONE, Setting("zero2", 2), "bfloat16"),
    ],
    ids=str,
)
def test_with_other_ranks_or_another_stage(
    pools: Pools, tmp_path: Path, method: str, origin: Setting, target: Setting, dtype: str
):
    """One for each way of reading and of writing; `matrix.py` tries all: docs/internals/zero-matrix.md."""
    straight = pools.straight(method, origin, dtype)
    result = pools.resume(straight, tmp_path, method, target, dtype)
    assert difference(straight.result, result, first_step=4) <= TOLERANCES[dtype]
    assert set(straight.result.weights) == set(result.weights)


def test_another_batch_continues_with_the_records_that_follow(pools: Pools, tmp_path: Path):
    """Three steps of 4 samples are half of the 24; with 2 samples a step that is step 6 of 12."""
    changes = {"gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "no"}
    straight = pools.straight("lora", ALONE, "float32")
    result = pools.resume(straight, tmp_path, "lora", Setting("none", 2), "float32", **changes)
    assert sorted(step for step in result.losses if step > 3) == list(range(7, 25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "lora_r 4 -> 8"),
        (
            {"lora_enable": False, "lora_r": None, "lora_alpha": None, "lora_dropout": None},
            "holds an adapter .* makes a whole",
        ),
        ({"model_name_or_path": "ckpt/llava15-tiny-imse"}, "mm_use_im_start_end False -> True"),
    ],
    ids=["rank", "method", "model"],
)
def test_a_checkpoint_of_something_else_is_refused_by_all_ranks(
    pools: Pools, tmp_path: Path, changes: dict[str, object], message: str
):
    setting = Setting("zero2", 2)
    pools.straight("lora", setting, "float32").copy(tmp_path)
    argv = pools.command(tmp_path, "lora", setting, "float32", **changes)
    assert [bool(re.search(message, said or "")) for said in pools.of(2).run(tasks.refusal, argv)] == [True, True]
