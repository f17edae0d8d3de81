"""`train.py` in which one rank meets with an accident: `FAULT=WHAT:RANK:STEP`.

| WHAT | what happens to the rank |
| --- | --- |
| kill_training | it is killed when the step begins |
| kill_saving | it is killed in the save of the step, after the weights were written |
| kill_resuming | it is killed when it restores its optimizer |
| nan | its loss is not a number |
| disk | the disk is full when it writes its optimizer |
"""

import os
import signal
import sys
from collections.abc import Callable

import torch

from llava_ft.cli import main
from llava_ft.training import trainer
from llava_ft.training.trainer import LlavaTrainer


def arrange(fault: str) -> None:
    """Let the accident happen in this process, if it is the rank that meets with it."""
    what, rank, step = fault.split(":")
    if os.environ["RANK"] != rank:
        return

    def before(name: str, accident: Callable[[], None], *, after_steps: int) -> None:
        original = getattr(LlavaTrainer, name)

        def wrapped(self, *args, **kwargs):
            if self.state.global_step == after_steps:
                accident()
            return original(self, *args, **kwargs)

        setattr(LlavaTrainer, name, wrapped)

    if what == "kill_training":
        before("training_step", kill, after_steps=int(step) - 1)
    elif what == "kill_saving":
        before("_save_optimizer_and_scheduler", kill, after_steps=int(step))
    elif what == "disk":
        before("_save_optimizer_and_scheduler", fill_disk, after_steps=int(step))
    elif what == "kill_resuming":
        assert trainer.load_optimizer
        trainer.load_optimizer = lambda *_: kill()
    elif what == "nan":
        compute_loss = LlavaTrainer.compute_loss

        def lose_the_loss(self, *args, **kwargs):
            loss = compute_loss(self, *args, **kwargs)
            return loss * torch.nan if self.state.global_step == int(step) - 1 else loss

        LlavaTrainer.compute_loss = lose_the_loss


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    raise OSError(28, "No space left on device")


def train(argv: list[str], fault: str | None = None) -> None:
    """Run `train.py` to its end."""
    if fault is not None:
        arrange(fault)
    sys.exit(main(["train", *argv]))


if __name__ == "__main__":
    train(sys.argv[1:], os.environ["FAULT"])
