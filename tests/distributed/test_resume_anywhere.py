"""A run continues on other ranks, under another ZeRO stage or without DeepSpeed, as if nothing had happened."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed import tasks
from tests.distributed.matrix import TOLERANCES, Pools, Setting, difference

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]


@pytest.fixture(scope="module")
def straight(pools: Pools, tmp_path_factory: pytest.TempPathFactory):
    """Runs of six steps without interruption, with the checkpoint of the third, by method, setting and dtype."""
    made: dict[tuple[str, Setting, str], tuple[Path, tasks.Result]] = {}

    def run(method: str, setting: Setting, dtype: str = "float32") -> tuple[Path, tasks.Result]:
        key = (method, setting, dtype)
        if key not in made:
            path = tmp_path_factory.mktemp("straight")
            made[key] = path, pools.train(path, method, setting, dtype)
            shutil.rmtree(path / "checkpoint-6")
        return made[key]

    return run


def resume(pools: Pools, straight: Path, path: Path, method: str, target: Setting, dtype: str, **changes: object):
    shutil.copytree(straight, path, dirs_exist_ok=True)
    result = pools.train(path, method, target, dtype, **changes)
    assert result.resumed == "checkpoint-3"
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["none", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_with_the_same_ranks_and_stage_it_is_bit_equal(
    pools: Pools, straight, tmp_path: Path, method: str, stage: str, dtype: str
):
    setting = Setting(stage, 2)
    path, expected = straight(method, setting, dtype)
    result = resume(pools, path, tmp_path, method, setting, dtype)
    assert difference(expected, result, first_step=4) == 0.0
    assert [name for name in expected.weights if not torch.equal(expected.weights[name], result.weights[name])] == []


@pytest.mark.parametrize(
    ("method", "origin", "target", "dtype"),
    [
        ("lora", Setting("none", 2), Setting("none", 1), "float32"),
        ("lora", Setting("none", 1), Setting("zero3", 2), "float32"),
        ("lora", Setting("zero2", 2), Setting("none", 1), "float32"),
        ("lora", Setting("zero2", 2), Setting("zero3", 2), "float32"),
        ("lora", Setting("zero3", 2), Setting("zero2", 1), "float32"),
        ("lora", Setting("zero3", 2), Setting("zero2_offload", 2), "float32"),
        ("full", Setting("zero1", 2), Setting("zero3", 1), "float32"),
        ("full", Setting("zero3", 2), Setting("none", 1), "float32"),
        ("projector", Setting("zero3", 2), Setting("zero2", 1), "float32"),
        ("lora + im_start_end", Setting("zero2", 2), Setting("zero3", 1), "float32"),
        ("lora", Setting("zero2", 2), Setting("zero3", 2), "bfloat16"),
        ("full", Setting("none", 1), Setting("zero2", 2), "bfloat16"),
    ],
    ids=str,
)
def test_with_other_ranks_or_another_stage(
    pools: Pools, straight, tmp_path: Path, method: str, origin: Setting, target: Setting, dtype: str
):
    path, expected = straight(method, origin, dtype)
    result = resume(pools, path, tmp_path, method, target, dtype)
    assert difference(expected, result, first_step=4) <= TOLERANCES[dtype]
    assert set(expected.weights) == set(result.weights)


@pytest.mark.slow
def test_from_two_ranks_to_four(pools: Pools, straight, tmp_path: Path):
    """The other stages with four ranks are in docs/zero_matrix.md, which `matrix.py` writes."""
    path, expected = straight("lora", Setting("zero3", 2))
    try:
        result = resume(pools, path, tmp_path, "lora", Setting("zero3", 4), "float32")
    finally:
        pools.of(4).close()
    assert difference(expected, result, first_step=4) <= TOLERANCES["float32"]


def test_another_batch_continues_with_the_records_that_follow(pools: Pools, straight, tmp_path: Path):
    """Three steps of 4 samples are half of the 24; with 2 samples a step that is step 6 of 12."""
    path, _ = straight("lora", Setting("none", 1))
    result = resume(
        pools,
        path,
        tmp_path,
        "lora",
        Setting("none", 2),
        "float32",
        gradient_accumulation_steps=1,
        max_steps=-1,
        num_train_epochs=2,
        save_strategy="no",
    )
    assert sorted(step for step in result.losses if step > 3) == list(range(7, 25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "r is 4 in it and 8 here"),
        ({"lora_target_modules": "q_proj"}, "In it but not trained here"),
        ({"lora_enable": False, "lora_r": None, "lora_alpha": None, "lora_dropout": None}, "this run trains no LoRA"),
        ({"model_name_or_path": "ckpt/llava15-tiny-imse"}, "was trained on .*base-llm"),
    ],
    ids=["rank", "targets", "method", "model"],
)
def test_a_checkpoint_of_something_else_is_refused(
    pools: Pools, straight, tmp_path: Path, changes: dict[str, object], message: str
):
    path, _ = straight("lora", Setting("zero2", 2))
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    argv = pools.command(tmp_path, "lora", Setting("zero2", 2), "float32", **changes)
    assert [bool(re.search(message, said or "")) for said in pools.of(2).run(tasks.refusal, argv)] == [True, True]
