"""Several ranks: joining them, loading a model divided among them, and ending together.

A rank is one process with one device. Launchers (`deepspeed`, `torchrun`) say through RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT which one a process is; a process that was started alone is the only one.
"""

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
from transformers import TrainingArguments

from llava_ft.args import ParsedArgs
from llava_ft.errors import UserError
from llava_ft.training.fragments import ZeroDivision
from llava_ft.training.watch import RankWatch

logger = logging.getLogger(__name__)

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: Position among all ranks, from 0.
        local_rank: Position among the ranks on this machine, from 0.
        world_size: Number of ranks.
    """

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0


def join_ranks(args: ParsedArgs) -> tuple[Ranks, RankWatch | None]:
    """Make this process one of the run's ranks. Call before `args.training`, which takes the device.

    Args:
        args: The request.

    Returns:
        Which rank it is, and a watch over the others if there are any.

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
        _start_deepspeed_on_cpu(timedelta(seconds=int(str(args.inherited.get("ddp_timeout", 1800)))))
    _ = args.training  # joins the process group
    ranks = Ranks(args.training.process_index, args.training.local_process_index, args.training.world_size)
    if ranks.world_size == 1:
        return ranks, None
    return ranks, RankWatch.connect(ranks.rank, ranks.world_size, ranks.local_rank)


def zero_division(training: TrainingArguments) -> ZeroDivision | None:
    """Return how parameters are divided as they are loaded: among the ranks under ZeRO-3, else not."""
    deepspeed = getattr(training, "hf_deepspeed_config", None)  # set by transformers only with DeepSpeed
    return ZeroDivision(deepspeed.config) if deepspeed is not None and deepspeed.is_zero3() else None


def leave_ranks(watch: RankWatch | None) -> None:
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


def _start_deepspeed_on_cpu(timeout: timedelta) -> None:
    """Open the process group through DeepSpeed, which divides models only in a group it opened itself.

    DeepSpeed's shared-memory reduction is switched off first: training does not use it, building it takes a compiler
    and a minute, and it leaves 66 MB per rank in /dev/shm.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    setattr(deepspeed.ops, "__compatible_ops__", {ShareMemCommBuilder.NAME: False})  # noqa: B010 - it has no such name yet
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False)
