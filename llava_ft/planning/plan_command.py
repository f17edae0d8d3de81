"""`llava-ft plan`: what a run will take, before any weight is loaded."""

import json
import logging
from dataclasses import dataclass, replace
from typing import Any, TextIO

from llava_ft.args import ParsedArgs
from llava_ft.errors import UserError
from llava_ft.planning.advice import Change, advise
from llava_ft.planning.disk import checkpoint_files, merged_base_bytes, vision_cache_bytes
from llava_ft.planning.fit import Way, find_ways
from llava_ft.planning.hardware import find_gpu
from llava_ft.planning.memory import MemoryPlanner, RankMemory
from llava_ft.planning.optimizers import optimizer_kind
from llava_ft.planning.placement import weight_bytes
from llava_ft.planning.request import Machine, PlanRequest, plan_machine, plan_request, training_values
from llava_ft.planning.run_time import TimeWishes, plan_time
from llava_ft.planning.scaling import StepTime
from llava_ft.planning.shapes import PARTS, ParameterShape, PlannedModel, find_planned_model
from llava_ft.planning.step import Batch
from llava_ft.planning.workload import Workload, find_workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartSummary:
    """One part of the model.

    Attributes:
        part: Its name.
        parameters: Number of values.
        trained: How many of them are trained.
        dtype: Type in memory, several joined by a plus sign.
        num_bytes: Memory of a rank that holds it whole.
    """

    part: str
    parameters: int
    trained: int
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        model: Its model.
        request: How it is trained, and where.
        workload: What it is trained on.
        batch: The micro-batch that takes most.
        parts: The model by part.
        memory: What a rank takes.
        most_if_supervised: What a rank takes if every text position is supervised; None if the records are known.
        epoch: Counts of records, tokens and steps; empty without records.
        checkpoint: Bytes by file of one checkpoint.
        result: Bytes by file of the result.
        vision_cache: Most bytes that the features of all images take; None without a vision cache or the records.
        merged_base: Bytes of the base that the run merges first; None if it merges none.
        time: Computed time of a step of the run, and of one with the same batch for each GPU on one machine; None on a
            CPU.
        changes: What to change; empty if the run fits or it is not known whether it does.
        ways: Ways to recompute that were tried, if one was to be chosen; the last one is the run's if it fits.
        notes: What was assumed or left out.
    """

    model: PlannedModel
    request: PlanRequest
    workload: Workload
    batch: Batch
    parts: list[PartSummary]
    memory: RankMemory
    most_if_supervised: int | None
    epoch: dict[str, Any]
    checkpoint: dict[str, int]
    result: dict[str, int]
    vision_cache: int | None
    merged_base: int | None
    time: tuple[StepTime, StepTime] | None
    changes: list[Change]
    ways: list[Way]
    notes: list[str]

    @property
    def fits(self) -> bool | None:
        """Whether a rank's memory is enough; None if it is not known."""
        capacity = self.request.machine.memory
        return None if capacity is None else self.memory.total <= capacity


def run_plan(
    args: ParsedArgs,
    output: TextIO,
    *,
    gpus: int | None,
    nodes: int,
    gpu_memory: str | None,
    as_json: bool,
    time: TimeWishes | None = None,
    fit: bool = False,
) -> bool:
    """Write the plan of a run.

    Args:
        args: The run's flags.
        output: Where to.
        gpus: GPUs on each machine; None asks this one.
        nodes: Machines.
        gpu_memory: Memory of a GPU, such as `24GiB`; None asks this machine.
        as_json: Whether to write JSON instead of text to read.
        time: What times are to be worked out from. A GPU named there has the memory that its data sheet says, unless
            `gpu_memory` is given.
        fit: Whether to choose the recomputation that costs least among those that fit, instead of taking the run's.

    Returns:
        False if the run does not fit.

    Raises:
        UserError: The request is wrong, or such a run would be refused.
    """
    from llava_ft.planning.report import as_dict, as_text

    wishes = time or TimeWishes()
    machine = plan_machine(args.inherited, gpus=gpus, nodes=nodes, gpu_memory=gpu_memory)
    if wishes.gpu and not gpu_memory and machine.device == "cuda":
        gpu = find_gpu(wishes.gpu)
        machine = replace(machine, memory=gpu.memory, memory_source=f"data sheet of {gpu.name}")
    plan = make_plan(args, machine, wishes, fit=fit)
    output.write(json.dumps(as_dict(plan), indent=1) + "\n" if as_json else as_text(plan) + "\n")
    return plan.fits is not False


def make_plan(args: ParsedArgs, machine: Machine, time: TimeWishes | None = None, *, fit: bool = False) -> Plan:
    """Plan a run.

    Args:
        args: The run's flags.
        machine: Where it is to take place.
        time: What times are to be worked out from.
        fit: Whether to choose the recomputation.

    Raises:
        UserError: Such a run would be refused, or there is no memory to fit into.
    """
    planned = find_planned_model(args)
    request = plan_request(args, machine, hidden_size=planned.config.hidden_size, has_vision=planned.has_vision)
    values = training_values(args, machine)
    workload = find_workload(args, planned)
    planner = MemoryPlanner(planned)
    shapes = planner.shapes(request)
    batch = workload.largest_batch(request.batch_size)
    request, ways = _fitted(planner, planned, request, batch) if fit else (request, [])
    memory = planner.plan(request, batch)
    knows_data = workload.records is not None and workload.records.are_measured
    most = None
    if not knows_data:
        most = planner.plan(request, workload.largest_batch(request.batch_size, supervise_all=True)).total
    changes: list[Change] = []
    if machine.memory is not None and memory.total > machine.memory:
        logger.info("The run does not fit; looking for what to change.")
        changes = advise(planner, request, workload, machine.memory)
    _, optimizer_note = optimizer_kind(request.optimizer)
    saves_tower = args.flags.save_vision_tower or planned.holds_vision_tower
    files = {"weights_format": args.flags.weights_format, "save_vision_tower": saves_tower}
    return Plan(
        model=planned,
        request=request,
        workload=workload,
        batch=batch,
        parts=summarise(shapes, request),
        memory=memory,
        most_if_supervised=most,
        epoch=workload.epoch(request, values),
        checkpoint=checkpoint_files(shapes, request, **files),
        result=checkpoint_files(shapes, request, **files, is_final=True),
        vision_cache=_vision_cache(args, planned, request, workload),
        merged_base=merged_base_bytes(shapes, planned),
        time=plan_time(args, planned, shapes, request, workload, values, time or TimeWishes()),
        changes=changes,
        ways=ways,
        notes=[*args.notes, *planned.notes, *workload.notes, *([optimizer_note] if optimizer_note else [])],
    )


def _fitted(
    planner: MemoryPlanner, planned: PlannedModel, request: PlanRequest, batch: Batch
) -> tuple[PlanRequest, list[Way]]:
    """Choose the recomputation; returns the run with it, or as it is if none fits, and what was tried.

    Raises:
        UserError: There is no memory to fit into.
    """
    capacity = request.machine.memory
    if capacity is None:
        raise UserError(
            "--fit chooses by the memory of a GPU, and this machine has no GPU. Give --gpu-memory, such as 24GiB, or "
            "name a kind with --gpu."
        )
    ways = find_ways(planner, planned, request, batch, capacity)
    if ways[-1].memory.total > capacity:
        return request, ways
    return request.changed(recomputation=ways[-1].recomputation), ways


def _vision_cache(args: ParsedArgs, planned: PlannedModel, request: PlanRequest, workload: Workload) -> int | None:
    if args.data.vision_cache is None or not planned.has_vision or workload.records is None:
        return None
    if not workload.records.are_measured:
        return None
    return vision_cache_bytes(workload.records.num_tiles, planned, request.compute_dtype, args.data.vision_cache_dtype)


def summarise(shapes: list[ParameterShape], request: PlanRequest) -> list[PartSummary]:
    """Add up parameters by part of the model."""
    summaries: list[PartSummary] = []
    for part in PARTS:
        members = [shape for shape in shapes if shape.part == part]
        if not members:
            continue
        dtypes = {_dtype_name(shape, request) for shape in members}
        summaries.append(
            PartSummary(
                part=part,
                parameters=sum(shape.numel for shape in members),
                trained=sum(shape.numel for shape in members if shape.is_trained),
                dtype=" + ".join(sorted(dtypes, reverse=True)),
                num_bytes=sum(weight_bytes(shape, request) for shape in members),
            )
        )
    return summaries


def _dtype_name(shape: ParameterShape, request: PlanRequest) -> str:
    if shape.packed_bytes is not None:
        return str(request.quantization)
    return str(shape.dtype if request.zero is None else request.compute_dtype).removeprefix("torch.")
