"""Reactions to events of a run: stop signals, epochs, and the log on the terminal."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_ft.data.sampler import EpochSampler

logger = logging.getLogger(__name__)

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Ask a run to save and end. Schedulers send SIGTERM or SIGUSR1, a closed terminal SIGHUP, Ctrl-C SIGINT."""

_SECONDS_OF_ONE_WISH: Final = 3.0
"""A group of processes gets a signal from whoever sends it, and then from its launcher again."""


class StopOnSignal(TrainerCallback):
    """Saves a complete checkpoint and ends the run when one of `SIGNALS` arrives.

    The step under way is finished first. A second signal, some seconds later, ends the process at once. With several
    ranks the wish is shared after each step, so that all of them stop at the same one.

    Attributes:
        received: Name of the signal that ended the run, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._time = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Take over the signals, but for those that are ignored, as SIGHUP is under nohup."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._remember)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Ask for a save and the end of the run."""
        is_wished = self.received is not None
        if args.world_size > 1:  # a signal may reach one rank alone, and all have to stop at the same step
            wish = torch.tensor(int(is_wished), device=args.device)
            torch.distributed.all_reduce(wish, op=torch.distributed.ReduceOp.MAX)
            is_wished = bool(wish)
        if is_wished:
            if self.received is None:
                self.received, self._time = "a signal to another rank", time.monotonic()
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Give the signals back, but for a run that was stopped: it is to be saved whoever repeats the wish."""
        if self.received is None:
            self.release()

    def release(self) -> None:
        """Give the signals back to whoever had them; for a run that ends in an error, or has been saved."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def ignore(self) -> None:
        """Let signals pass by; for a rank that is about to end anyway."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signal.Signals(number).name, time.monotonic()
            logger.warning("%s received: finishing this step, then saving. Another one stops at once.", self.received)
        elif time.monotonic() - self._time > _SECONDS_OF_ONE_WISH:
            self.release()
            os.kill(os.getpid(), number)


def ignore_signals(initialise: Callable[[int], None] | None, worker: int) -> None:
    """Begin a data worker that leaves signals to the run, which needs its batches to finish the step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if initialise is not None:
        initialise(worker)


class SetSamplerEpoch(TrainerCallback):
    """Tells the sampler which epoch begins.

    Accelerate does so too, but does not reach a sampler behind the wrappers it adds when a run is resumed.
    """

    def __init__(self, sampler: EpochSampler):
        self._sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Set the epoch, counted from 0."""
        self._sampler.set_epoch(int(state.epoch or 0))


class Progress(ProgressCallback):
    """The progress bar, with each log entry above it as one line."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any):
        """Write the entry; rates keep four significant digits."""
        if state.is_world_process_zero and logs and self.training_bar is not None:
            self.training_bar.write(_log_line(state, logs), file=sys.stderr)


class LogLines(TrainerCallback):
    """Each log entry as one line, where there is no terminal for a bar."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any):
        """Write the entry."""
        if state.is_world_process_zero and logs:
            logger.info("%s", _log_line(state, logs))


def _log_line(state: TrainerState, logs: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    values = "  ".join(f"{key} {shown(value)}" for key, value in logs.items())
    return f"step {state.global_step}/{state.max_steps}  {values}"
