"""From a run's flags and data to the computed time of its steps: which GPU, which samples, in which order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from llava_ft.args import ParsedArgs
from llava_ft.errors import UserError
from llava_ft.planning.balance import Drawing, Samples
from llava_ft.planning.hardware import DEFAULT_GPU, GPUS, Gpu, find_gpu, gpu_of_device
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.scaling import DEFAULT_SHARE, StepTime, TimePlanner, TimeSettings
from llava_ft.planning.shapes import ParameterShape, PlannedModel
from llava_ft.planning.workload import SUPERVISED_SHARE, Workload

_STRATEGIES: Final = {"random": "random", "sequential": "sequential", "group_by_length": "length"}
"""The sampler's names by transformers'."""


@dataclass(frozen=True)
class TimeWishes:
    """What the request says about time, beside the run's flags.

    Attributes:
        gpu: Name of the kind of GPU; None is that of this machine, else `DEFAULT_GPU`.
        network: GB/s of a GPU's share of the network in each direction; None is that of the GPU's kind.
        mfu: Share of the peak at which matrix products run; None is `DEFAULT_SHARE`.
        tokens_per_sample: Positions of a sample where the records are not here; None is `model_max_length`.
    """

    gpu: str | None = None
    network: float | None = None
    mfu: float | None = None
    tokens_per_sample: int | None = None

    def settings(self) -> TimeSettings:
        """Settle what times are worked out from.

        Raises:
            UserError: A value makes no sense.
        """
        notes: list[str] = []
        gpu = find_gpu(self.gpu) if self.gpu else _gpu_of_this_machine()
        if gpu is None:
            gpu = GPUS[DEFAULT_GPU]
            notes.append(f"Times are for {gpu.name} GPUs; --gpu names another kind: {', '.join(GPUS)}.")
        share = DEFAULT_SHARE if self.mfu is None else self.mfu
        return TimeSettings(gpu, None if self.network is None else self.network * 1e9, share, tuple(notes))


def plan_time(
    args: ParsedArgs,
    planned: PlannedModel,
    shapes: list[ParameterShape],
    request: PlanRequest,
    workload: Workload,
    values: Mapping[str, Any],
    wishes: TimeWishes,
) -> tuple[StepTime, StepTime] | None:
    """Compute the time of a step of the run, and of one on a single machine; None for a run on a CPU.

    Args:
        args: The run's flags.
        planned: Its model.
        shapes: The model's parameters.
        request: The run.
        workload: Its data.
        values: Its training flags.
        wishes: What times are to be worked out from.

    Raises:
        UserError: A wish makes no sense.
    """
    settings = wishes.settings()
    samples, notes = samples_of(workload, planned, wishes.tokens_per_sample)
    if request.machine.device == "cpu":
        return None
    if request.zero is not None and (request.zero.offload_optimizer or request.zero.offload_param):
        notes.append("Times leave out what offloading costs: the way to the host's memory and the step of its CPU.")
    if request.quantization is not None:
        notes.append("Times leave out dequantising weights.")
    settings = TimeSettings(settings.gpu, settings.network, settings.share, (*settings.notes, *notes))
    planner = TimePlanner(planned, shapes, samples, _drawing(args, workload, values))
    return planner.plan(request, settings), planner.on_one_node(request, settings)


def samples_of(workload: Workload, planned: PlannedModel, tokens: int | None) -> tuple[Samples, list[str]]:
    """Return the samples that times are worked out for, and what is assumed about them.

    Raises:
        UserError: `tokens` makes no sense.
    """
    if tokens is not None and not 1 <= tokens <= workload.max_length:
        raise UserError(
            f"--tokens-per-sample is {tokens}. Allowed are numbers from 1 to model_max_length, {workload.max_length}."
        )
    geometry = planned.config.image_geometry
    is_seen = workload.tokens_per_image > 0  # with anyres perhaps no image fits into a sample
    tiles = geometry.num_tiles(workload.image_size_wh) if geometry is not None and is_seen else 0
    records = workload.records
    if records is not None and records.samples is not None:
        lengths, supervised, images = records.samples
        return Samples(lengths, supervised, images * tiles), []
    length = tokens or workload.max_length
    has_image = 0 < workload.tokens_per_image < length
    text = length - 1 - (workload.tokens_per_image if has_image else 0)
    notes = [
        f"Times take every sample to have {length} positions, so no rank waits for another and nothing is padded."
        + ("" if tokens else " --tokens-per-sample gives their mean.")
    ]
    return Samples.alike(length, max(1, round(text * SUPERVISED_SHARE)), tiles if has_image else 0), notes


def _drawing(args: ParsedArgs, workload: Workload, values: Mapping[str, Any]) -> Drawing:
    strategy = values.get("train_sampling_strategy", "random")
    order = _STRATEGIES[str(getattr(strategy, "value", strategy))]
    if args.flags.group_by_modality_length:
        order = "modality_length"
    packed = None if workload.records is None else workload.records.packed
    per_row = 1.0 if workload.records is None or packed is None else workload.records.num_usable / packed.num_rows
    return Drawing(order, workload.rows, 1, 1, 1, False, workload.max_length, per_row)


def _gpu_of_this_machine() -> Gpu | None:
    return gpu_of_device(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
