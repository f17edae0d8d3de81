"""Whether the ranks write and resume in the same place, when they run on several machines.

Every rank writes its part of a checkpoint: its random numbers, and under DeepSpeed its share of the optimizer. If
`output_dir` is a folder of its own on each machine, the parts never come together, and a resumed rank may find another
checkpoint than the others, or none. Nothing would tell before the run is lost, so it is asked first.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import TrainingArguments

from llava_ft.errors import UserError

_SECONDS_BETWEEN_LOOKS = 0.2

_Value = TypeVar("_Value")


def check_shared_output(training: TrainingArguments) -> None:
    """Check that all ranks see the same output directory, or that each machine is to write its own.

    Args:
        training: Arguments of the run; its process group exists if there are several ranks.

    Raises:
        UserError: They do not, or all would write over one another.
    """
    if training.world_size == 1:
        return
    directory = Path(training.output_dir or ".")
    blind = blind_ranks(directory, training)
    machines = len(set(from_all_ranks(training.process_index - training.local_process_index, training.world_size)))
    if blind and not training.save_on_each_node:
        raise UserError(
            f"output_dir={directory} on the machine of rank 0 is another folder than on that of {_named(blind)}. "
            "Checkpoints need one folder that all machines share: give its path, or keep a folder per machine with "
            "--save_on_each_node True."
        )
    if not blind and training.save_on_each_node and machines > 1:
        raise UserError(
            f"save_on_each_node=True, but all {machines} machines share output_dir={directory} and would write over "
            "one another. Leave out save_on_each_node, or give a folder that each machine has for itself."
        )


def blind_ranks(directory: Path, training: TrainingArguments) -> list[int]:
    """Return the ranks for which a path leads to another folder than for the first rank. All ranks call this together.

    Args:
        directory: The path; the first rank makes the folder.
        training: Arguments of the run; its process group exists if there are several ranks.
    """
    if training.world_size == 1:
        return []
    mark = directory / f".seen-by-all-{from_first_rank(secrets.token_hex(8), training.world_size)}"
    if training.process_index == 0:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
    torch.distributed.barrier()
    blind = [rank for rank, sees in enumerate(from_all_ranks(mark.exists(), training.world_size)) if not sees]
    if training.process_index == 0:
        mark.unlink(missing_ok=True)
    return blind


def check_same_checkpoint(checkpoint: Path | None, world_size: int) -> None:
    """Check that all ranks resume from the checkpoint of the same step.

    Args:
        checkpoint: What this rank found; None to start from the beginning.
        world_size: Number of ranks; the process group exists if there are several.

    Raises:
        UserError: They do not.
    """
    if world_size == 1:
        return
    found = from_all_ranks(checkpoint.name if checkpoint else "none", world_size)
    if len(set(found)) > 1:
        listed = "; ".join(
            f"{_named([rank for rank, name in enumerate(found) if name == other])}: {other}"
            for other in dict.fromkeys(found)
        )
        raise UserError(
            f"The newest complete checkpoint is not the same on all machines: {listed}. Name one that all of them have "
            "with --resume_from_checkpoint, or copy the missing one."
        )


def from_first_rank(value: _Value, world_size: int) -> _Value:
    """Return what the first rank calls this with. All ranks call it together."""
    box = [value]
    if world_size > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: _Value, world_size: int) -> list[_Value]:
    """Return what each rank calls this with, which is not None. All ranks call it together."""
    if world_size == 1:
        return [value]
    values: list[_Value | None] = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return [value for value in values if value is not None]


def wait_for_first(is_done: Callable[[], bool], training: TrainingArguments) -> None:
    """Wait for files that the writing rank makes, however long it takes. All ranks call this together.

    An operation of all ranks would give up after `ddp_timeout`. If the writing rank fails, the watch over the ranks
    ends those that wait.

    Args:
        is_done: Whether the files are there.
        training: Arguments of the run; its process group exists if there are several ranks.
    """
    if training.world_size == 1:
        return
    while not is_done():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    torch.distributed.barrier()


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
