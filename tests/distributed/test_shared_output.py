"""Ranks that would write or resume in different places are told so before anything is loaded."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llava_ft.errors import UserError
from llava_ft.training.distributed import check_same_checkpoint, check_shared_output
from tests.distributed import faulty_train
from tests.distributed.matrix import Pools
from tests.distributed.pool import Pool, run_once
from tests.training.helpers import flags

pytestmark = pytest.mark.distributed


@dataclass
class Arguments:
    """What is asked of the training arguments."""

    output_dir: str
    save_on_each_node: bool
    process_index: int
    local_process_index: int
    world_size: int = 2


@pytest.fixture
def two_ranks(pools: Pools) -> Pool:
    return pools.of(2)


def look(folders: list[Path], save_on_each_node: bool, machines: int) -> str:
    """Check the output directories of two ranks on one or two machines; return what is said."""
    rank = join()
    local_rank = rank if machines == 1 else 0
    try:
        check_shared_output(Arguments(str(folders[rank]), save_on_each_node, rank, local_rank))  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    return "fine"


def compare(names: list[Path | None]) -> str:
    try:
        check_same_checkpoint(names[join()], 2)
    except UserError as error:
        return str(error)
    return "fine"


def join() -> int:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank()


@pytest.mark.parametrize(("each", "machines"), [(False, 1), (False, 2), (True, 1)])
def test_one_folder(each: bool, machines: int, two_ranks: Pool, tmp_path: Path):
    assert two_ranks.run(look, [tmp_path / "out"] * 2, each, machines) == ["fine"] * 2
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_per_machine(two_ranks: Pool, tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b"]
    first, second = two_ranks.run(look, folders, False, 2)
    assert first.startswith(
        f"output_dir={folders[0]} on the machine of rank 0 is another folder than on that of rank 1."
    )
    assert second.endswith("--save_on_each_node True.")
    assert two_ranks.run(look, folders, True, 2) == ["fine"] * 2


def test_one_folder_that_each_machine_would_write_alone(two_ranks: Pool, tmp_path: Path):
    said = two_ranks.run(look, [tmp_path / "out"] * 2, True, 2)
    assert said[0].startswith(f"save_on_each_node=True, but all 2 machines share output_dir={tmp_path / 'out'}")
    assert said[0] == said[1]


def test_checkpoints(two_ranks: Pool, tmp_path: Path):
    newest = tmp_path / "a/checkpoint-4"
    assert two_ranks.run(compare, [newest, tmp_path / "b/checkpoint-4"]) == ["fine"] * 2
    assert two_ranks.run(compare, [None, None]) == ["fine"] * 2
    for other in (None, tmp_path / "b/checkpoint-2"):
        name = other.name if other else "none"
        said = two_ranks.run(compare, [newest, other])
        assert said[0] == said[1]
        assert f"all machines: rank 0: checkpoint-4; rank 1: {name}. Name one" in said[0]


def test_a_run_of_two_machines_with_a_folder_each_ends_as_a_wrong_request(tmp_path: Path):
    ended = run_once(2, train_in_its_own_folder, tmp_path, machines=2)
    assert [one.status for one in ended] == [2, 2], ended
    said = "".join(one.said for one in ended)
    assert "is another folder than on that of rank 1. Checkpoints need one folder that all machines share" in said
    assert not list(tmp_path.glob("out*/checkpoint-*"))


def train_in_its_own_folder(folder: Path) -> None:
    faulty_train.train(flags(folder / f"out{os.environ['RANK']}"))


def test_a_process_on_its_own(tmp_path: Path):
    check_shared_output(Arguments(str(tmp_path / "out"), False, 0, 0, world_size=1))  # type: ignore[arg-type]
    check_same_checkpoint(None, 1)
    assert not (tmp_path / "out").exists()
