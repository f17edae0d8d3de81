"""What a run will take, before any weight is loaded."""

import logging
from dataclasses import dataclass
from typing import Any

from llava_ft.args import ParsedArgs
from llava_ft.errors import UserError
from llava_ft.models.parts import PARTS
from llava_ft.planning.advice import Change, Way, advise, find_ways
from llava_ft.planning.disk import checkpoint_files, merged_base_bytes, vision_cache_bytes
from llava_ft.planning.memory import MemoryPlanner, RankMemory
from llava_ft.planning.model import ParameterShape
from llava_ft.planning.placement import KINDS, weight_bytes
from llava_ft.planning.request import Machine, PlanRequest, plan_request
from llava_ft.planning.step import Batch
from llava_ft.planning.workload import find_workload
from llava_ft.resolve import RunModel, resolve_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartSummary:
    """One part of the model."""

    part: str
    parameters: int  # number of values
    trained: int  # how many of them
    dtype: str  # in memory, several joined by a plus sign
    num_bytes: int  # on a rank that holds it whole


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts."""

    model: RunModel
    request: PlanRequest
    batch: Batch  # the micro-batch that takes most
    parts: list[PartSummary]
    memory: RankMemory
    most_if_supervised: int | None  # bytes of a rank if every text position is supervised; None if records are known
    epoch: dict[str, Any]  # counts of records, tokens and steps; empty without records
    checkpoint: dict[str, int]  # bytes by file
    result: dict[str, int]  # bytes by file
    vision_cache: int | None  # most bytes of all images' features; None without a vision cache or the records
    merged_base: int | None  # bytes of the base that the run merges first, if it merges one
    changes: list[Change]  # empty if the run fits or it is not known whether it does
    ways: list[Way]  # that were tried, if one was to be chosen; the last one is the run's if it fits
    notes: list[str]

    @property
    def fits(self) -> bool | None:
        """Whether a rank's memory is enough; None if it is not known."""
        capacity = self.request.machine.memory
        return None if capacity is None else self.memory.total <= capacity


def make_plan(args: ParsedArgs, machine: Machine, *, fit: bool = False) -> Plan:
    """Plan a run; with `fit` the recomputation that costs least among those that fit stands in for the run's.

    Raises:
        UserError: Such a run would be refused, or there is no memory to fit into.
    """
    run = resolve_model(args, need="config")
    request = plan_request(run, machine)
    workload, planner = find_workload(args, run), MemoryPlanner(run)
    batch, capacity = workload.largest_batch(request.batch_size), machine.memory
    ways: list[Way] = []
    if fit:
        if capacity is None:
            raise UserError(
                "--fit chooses by the memory of a GPU, and this machine has no GPU. Give --gpu-memory, such as 24GiB."
            )
        ways = find_ways(planner, request, batch, capacity)
        if ways[-1].memory.total <= capacity:
            request = request.changed(recomputation=ways[-1].recomputation)
    memory = planner.plan(request, batch)
    records, most = workload.measured, None
    if records is None:
        most = planner.plan(request, workload.largest_batch(request.batch_size, supervise_all=True)).total
    changes: list[Change] = []
    if capacity is not None and memory.total > capacity:
        logger.info("The run does not fit; looking for what to change.")
        changes = advise(planner, request, workload, capacity)
    cache = None
    if args.data.vision_cache is not None and run.spec.has_vision and records is not None:
        kept_as = args.data.vision_cache_dtype
        cache = vision_cache_bytes(records.num_tiles, run, request.compute_dtype, kept_as)
    shapes, notes = planner.shapes(request), [*args.notes, *run.spec.notes, *workload.notes]
    if request.optimizer not in KINDS:
        notes.append(f"optim {request.optimizer} is not known here; its state is counted like adamw_torch's.")
    saves_tower = args.flags.save_vision_tower or run.spec.holds_vision_tower
    files = {"weights_format": args.flags.weights_format, "save_vision_tower": saves_tower}
    return Plan(
        model=run,
        request=request,
        batch=batch,
        parts=summarise(shapes, request),
        memory=memory,
        most_if_supervised=most,
        epoch=workload.epoch(request),
        checkpoint=checkpoint_files(shapes, request, **files),
        result=checkpoint_files(shapes, request, **files, is_final=True),
        vision_cache=cache,
        merged_base=merged_base_bytes(shapes, run),
        changes=changes,
        ways=ways,
        notes=notes,
    )


def summarise(shapes: list[ParameterShape], request: PlanRequest) -> list[PartSummary]:
    """Add up parameters by part of the model."""

    def dtype_name(shape: ParameterShape) -> str:
        if shape.packed_bytes is not None:
            return str(request.quantization)
        return str(shape.dtype if request.zero is None else request.compute_dtype).removeprefix("torch.")

    by_part = {part: [shape for shape in shapes if shape.part == part] for part in PARTS}
    return [
        PartSummary(
            part=part,
            parameters=sum(shape.numel for shape in members),
            trained=sum(shape.numel for shape in members if shape.is_trained),
            dtype=" + ".join(sorted(set(map(dtype_name, members)), reverse=True)),
            num_bytes=sum(weight_bytes(shape, request) for shape in members),
        )
        for part, members in by_part.items()
        if members
    ]
