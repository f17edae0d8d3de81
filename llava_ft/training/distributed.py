"""Several ranks: joining them, checking that they write and resume in the same place, and ending together.

A rank is one process with one device. Launchers (`deepspeed`, `torchrun`) say through RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT which one a process is; a process that was started alone is the only one.
"""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch
from transformers import TrainingArguments

from llava_ft.args import ParsedArgs
from llava_ft.errors import UserError
from llava_ft.training.fragments import ZeroDivision

if TYPE_CHECKING:
    from llava_ft.training.watch import RankWatch

logger = logging.getLogger(__name__)

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LOOKS_AT_LAUNCHER = 1.0
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "accelerate")
_SHELLS = ("sh", "bash", "dash", "zsh", "fish")

_Value = TypeVar("_Value")


def join_ranks(args: ParsedArgs) -> "RankWatch | None":
    """Make this process one of the run's ranks. Call before `args.training`, which takes the device.

    Returns:
        A watch over the other ranks, if there are any.

    Raises:
        UserError: The environment of a launcher is incomplete.
    """
    uses_cpu = bool(args.inherited.get("use_cpu")) or not torch.cuda.is_available()
    uses_deepspeed = bool(args.inherited.get("deepspeed"))
    if uses_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    given = [name for name in _LAUNCHER_VARIABLES if os.environ.get(name)]
    if "WORLD_SIZE" not in given and (uses_deepspeed or (not uses_cpu and torch.cuda.device_count() > 1)):
        if torch.cuda.device_count() > 1 and not uses_cpu:
            count = torch.cuda.device_count()
            logger.info("%d GPUs are visible and one is used. `torchrun --nproc-per-node %d` uses all.", count, count)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(zip(_LAUNCHER_VARIABLES, ("0", "0", "1", "127.0.0.1", str(port)), strict=True))
    elif given and set(given) != set(_LAUNCHER_VARIABLES):
        missing = ", ".join(sorted(set(_LAUNCHER_VARIABLES) - set(given)))
        raise UserError(
            f"{', '.join(given)} set in the environment, but not {missing}. Launchers set all five, and a process of "
            "its own needs none: start with deepspeed or torchrun, or remove them from the environment."
        )
    if uses_deepspeed and uses_cpu:
        # DeepSpeed divides models only in a group it opened itself. Its shared-memory reduction is switched off first:
        # training does not use it, building it takes a compiler and a minute, and it leaves 66 MB per rank in /dev/shm.
        import deepspeed
        import deepspeed.ops
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        setattr(deepspeed.ops, "__compatible_ops__", {ShareMemCommBuilder.NAME: False})  # noqa: B010 - it has no such name yet
        timeout = timedelta(seconds=int(str(args.inherited.get("ddp_timeout", 1800))))
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if given:
        end_with_launcher()
    training = args.training  # joins the process group
    if training.world_size == 1:
        return None
    from llava_ft.training.watch import RankWatch  # runs of one rank do without

    return RankWatch.connect(training.process_index, training.world_size, training.local_process_index)


def end_with_launcher() -> None:
    """End this rank as SIGTERM ends it, after a save, when a launcher above it is gone.

    A launcher that is killed leaves its ranks behind, which would go on and meet those of the next start.
    """

    def is_launcher(process: psutil.Process) -> bool:
        with suppress(psutil.Error):  # it is somebody else's
            return process.name() not in _SHELLS and any(word in " ".join(process.cmdline()) for word in _LAUNCHERS)
        return False

    def is_there(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    launchers = [process for process in psutil.Process().parents() if is_launcher(process)]

    def watch() -> None:
        while all(map(is_there, launchers)):
            time.sleep(_SECONDS_BETWEEN_LOOKS_AT_LAUNCHER)
        logger.warning("The launcher is gone; this rank ends as for SIGTERM.")
        os.kill(os.getpid(), signal.SIGTERM)

    if launchers:
        threading.Thread(target=watch, daemon=True).start()


def zero_division(training: TrainingArguments) -> ZeroDivision | None:
    """Return how parameters are divided as they are loaded: among the ranks under ZeRO-3, else not."""
    deepspeed = getattr(training, "hf_deepspeed_config", None)  # set by transformers only with DeepSpeed
    return ZeroDivision(deepspeed.config) if deepspeed is not None and deepspeed.is_zero3() else None


def leave_ranks(watch: "RankWatch | None") -> None:
    """End this process's part in a run that went well, when all ranks are through."""
    if watch is not None:
        watch.finish()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        if watch is not None:
            watch.stop()
        torch.distributed.destroy_process_group()


def is_communication_error(error: BaseException) -> bool:
    """Whether an error says that another rank could not be reached, so that the cause lies there."""
    if isinstance(error, torch.distributed.DistError):
        return True
    marks = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)


def check_shared_output(training: TrainingArguments) -> None:
    """Check that all ranks see the same output directory, or that each machine is to write its own.

    Every rank writes its part of a checkpoint: its random numbers, and under DeepSpeed its share of the optimizer. If
    `output_dir` is a folder of its own on each machine, the parts never come together, and a resumed rank may find
    another checkpoint than the others, or none. Nothing would tell before the run is lost, so it is asked first.

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
    """Return the ranks for which a path leads to another folder than for the first rank, which makes it.

    All ranks call this together.
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
    """Check that all ranks found the checkpoint of the same step, or none to resume from.

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
    """
    if training.world_size == 1:
        return
    while not is_done():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    torch.distributed.barrier()


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
