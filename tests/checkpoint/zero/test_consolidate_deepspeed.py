"""What real runs of two ranks leave in DeepSpeed's files is what they trained, bit for bit."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.names import native_name, plain_name
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.checkpoint.zero.consolidate import consolidate
from llava_ft.checkpoint.zero.shards import ZeroShards
from tests.distributed.pool import Pool
from tests.distributed.tasks import train
from tests.training.helpers import flags

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SMALL = {
    "lora": ("adapter_model.bin", "non_lora_trainables.bin"),
    "projector": ("mm_projector.bin",),
    "full": (),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    ranks = Pool(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("stage", "method", "dtype"),
    [
        (stage, method, ("float32", "bfloat16")[(row + stage) % 2])  # each type with each stage and each method
        for row, method in enumerate(SMALL)
        for stage in (1, 2, 3)
    ],
)
def test_the_shards_of_a_run_give_what_it_trained(tmp_path: Path, pool: Pool, stage: int, method: str, dtype: str):
    argv = flags(
        tmp_path / "run",
        method,
        deepspeed=f"zero{stage}.json",
        bf16=dtype == "bfloat16",
        max_steps=2,
        save_steps=2,
    )
    trained = pool.run(train, argv)[0].weights
    checkpoint = tmp_path / "run/checkpoint-2"
    step = tmp_path / "global_step2"
    shutil.copytree(checkpoint / "global_step2", step)

    read = {plain_name(name): value for name, value in ZeroShards.open(step).stream()}
    assert all(torch.equal(read[name], value) for name, value in trained.items())

    result = consolidate(step, lora_alpha=8 if method == "lora" else None)
    assert result.num_trained == len(trained) or method == "full"
    for name in SMALL[method]:
        ours, theirs = (torch.load(path / name, weights_only=True) for path in (result.output, checkpoint))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    if method == "full":
        ours, theirs = (WeightFiles.open(path).read() for path in (result.output, checkpoint))
        assert set(theirs) <= set(ours)
        assert all(torch.equal(ours[native_name(key)], value.float()) for key, value in theirs.items())
