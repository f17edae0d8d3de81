"""A trainer whose checkpoints are complete: all that is trained, under its name when it is whole, restored strictly.

Only hooks of transformers' `Trainer` are overridden.
"""

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from llava_ft.checkpoint.names import MANIFEST, OPTIMIZER, RANKS, SCHEDULER
from llava_ft.checkpoint.optimizer import open_saved_optimizer
from llava_ft.checkpoint.restore import restore_trained
from llava_ft.checkpoint.resume import RankLayout, read_ranks
from llava_ft.checkpoint.save import move_files, publish_directory, write_json
from llava_ft.data.sampler import EpochSampler
from llava_ft.errors import CheckpointError, RunError
from llava_ft.training.artifacts import RunArtifacts
from llava_ft.training.fragments import value_setter
from llava_ft.training.optimizer_state import load_optimizer, restore_schedule, save_optimizer

logger = logging.getLogger(__name__)

_STAGING = ".incomplete"


class ResumableTrainer(Trainer):
    """Saves and restores all that a run needs to go on as if it had not been interrupted.

    Args:
        artifacts: What every save writes.
        train_sampler: Order of the training records.
        **kwargs: For `transformers.Trainer`.
    """

    def __init__(self, *, artifacts: RunArtifacts, train_sampler: EpochSampler, **kwargs: Any):
        super().__init__(**kwargs)
        self.artifacts = artifacts
        self._train_sampler = train_sampler

    @property
    def _trained_model(self) -> nn.Module:
        """The model without what data-parallel training wraps around it."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, *args: Any, **kwargs: Any
    ) -> tuple[int, int]:
        """Restore the position; a run that is at its last step has no epoch left, also in the middle of one."""
        position = super()._init_training_state(max_steps, num_update_steps_per_epoch, *args, **kwargs)
        checkpoint = args[1] if len(args) > 1 else kwargs.get("resume_from_checkpoint")
        earlier = read_ranks(Path(checkpoint)) if checkpoint else None
        if earlier is not None and (difference := earlier.difference(self._ranks())):
            position = self._position_in_other_steps(difference, num_update_steps_per_epoch)
        return position if self.state.global_step < max_steps else (self.state.num_train_epochs, 0)

    def _position_in_other_steps(self, difference: str, steps_per_epoch: int) -> tuple[int, int]:
        """Find the position in the data, and in a schedule counted in epochs, when steps are other ones than before."""
        epochs = self.state.epoch or 0.0
        step, whole_epochs = round(epochs * steps_per_epoch), int(epochs)
        logger.warning(
            "Since this checkpoint was made, steps have changed: %s. The run goes on at the same share of the data "
            "(epoch %.3f)%s.",
            difference,
            epochs,
            "" if self.args.max_steps > 0 else f", which is step {step} in these steps",
        )
        if self.args.max_steps <= 0:
            self.state.global_step = step
        return whole_epochs, (step - whole_epochs * steps_per_epoch) * self.args.gradient_accumulation_steps

    def _ranks(self) -> RankLayout:
        per_rank = self._train_batch_size * self.args.gradient_accumulation_steps
        return RankLayout(self.args.world_size, per_rank * self.args.world_size, len(self._train_sampler))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore this rank's random numbers; with another number of ranks each gets new ones from seed and step.

        Raises:
            CheckpointError: The file does not hold what it should.
        """
        earlier = read_ranks(Path(checkpoint)) if checkpoint else None
        if earlier is None or earlier.world_size == self.args.world_size:
            try:
                super()._load_rng_state(checkpoint)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise CheckpointError(
                    f"The random numbers saved in {checkpoint} are incomplete ({type(error).__name__}: {error}), so "
                    "the run could not go on as it was. Remove its rng_state*.pth to go on with others."
                ) from error
            return
        set_seed((self.args.seed + 7919 * self.state.global_step + 104729 * self.args.process_index) % 2**32)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N`: staged beside its place, and renamed when every rank has written its part."""
        self.store_flos()
        run_directory = Path(self._get_output_dir(trial=trial))
        final = run_directory / f"checkpoint-{self.state.global_step}"
        staging = run_directory / f".{final.name}{_STAGING}"
        if self.state.best_global_step:
            best = run_directory / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.artifacts.write(staging if self.args.should_save else None, self._trained_model, is_final=False)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                self._save_rng_state(str(staging))
            if self.args.should_save:
                self._save_trainer_state(staging)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.artifacts.write_manifest(staging, self.state.global_step)
                publish_directory(staging, final)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise RunError(
                f"{final} could not be written: {error}. Checkpoints written earlier are untouched. Free some "
                "space, or keep fewer with --save_total_limit, and start the same command again to resume."
            ) from error
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_directory),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def _save_trainer_state(self, directory: Path) -> None:
        states = cast(dict[str, Any], self.state.stateful_callbacks)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = callback.__class__.__name__
                several = states.get(name)
                states[name] = [*several, callback.state()] if isinstance(several, list) else callback.state()
        self.state.save_to_json(str(directory / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the result of the run into the output directory, complete, with its manifest."""
        target = Path(output_dir or self.args.output_dir or ".")
        staging = target / f".result{_STAGING}"
        try:
            if not self.args.should_save:
                self.artifacts.write(None, self._trained_model, is_final=True)
            else:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                self.artifacts.write(staging, self._trained_model, is_final=True)
                self.state.save_to_json(str(staging / "trainer_state.json"))
                (target / MANIFEST).unlink(missing_ok=True)  # not complete while its files are replaced
                move_files(staging, target)
                staging.rmdir()
                self.artifacts.write_manifest(target, self.state.global_step)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise RunError(
                f"The result could not be written to {target}: {error}. The checkpoints in it are untouched; free some "
                "space and start the same command again."
            ) from error
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the optimizer's state by name of parameter, or each rank's part of it under ZeRO; and the scheduler."""
        directory = Path(output_dir)
        if self._zero_optimizer is not None:
            self._engine.save_checkpoint(
                output_dir, tag=f"global_step{self.state.global_step}", exclude_frozen_parameters=True
            )
        elif self.args.should_save:
            save_optimizer(self._torch_optimizer, self._trained_model, directory / OPTIMIZER)
        if self.args.should_save:
            torch.save(self._scheduler.state_dict(), directory / SCHEDULER)
            write_json(directory / RANKS, asdict(self._ranks()))

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any):
        """Build the optimizer and wrap the model as usual, then restore in one way whatever wraps them."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None:
            return prepared
        checkpoint = Path(resume_from_checkpoint)
        if self.is_deepspeed_enabled:  # its master weights are made of the model's, and have to be replaced after that
            put = value_setter(self._trained_model, self._zero_optimizer)
            restore_trained(self._trained_model, checkpoint, put=put)
            self._engine.global_steps = self.state.global_step
        saved = open_saved_optimizer(checkpoint)
        load_optimizer(saved, self._torch_optimizer, self._trained_model, self._zero_optimizer)
        optimizer: Any = self.optimizer
        restore_schedule(self._scheduler, optimizer, checkpoint / SCHEDULER)
        self._load_scaler(str(checkpoint))
        return prepared

    @property
    def _zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer where it divides the optimizer's state among the ranks, else None."""
        if not self.is_deepspeed_enabled or self._engine is None or not self._engine.zero_optimization():
            return None
        return self._engine.optimizer

    @property
    def _engine(self) -> Any:
        """DeepSpeed's engine; None before the model is wrapped."""
        return self.deepspeed

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without what distributed training wraps around it."""
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    @property
    def _scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule, which is there from the beginning of training on."""
        assert isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore everything trained; what is missing or left over is an error."""
        restore_trained(self._trained_model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Restore everything trained from the best checkpoint, the projector too."""
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info("The best checkpoint is %s (%s); its weights are the result.", best, self.state.best_metric)
        put = value_setter(self._trained_model, self._zero_optimizer)
        restore_trained(self._trained_model, Path(best), put=put)
