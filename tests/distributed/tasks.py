"""What the ranks of a pool are asked to do."""

import contextlib
import gc
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.conftest import RECORDINGS

_PLAIN_LINEAR = F.linear


@dataclass
class Result:
    """What a run did, as one rank saw it.

    Attributes:
        losses: Logged loss of each step.
        grad_norms: Logged gradient norms.
        eval_losses: Loss on the validation records after each evaluation.
        weights: Trained values after the last step, float32, by plain name.
        resumed: Name of the checkpoint that was resumed from, if any.
    """

    losses: dict[int, float] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    eval_losses: dict[int, float] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    resumed: str | None = None


def train(argv: list[str], callbacks: Sequence[Any] = ()) -> Result:
    """Train as one rank of a run.

    Args:
        argv: The command line of `train.py`.
        callbacks: Added to the trainer's.
    """
    os.chdir(RECORDINGS)
    warnings.simplefilter("ignore")
    try:
        return _train(argv, callbacks)
    finally:
        _forget_run()


def refusal(argv: list[str]) -> str | None:
    """Say why a run is refused, on this rank; None if it is not."""
    from llava_ft.errors import UserError

    try:
        train(argv)
    except UserError as error:
        return str(error)
    return None


def _train(argv: list[str], callbacks: Sequence[Any]) -> Result:
    from llava_ft.args import parse_args
    from llava_ft.training import speed
    from llava_ft.training.distributed import join_ranks
    from llava_ft.training.fragments import trained_parameters, whole_value
    from llava_ft.training.run import prepare_run

    vars(speed).update(_SECONDS_TO_MEASURE=0.0, _SIDE={"cpu": 64})
    args = parse_args(argv)
    watch = join_ranks(args)
    try:
        run = prepare_run(args)
        for callback in callbacks:
            run.trainer.add_callback(callback)
        with contextlib.redirect_stdout(None):
            run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        run.stop.release()
        history = run.trainer.state.log_history
        weights = {name: whole_value(p).cpu().clone() for name, p in trained_parameters(run.trainer.model).items()}
        run.trainer.save_model()
        return Result(
            losses={entry["step"]: entry["loss"] for entry in history if "loss" in entry},
            grad_norms={entry["step"]: entry["grad_norm"] for entry in history if "grad_norm" in entry},
            eval_losses={entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry},
            weights=weights if torch.distributed.get_rank() == 0 else {},
            resumed=run.checkpoint.name if run.checkpoint else None,
        )
    finally:
        if watch is not None:
            watch.stop()


def _forget_run() -> None:
    """Leave nothing of a run behind that would reach into the next one of this process."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    gc.collect()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    F.linear = torch.nn.functional.linear = _PLAIN_LINEAR  # ZeRO-3 puts its own in its place


def peak_of_loading(directory: str, config_file: str) -> tuple[int, int]:
    """Load a language model under ZeRO-3.

    Returns:
        Bytes of the whole model, and the most memory this rank took beyond what it had before, mapped files aside.
    """
    from llava_ft.args import parse_args
    from llava_ft.checkpoint.model import find_model, load_base
    from llava_ft.training.distributed import join_ranks, zero_division

    given = ["--model_name_or_path", directory, "--data_path", "none", "--output_dir", "none", "--use_cpu", "True"]
    args = parse_args([*given, "--deepspeed", config_file])
    watch = join_ranks(args)
    done = threading.Event()
    readings = [_memory()]

    def read_often() -> None:
        while not done.wait(0.001):
            readings.append(_memory())

    reader = threading.Thread(target=read_often)
    reader.start()
    try:
        base = find_model(directory)
        model, _ = load_base(base, dtype_of=lambda _: torch.float32, division=zero_division(args.training))
        return sum(4 * parameter.ds_numel for parameter in model.parameters()), max(readings) - readings[0]
    finally:
        done.set()
        reader.join()
        if watch is not None:
            watch.stop()
        _forget_run()


def _memory() -> int:
    """Bytes of memory of this process that no file stands for."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def checkpoints(output_dir: Path) -> list[str]:
    """Names of the complete checkpoints in a directory."""
    from llava_ft.checkpoint.manifest import what_is_incomplete

    return sorted(path.name for path in output_dir.glob("checkpoint-*") if what_is_incomplete(path) is None)
