"""Reading the shards that DeepSpeed writes: whole, exact, and never a wrong value."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_ft.checkpoint.zero.files import find_step_directory
from llava_ft.checkpoint.zero.shards import ZeroShards
from llava_ft.errors import CheckpointError
from tests.checkpoint.zero.shards import Step, edit


def tensors(*shapes: tuple[int, ...], prefix: str = "p", seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{prefix}{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


GROUPS = (tensors((3, 5), (7,), (2, 2, 2), (1,), (11, 3)), tensors((5,), (1, 3), prefix="q", seed=1))
FROZEN = tensors((4, 3), (1,), (5,), prefix="f", seed=2)
STEP = Step(GROUPS, FROZEN, buffers={"count": torch.arange(3)})


def check(step: Step, directory: Path, *, has_frozen: bool = True) -> ZeroShards:
    """Read what was written and compare it bit for bit."""
    shards = ZeroShards.open(step.write(directory))
    read = dict(shards.stream())
    for name, value in step.trained.items():
        assert torch.equal(read[name], value), name
        assert read[name].dtype == torch.float32
    assert set(shards.trained) == set(step.trained)
    if has_frozen:
        for name, value in step.frozen.items():
            assert torch.equal(read[name], value.to(step.dtype).float()), name
    assert (shards.step, shards.version, shards.stage) == (step.step, step.version, step.stage)
    return shards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_values_come_back_bit_for_bit(tmp_path: Path, stage: int, ranks: int, dtype: torch.dtype):
    shards = check(replace(STEP, stage=stage, ranks=ranks, dtype=dtype), tmp_path / "global_step7")
    assert shards.num_ranks == ranks
    assert set(shards.others) == {*FROZEN, "count"}
    assert dict(shards.stream(["count"]))["count"].dtype == torch.int64


@pytest.mark.parametrize("size", [1, 10, 30])
def test_stage_3_in_small_sub_groups(tmp_path: Path, size: int):
    check(replace(STEP, stage=3, sub_group_size=size), tmp_path / "step")


def test_parameters_dealt_out_in_turn(tmp_path: Path):
    """DeepSpeed's own record of where the parts lie is wrong then."""
    check(replace(STEP, round_robin=True), tmp_path / "step")


def test_parameters_that_begin_at_multiples(tmp_path: Path):
    check(replace(STEP, alignment=8, version="0.19.8"), tmp_path / "step")


def test_stage_1_with_float32_gradients(tmp_path: Path):
    check(replace(STEP, stage=1, has_bf16_optimizer=True), tmp_path / "step")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_need_not_be_there(tmp_path: Path, stage: int):
    shards = check(replace(STEP, stage=stage, excludes_frozen=True), tmp_path / "step", has_frozen=False)
    assert set(shards.others) == {"count"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shared_parameters_are_named_and_not_repeated(tmp_path: Path, stage: int):
    shards = check(replace(STEP, stage=stage, shared={"head": "p0"}), tmp_path / "step")
    assert shards.shared == {"head": "p0"}
    assert "head" not in shards.others


def test_stage_0_has_everything_in_the_model_file(tmp_path: Path):
    step = replace(STEP, stage=0, ranks=1)
    shards = ZeroShards.open(step.write(tmp_path / "step"))
    read = dict(shards.stream())
    assert {name: value.float().tolist() for name, value in read.items()} == {
        name: value.to(torch.bfloat16).float().tolist() if value.is_floating_point() else value.float().tolist()
        for name, value in {**step.trained, **FROZEN, **STEP.buffers}.items()
    }
    assert shards.num_optimized == len(step.trained)
    assert "precision the run computed in" in shards.notes[0]
    assert not ZeroShards.open(replace(step, dtype=torch.float32).write(tmp_path / "other")).notes


def test_lost_optimizer_files_are_made_up_for_by_the_model_file(tmp_path: Path):
    directory = STEP.write(tmp_path / "step")
    (directory / STEP.optimizer_file(1)).unlink()
    with pytest.raises(CheckpointError, match=r"rank_1_mp_rank_00_optim_states.pt is missing.*--from-model-states"):
        ZeroShards.open(directory)
    shards = ZeroShards.open(directory, from_model_states=True)
    read = dict(shards.stream(shards.trained))
    assert all(torch.equal(read[name], value.bfloat16().float()) for name, value in STEP.trained.items())
    assert "precision the run computed in" in shards.notes[0]


def test_the_model_files_of_other_ranks_are_only_needed_for_frozen_parameters(tmp_path: Path):
    step = replace(STEP, stage=3)
    directory = step.write(tmp_path / "step")
    (directory / step.model_file(1)).unlink()
    shards = ZeroShards.open(directory)
    assert all(torch.equal(value, step.trained[name]) for name, value in shards.stream(shards.trained))
    assert set(shards.others) == {"count"}
    assert "rank_1_mp_rank_00_model_states.pt is missing" in shards.notes[0]
    (directory / step.model_file(0)).unlink()
    with pytest.raises(CheckpointError, match=r"step/zero_pp_rank_0_mp_rank_00_model_states.pt is missing"):
        ZeroShards.open(directory)


shapes = st.lists(st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(shapes, min_size=1, max_size=3),
    frozen=shapes,
    stage=st.sampled_from([1, 2, 3]),
    ranks=st.integers(1, 9),
    size=st.none() | st.integers(1, 40),
    alignment=st.sampled_from([1, 4, 8]),
    in_turn=st.booleans(),
)
def test_any_shapes_on_any_number_of_ranks(
    tmp_path: Path,
    groups: list[list[tuple[int, ...]]],
    frozen: list[tuple[int, ...]],
    stage: int,
    ranks: int,
    size: int | None,
    alignment: int,
    in_turn: bool,
):
    directory = tmp_path / "step"
    shutil.rmtree(directory, ignore_errors=True)
    step = Step(
        [tensors(*group, prefix=f"g{i}.", seed=i) for i, group in enumerate(groups)],
        tensors(*frozen, prefix="f"),
        stage=stage,
        ranks=ranks,
        sub_group_size=size,
        alignment=alignment,
        round_robin=in_turn,
    )
    check(step, directory)


# What does not belong together is refused, and the message names the file.


def unlink(name: str) -> Callable[[Path, Step], None]:
    return lambda directory, _: (directory / name).unlink()


def cut(name: str, size: int) -> Callable[[Path, Step], None]:
    return lambda directory, _: os.truncate(directory / name, size)


def swap_ranks(directory: Path, step: Step) -> None:
    first, second = (directory / step.optimizer_file(rank) for rank in (0, 1))
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)


def add_rank_of_a_larger_run(directory: Path, step: Step) -> None:
    replace(step, ranks=4).write(directory.parent / "other")
    shutil.copy(directory.parent / "other" / step.optimizer_file(2), directory)


def take_rank_of(**changes: object) -> Callable[[Path, Step], None]:
    def change(directory: Path, step: Step) -> None:
        other = replace(step, **changes)
        other.write(directory.parent / "other")
        shutil.copy(directory.parent / "other" / other.optimizer_file(1), directory / step.optimizer_file(1))

    return change


def take_model_file_of(**changes: object) -> Callable[[Path, Step], None]:
    def change(directory: Path, step: Step) -> None:
        other = replace(step, **changes)
        other.write(directory.parent / "other")
        shutil.copy(directory.parent / "other" / other.model_file(int(step.stage == 3)), directory)

    return change


def empty_vectors(directory: Path, step: Step) -> None:
    for rank in (0, 1):
        edit(
            directory / step.optimizer_file(rank),
            lambda content: content["optimizer_state_dict"].update(fp32_flat_groups=[torch.empty(0)]),
        )


def write_beside(name: str) -> Callable[[Path, Step], None]:
    return lambda directory, _: torch.save({}, directory / name)


FEWER = (GROUPS[0],)
OTHER = (tensors((3, 5), (7,), (2, 2, 2), (1,), (10, 3)), GROUPS[1])
SMALLER = (tensors((3, 5), (7,), (2, 2, 2), (1,), (5, 3)), GROUPS[1])
BROKEN = [
    (2, unlink("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"), r"bf16_zero_pp_rank_0_\S+ is missing: of 2 .* 1 are"),
    (3, unlink("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"), r"bf16_zero_pp_rank_1_\S+ is missing"),
    (2, unlink("mp_rank_00_model_states.pt"), r"step/mp_rank_00_model_states.pt is missing. It holds the names"),
    (2, cut("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", 900), r"rank_1_mp\S+ cannot be read: .*\(900 bytes"),
    (3, cut("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", 0), r"rank_0_mp\S+ cannot be read: .*\(0 bytes"),
    (2, cut("mp_rank_00_model_states.pt", 2000), r"model_states.pt cannot be read: it is damaged or incomplete"),
    (2, swap_ranks, r"rank_0_mp\S+ says that \w+ begins at value|rank_0_mp\S+ is rank 0"),
    (2, add_rank_of_a_larger_run, r"rank_2_mp\S+ is rank 2 of 4, but by the model file the run had 2"),
    (2, take_rank_of(ranks=3), r"rank_1_mp\S+ is rank 1 of 3, but by the model file the run had 2"),
    (2, take_rank_of(step=6), r"different steps: bf16_zero_pp_rank_0\S+ of step 7, bf16_zero_pp_rank_1\S+ of step 6"),
    (3, take_rank_of(step=6), r"different steps"),
    (2, take_rank_of(groups=FEWER), r"rank_1_mp\S+ holds 1 groups of parameters, but the model file lists 2"),
    (3, take_rank_of(groups=OTHER), r"rank_1_mp\S+ holds other numbers of values than"),
    (2, take_rank_of(stage=3), r"rank_1_mp\S+ is of ZeRO stage 3, but files beside it are of another"),
    (2, take_model_file_of(groups=OTHER), r"rank_1_mp\S+ says that p4 begins at value 0 of its part"),
    (2, take_model_file_of(groups=SMALLER), r"hold \d+ values for group 0, but its 5 parameters have"),
    (3, take_model_file_of(groups=OTHER), r"rank_1_mp_rank_00_model_states.pt lists other parameters than"),
    (2, take_model_file_of(stage=3), r"model files of stage 3 .* and of another"),
    (3, empty_vectors, r"hold 0 values each, but 7 parameters .* offloaded to NVMe"),
    (2, write_beside("zero_pp_rank_0_mp_rank_00_optim_states.pt"), r"both bf16_zero_pp_rank_0\S+ and zero_pp_rank_0"),
    (
        2,
        write_beside("mp_rank_01_model_states.pt"),
        r"mp_rank_01_model_states.pt belongs to a run with tensor, pipeline",
    ),
    (2, write_beside("layer_0_expert_0_mp_rank_00_model_states.pt"), r"expert_0\S+ belongs to a run with tensor"),
]


@pytest.mark.parametrize(
    ("stage", "damage", "message"), BROKEN, ids=[f"{entry[0]}-{entry[2][:30]}" for entry in BROKEN]
)
def test_what_is_incomplete_or_of_two_runs_is_refused(
    tmp_path: Path, stage: int, damage: Callable[[Path, Step], None], message: str
):
    step = replace(STEP, stage=stage)
    directory = step.write(tmp_path / "step")
    damage(directory, step)
    with pytest.raises(CheckpointError, match=message):
        ZeroShards.open(directory)


class MakesAFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


class Unknown:
    pass


@pytest.mark.parametrize("place", ["optimizer", "model"])
def test_nothing_in_a_pickle_is_run(tmp_path: Path, place: str):
    directory = STEP.write(tmp_path / "step")
    file = directory / (STEP.optimizer_file(1) if place == "optimizer" else STEP.model_file())
    edit(file, lambda content: content.update(extra=MakesAFile(tmp_path / "marker")))
    with pytest.raises(CheckpointError, match=rf"{file.name} names posix.mkdir. Nothing but tensors"):
        ZeroShards.open(directory)
    assert not (tmp_path / "marker").exists()


def test_a_class_that_is_not_on_the_list_is_named(tmp_path: Path):
    directory = STEP.write(tmp_path / "step")
    edit(directory / STEP.model_file(), lambda content: content.update(extra=Unknown()))
    with pytest.raises(CheckpointError, match=rf"names {__name__}.Unknown"):
        ZeroShards.open(directory)


def test_the_step_is_the_one_that_latest_names(tmp_path: Path):
    for number in (2, 10):
        replace(STEP, step=number).write(tmp_path / f"global_step{number}")
    assert find_step_directory(tmp_path).name == "global_step10"
    (tmp_path / "latest").write_text("global_step2\n")
    assert find_step_directory(tmp_path).name == "global_step2"
    assert find_step_directory(tmp_path, "global_step10").name == "global_step10"
    assert find_step_directory(tmp_path / "global_step10").name == "global_step10"
    with pytest.raises(CheckpointError, match=r"holds no global_step3 .* It holds global_step2, global_step10"):
        find_step_directory(tmp_path, "global_step3")
    (tmp_path / "latest").write_text("global_step4")
    with pytest.raises(CheckpointError, match="holds no global_step4"):
        find_step_directory(tmp_path)


def test_a_directory_without_shards_says_what_it_holds(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_step_directory(tmp_path / "none")
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"holds no files of DeepSpeed.* It holds config.json"):
        find_step_directory(tmp_path)
    STEP.write(tmp_path / "checkpoint-7" / "global_step7")
    with pytest.raises(CheckpointError, match=r"output directory of a run. Give one of its checkpoints: checkpoint-7"):
        find_step_directory(tmp_path)
    with pytest.raises(CheckpointError, match=r"is itself a step, so --tag x"):
        find_step_directory(tmp_path / "checkpoint-7" / "global_step7", "x")
