"""Which recomputation makes a run fit: the ways there are, in order of what they compute again, until one fits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llava_ft.planning.flops import Counts, keeps_little, step_flops
from llava_ft.planning.memory import MemoryPlanner, RankMemory
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.shapes import ParameterShape, PlannedModel
from llava_ft.planning.step import Batch
from llava_ft.tuning.recompute import Recomputation

WAYS: Final = (
    Recomputation("none"),
    Recomputation("selective"),
    Recomputation("full", 4),
    Recomputation("full", 2),
    Recomputation("full"),
    Recomputation("full", offload=True),
)
"""What is tried. The inputs of layers go to the host's memory last: that costs time that is not counted in FLOPs."""


@dataclass(frozen=True)
class Way:
    """One way to recompute.

    Attributes:
        recomputation: What is computed again.
        share: FLOPs that are computed again, as a share of those that training needs.
        memory: What a rank takes.
    """

    recomputation: Recomputation
    share: float
    memory: RankMemory


def find_ways(
    planner: MemoryPlanner, planned: PlannedModel, request: PlanRequest, batch: Batch, capacity: int
) -> list[Way]:
    """Plan one way after the other until one fits.

    Args:
        planner: Plans memory.
        planned: The model.
        request: The run; what it says of recomputation is not looked at.
        batch: The micro-batch that takes most.
        capacity: Bytes that a rank has.

    Returns:
        What was tried, by FLOPs and in the order of `WAYS` where these are equal. If any fits it is the last one.
    """
    shapes = planner.shapes(request)
    wanted = [way for way in WAYS if _makes_a_difference(way, request)]
    shares = {way: _share(planned, shapes, request.changed(recomputation=way), batch) for way in wanted}
    tried: list[Way] = []
    for way in sorted(wanted, key=lambda way: (way.offload, shares[way])):
        memory = planner.plan(request.changed(recomputation=way), batch)
        tried.append(Way(way, shares[way], memory))
        if memory.total <= capacity:
            break
    return tried


def _makes_a_difference(way: Recomputation, request: PlanRequest) -> bool:
    if way.offload and request.machine.device == "cpu":
        return False
    return way.mode != "selective" or not keeps_little(request)


def _share(planned: PlannedModel, shapes: Sequence[ParameterShape], request: PlanRequest, batch: Batch) -> float:
    """FLOPs of a micro-batch that are computed again, over those that training needs."""
    flops = step_flops(planned, shapes, request)
    geometry = planned.config.image_geometry
    tiles = (
        0 if geometry is None or not batch.num_images else batch.num_images * geometry.num_tiles(batch.image_size_wh)
    )
    counts = Counts(
        positions=batch.size * batch.length,
        supervised=batch.num_supervised,
        pairs=batch.size * batch.length * (batch.length + 1) / 2,
        tiles=tiles,
    )
    return float(flops.recomputed.of(counts) / flops.model.of(counts))
