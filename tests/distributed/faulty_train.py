"""`train.py` in which one rank meets with an accident: `FAULT=WHAT:RANK:STEP`.

| WHAT | what happens to the rank |
| --- | --- |
| kill_training | it is killed when the step begins |
| kill_saving | it is killed in the save of the step, after the weights were written |
| kill_resuming | it is killed when it restores its optimizer |
| nan | its loss is not a number |
| raise | an error in its data |
| disk | the disk is full when it writes its optimizer |
"""

import os
import signal
import sys

import torch
from transformers import Trainer

from llava_ft.cli import main
from llava_ft.training import resumable_trainer
from llava_ft.training.trainer import LlavaTrainer

WHAT, RANK, STEP = os.environ["FAULT"].split(":")


def concerns(trainer: Trainer) -> bool:
    return os.environ["RANK"] == RANK and trainer.state.global_step + (WHAT not in ("kill_saving", "disk")) == int(STEP)


def before(owner: object, name: str, accident) -> None:
    """Let something happen before a method."""
    original = getattr(owner, name)

    def wrapped(self, *args, **kwargs):
        if concerns(self):
            accident()
        return original(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("the shelf is empty")


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def lose_the_loss(*args, **kwargs):
    loss = original_loss(*args, **kwargs)
    return loss * torch.nan if concerns(args[0]) else loss


if WHAT == "kill_training":
    before(LlavaTrainer, "training_step", kill)
elif WHAT == "kill_saving":
    before(LlavaTrainer, "_save_optimizer_and_scheduler", kill)
elif WHAT == "disk":
    before(LlavaTrainer, "_save_optimizer_and_scheduler", full_disk)
elif WHAT == "raise":
    before(LlavaTrainer, "training_step", fail)
elif WHAT == "kill_resuming" and os.environ["RANK"] == RANK:
    assert resumable_trainer.load_optimizer
    resumable_trainer.load_optimizer = lambda *_: kill()
elif WHAT == "nan":
    original_loss = LlavaTrainer.compute_loss
    LlavaTrainer.compute_loss = lose_the_loss

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
