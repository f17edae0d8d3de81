"""The training loop: transformers' `Trainer` with LLaVA's parameter groups, sampler and complete checkpoints.

Only hooks are overridden. What is notable: a checkpoint holds all that is trained, under its name when it is whole, and
is restored strictly; the evaluation loss is a mean over tokens; a non-finite loss or gradient ends the run in its step,
naming the records; a log entry says how fast the run is.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from llava_ft.checkpoint.names import MANIFEST, OPTIMIZER, RANKS, RUN_CONFIG, SCHEDULER
from llava_ft.checkpoint.restore import restore_trained
from llava_ft.checkpoint.resume import RankLayout, delete_old_checkpoints, open_saved_optimizer, read_ranks
from llava_ft.checkpoint.save import WEIGHT_FILES, move_files, publish_directory, result_kind, write_json
from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.image_processor import PixelNormalizer, normalize_batch
from llava_ft.data.sampler import EpochSampler
from llava_ft.errors import BadSampleError, CheckpointError, RunError
from llava_ft.training.artifacts import RunArtifacts
from llava_ft.training.callbacks import ignore_signals
from llava_ft.training.fragments import value_setter
from llava_ft.training.optim import format_table, parameter_groups, parameter_table
from llava_ft.training.optimizer_state import load_optimizer, restore_schedule, save_optimizer
from llava_ft.training.output_dir import matching_files
from llava_ft.training.speed import SpeedMeter, measure_product_rate

logger = logging.getLogger(__name__)

_STAGING: Final = ".incomplete"
_MUCH_WAITING: Final = 0.1
_STEPS_TO_GET_UNDER_WAY: Final = 20


class LlavaTrainer(Trainer):
    """Trains a LLaVA model; an interrupted run goes on as if it had not been.

    Args:
        artifacts: What every save writes.
        train_sampler: Order of the training records.
        describe_record: Names the record with an index of the training data, for messages.
        loss_normalization: `tokens` divides the summed loss of an optimizer step by its supervised tokens;
            `micro_batch` averages the means of the micro-batches, as original LLaVA does.
        bad_sample_limit: Share of the samples seen that may turn out unreadable before the run is ended.
        pixel_normalizer: Turns the bytes of pictures into what the vision tower reads, on the device.
        speed: Measures the run for its log.
        **kwargs: For `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        artifacts: RunArtifacts,
        train_sampler: EpochSampler,
        describe_record: Callable[[int], str],
        loss_normalization: Literal["tokens", "micro_batch"] = "tokens",
        bad_sample_limit: float = 0.05,
        pixel_normalizer: PixelNormalizer | None = None,
        speed: SpeedMeter | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.artifacts = artifacts
        self._train_sampler = train_sampler
        self.bad_samples: list[BadSampleError] = []
        self._describe_record = describe_record
        self._bad_sample_limit = bad_sample_limit
        self._pixel_normalizer = pixel_normalizer
        self._speed = SpeedMeter() if speed is None else speed
        self._has_said_that_it_waits = False
        self._records_in_step: list[int] = []
        self._losses_in_step: list[torch.Tensor] = []
        self._num_samples_seen = 0
        self._rate_of_last_group = 0.0
        if loss_normalization == "micro_batch":
            self.model_accepts_loss_kwargs = False

    # Data and devices

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Let gradients lie where data parallelism sends them from; leave compiling to `compile.py`."""
        found = super()._build_accelerator_args(**kwargs)
        for handler in found["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True
        found["dynamo_plugin"] = TorchDynamoPlugin(backend="no")  # pyright: ignore[reportArgumentType] - or its enum
        return found

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return self._train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training data, whose workers leave signals to the run."""
        loader = super().get_train_dataloader()
        base: Any = getattr(loader, "base_dataloader", loader)  # what accelerate iterates over
        base.worker_init_fn = partial(ignore_signals, base.worker_init_fn)
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keep what the model takes; note the records and what could not be read."""
        inputs = dict(inputs)
        indices = inputs.pop("sample_indices", [])
        bad = inputs.pop("bad_samples", [])
        num_tokens, num_pairs = inputs.pop("num_tokens", 0), inputs.pop("num_pairs", 0)
        if self._trained_model.training:
            self._records_in_step += indices
            self._num_samples_seen += len(indices)
            self._note_bad_samples(bad)
            self._speed.add(inputs, num_samples=len(indices), num_tokens=num_tokens, num_pairs=num_pairs)
        return normalize_batch(super()._prepare_inputs(inputs), self._pixel_normalizer)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Fetch the batches of a step, noting how long that takes."""
        return super().get_batch_samples(self._speed.timed(epoch_iterator), num_batches, device)

    def _note_bad_samples(self, bad: list[BadSampleError]) -> None:
        for error in bad:
            logger.warning("Not trained on: %s", error)
        self.bad_samples += bad
        allowed = max(10.0, self._bad_sample_limit * self._num_samples_seen)
        if len(self.bad_samples) > allowed:
            raise RunError(
                f"{len(self.bad_samples)} of {self._num_samples_seen} samples could not be read, more than "
                f"bad_sample_limit allows ({self._bad_sample_limit:g}). The last one: {self.bad_samples[-1]} "
                "Is the image folder still there?"
            )

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer with LLaVA's parameter groups, and log what is trained."""
        if self.optimizer is not None:
            return self.optimizer
        model = self._trained_model if model is None else model
        groups = parameter_groups(
            model,
            self.artifacts.plan,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
        )
        rows = parameter_table(model, groups)
        self.artifacts.table = [asdict(row) for row in rows]
        if self.is_world_process_zero():
            logger.info("What is trained:\n%s", format_table(rows, model))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
        for group in groups:
            del group["names"]
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # Steps

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `transformers.Trainer.train`. What the device can do is measured first.

        Raises:
            RunError: Not one sample could be read.
        """
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self._speed.product_rate = measure_product_rate(self.args.device, dtype)
        output = super().train(*args, **kwargs)
        counts = torch.tensor([self._num_samples_seen, len(self.bad_samples)], device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(counts)
        seen, bad = counts.tolist()
        if seen and bad == seen:
            examples = f" The first: {self.bad_samples[0]}" if self.bad_samples else ""
            raise RunError(
                f"None of the {seen} samples of this run could be read, so it has learnt nothing and writes no result."
                f"{examples} Is the image folder right?"
            )
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward on a micro-batch, and keep the loss for `_get_grad_norm`."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses_in_step.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm of a whole step; wait for the device once, to look at it and at the losses.

        Raises:
            RunError: A loss is not finite, or the norm is not and no float16 scaling expects that.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        checked = torch.stack(self._losses_in_step)
        if norm is not None and not self.args.fp16:
            checked = torch.cat([checked, torch.as_tensor(norm).to(checked)[None]])
        if not torch.isfinite(checked).all():
            number, value = next((i, v) for i, v in enumerate(checked.tolist()) if not math.isfinite(v))
            is_loss = number < len(self._losses_in_step)
            raise RunError(self._not_finite("loss" if is_loss else "gradient norm", value))
        self._records_in_step, self._losses_in_step = [], []
        self._rate_of_last_group = self.optimizer.param_groups[-1]["lr"]
        return norm

    def _not_finite(self, what: str, value: float) -> str:
        records = ", ".join(self._describe_record(index) for index in self._records_in_step[:16])
        return (
            f"The {what} is {value} in step {self.state.global_step + 1}. Records of this step: {records}. Nothing "
            "of this step is saved. Look at these records with `llava-ft inspect data`; if they are in order, lower "
            "learning_rate, or use bf16 instead of fp16. The last complete checkpoint can be resumed."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each group's learning rate and what was processed per second to a training entry."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self._speed.pop(self.args.device, self.args.world_size))
            self._say_that_it_waits(logs.get("data_wait", 0.0))
            if self.artifacts.plan.of("mm_projector").learning_rate is not None:
                logs["mm_projector_lr"] = self._rate_of_last_group
            if self.bad_samples:
                logs["bad_samples"] = len(self.bad_samples)
        super().log(logs, start_time)

    def _say_that_it_waits(self, share: float) -> None:
        """Say once, when the run is under way, that data come too slowly."""
        if self._has_said_that_it_waits or share < _MUCH_WAITING or self.state.global_step < _STEPS_TO_GET_UNDER_WAY:
            return
        self._has_said_that_it_waits = True
        logger.warning(
            "This run waits for data %.0f%% of its time. Raise dataloader_num_workers, which is %d; image_fast_decode "
            "and vision_cache make images cheaper.",
            100 * share,
            self.args.dataloader_num_workers,
        )

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the mean loss per supervised token over a data set, each record counted once."""
        with self._speed.paused(self.args.device):
            total, tokens, samples = self._sum_losses(dataloader)
        if tokens == 0:
            raise RunError("The validation data has no supervised token, so there is no loss to compute.")
        metrics = {
            f"{metric_key_prefix}_loss": total / tokens,
            f"{metric_key_prefix}_supervised_tokens": tokens,
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=samples)  # type: ignore[arg-type]

    def _sum_losses(self, dataloader: DataLoader) -> tuple[float, float, int]:
        """Return the summed loss, the supervised tokens, and the records, of all ranks.

        Ranks take turns batch by batch, and the last batches are filled up with the first records so that all ranks
        have as many; those are left out of the sums.
        """
        model, args = self._trained_model, self.args
        was_training = model.training
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=args.device)
        num_records = self.num_examples(dataloader)
        for number, batch in enumerate(dataloader):
            for error in batch.get("bad_samples", []):
                logger.warning("Not evaluated on: %s", error)
            inputs = self._prepare_inputs(batch)
            labels = inputs["labels"]
            first = (number * args.world_size + args.process_index) * args.eval_batch_size
            num_new = max(0, min(len(labels), num_records - first))
            labels[num_new:] = IGNORE_INDEX
            supervised = (labels[:, 1:] != IGNORE_INDEX).sum()
            with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
                loss = model(**inputs, num_items_in_batch=1).loss
            totals += torch.stack([loss.double(), supervised.double(), supervised.new_tensor(num_new).double()])
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        if args.world_size > 1:
            torch.distributed.all_reduce(totals)
        model.train(was_training)
        total, tokens, samples = totals.tolist()
        return total, tokens, int(samples)

    # Saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._speed.paused(self.args.device):
            self._write_checkpoint(Path(self._get_output_dir(trial=trial)))

    def _write_checkpoint(self, run_directory: Path) -> None:
        """Write `checkpoint-N`: staged beside its place, and renamed when every rank has written its part."""
        self.store_flos()
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
            delete_old_checkpoints(
                run_directory,
                self.args.save_total_limit,
                written=final,
                best=self.state.best_model_checkpoint,
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
                written = {path.name for path in staging.iterdir()}
                move_files(staging, target, first=RUN_CONFIG)  # tells another start whose half-written result it is
                for name in matching_files(target, WEIGHT_FILES[result_kind(self.artifacts.plan)]):
                    if name not in written:
                        (target / name).unlink()  # of an earlier result in another format, which readers may prefer
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

    # Resuming

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

    # What distributed training wraps

    @property
    def _trained_model(self) -> nn.Module:
        """The model without what data-parallel training wraps around it."""
        assert isinstance(self.model, nn.Module)
        return self.model

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
