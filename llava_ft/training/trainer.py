"""The training loop: transformers' `Trainer` with LLaVA's parameter groups, sampler and complete checkpoints.

Only hooks are overridden. What is notable: checkpoints are complete (`resumable_trainer.py`); the evaluation loss is a
mean over tokens; a non-finite loss or gradient ends the run in its step, naming the records; a log
entry says how fast the run is.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Final, Literal

import torch
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.image_processor import PixelNormalizer, normalize_batch
from llava_ft.errors import BadSampleError, RunError
from llava_ft.training.optim import format_table, num_values, parameter_groups, parameter_table
from llava_ft.training.resumable_trainer import ResumableTrainer
from llava_ft.training.speed import SpeedMeter, measure_product_rate

logger = logging.getLogger(__name__)

_MUCH_WAITING: Final = 0.1
_STEPS_TO_GET_UNDER_WAY: Final = 20


class LlavaTrainer(ResumableTrainer):
    """Trains a LLaVA model.

    Args:
        describe_record: Names the record with an index of the training data, for messages.
        loss_normalization: `tokens` divides the summed loss of an optimizer step by its supervised tokens;
            `micro_batch` averages the means of the micro-batches, as original LLaVA does.
        mm_projector_lr: Learning rate of the projector, if it has its own.
        bad_sample_limit: Share of the samples seen that may turn out unreadable before the run is ended.
        pixel_normalizer: Turns the bytes of pictures into what the vision tower reads, on the device.
        speed: Measures the run for its log.
        **kwargs: For `ResumableTrainer`.
    """

    def __init__(
        self,
        *,
        describe_record: Callable[[int], str],
        loss_normalization: Literal["tokens", "micro_batch"] = "tokens",
        mm_projector_lr: float | None = None,
        bad_sample_limit: float = 0.05,
        pixel_normalizer: PixelNormalizer | None = None,
        speed: SpeedMeter | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.bad_samples: list[BadSampleError] = []
        self._describe_record = describe_record
        self._mm_projector_lr = mm_projector_lr
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
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            mm_projector_lr=self._mm_projector_lr,
        )
        rows = parameter_table(model, groups)
        self.artifacts.table = [asdict(row) for row in rows]
        if self.is_world_process_zero():
            logger.info("What is trained:\n%s", format_table(rows, num_values(model)))
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
        for group in groups:
            del group["names"]
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # Steps

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `transformers.Trainer.train`. What the device can do is measured first."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self._speed.product_rate = measure_product_rate(self.args.device, dtype)
        return super().train(*args, **kwargs)

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
            if self._mm_projector_lr is not None:
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

    # Evaluation and saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._speed.paused(self.args.device):
            super()._save_checkpoint(model, trial)

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
