"""What the ranks of a run send each other in a step, by kind of parallelism.

N ranks, G bytes of gradients and W bytes of trained weights in the dtype they travel in, F bytes of all weights that
are used, a micro-batches a step. Each rank sends, times (N-1)/N:

| | each micro-batch | once a step |
| --- | --- | --- |
| no DeepSpeed (DDP) | | 2 G, float32 |
| ZeRO-0 | | 2 G |
| ZeRO-1 | | 2 G + W |
| ZeRO-2 | 2 G | W |
| ZeRO-3 | 2 F + G | |

ZeRO's paper (arXiv:1910.02054, section 7) has G in place of 2 G for stages 1 and 2: gradients reduced to the rank that
needs them. DeepSpeed all-reduces them in its default setting (`use_multi_rank_bucket_allreduce`), which is what is
counted. Under ZeRO-3 frozen weights travel too; those that the backward pass does not need (a frozen vision tower,
frozen embeddings) only once, and so do the last layers' as far as `stage3_max_reuse_distance` keeps them whole: between
the two uses of a weight lie, there and back, twice the weights behind it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from llava_ft.models.flops import tower_layers_read
from llava_ft.planning.hardware import Kind
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.shapes import ParameterShape, PlannedModel

Phase = Literal["forward", "backward", "step"]

DDP_BUCKET: Final = 25 * 2**20
"""Bytes that DDP reduces at a time, torch's default."""

_TOWER_LAYER: Final = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a part of a step.

    Attributes:
        what: What travels.
        kind: How.
        num_bytes: Size of the whole buffers of one round.
        calls: Into how many calls they are cut.
        phase: Beside what it runs; `step` is after the backward pass, beside nothing.
        rounds: How often in a step: once, or once for each micro-batch.
        is_hidden: Whether it can run beside computation.
    """

    what: str
    kind: Kind
    num_bytes: int
    calls: int
    phase: Phase
    rounds: int
    is_hidden: bool


def collectives(planned: PlannedModel, shapes: Sequence[ParameterShape], request: PlanRequest) -> list[Collective]:
    """List what a step of the run sends; empty with one rank.

    Args:
        planned: The model.
        shapes: Its parameters.
        request: The run.
    """
    if request.machine.world_size == 1:
        return []
    zero = request.zero
    values = sum(shape.numel for shape in shapes if shape.is_trained)
    if zero is None:
        num_bytes = sum(shape.numel * shape.dtype.itemsize for shape in shapes if shape.is_trained)
        calls = max(1, math.ceil(num_bytes / DDP_BUCKET))
        return [Collective("gradients", "all-reduce", num_bytes, calls, "backward", 1, is_hidden=True)]
    width = request.compute_dtype.itemsize
    calls = max(1, math.ceil(values / zero.reduce_bucket_size))
    if zero.stage == 3:
        return _stage_3(planned, shapes, request)
    is_each = zero.stage == 2
    gradients = Collective(
        "gradients",
        "all-reduce",
        values * width,
        calls,
        "backward" if is_each else "step",
        request.accumulation if is_each else 1,
        is_hidden=is_each and zero.overlap_comm,
    )
    if zero.stage == 0:
        return [gradients]
    return [gradients, Collective("weights", "all-gather", values * width, 1, "step", 1, is_hidden=False)]


def _stage_3(planned: PlannedModel, shapes: Sequence[ParameterShape], request: PlanRequest) -> list[Collective]:
    zero = request.zero
    assert zero is not None
    width = request.compute_dtype.itemsize
    divided = [shape for shape in shapes if shape.numel > zero.param_persistence_threshold]
    forward = sum(shape.numel for shape in divided if _is_used(planned, shape, request))
    backward = sum(
        shape.numel
        for shape in divided
        if shape.part != "vision tower" and (shape.part != "embeddings" or shape.is_trained)
    )
    backward -= min(backward, zero.max_reuse_distance // 2)
    trained = sum(shape.numel for shape in shapes if shape.is_trained)

    def gather(values: int, phase: Phase) -> Collective:
        calls = max(1, math.ceil(values / max(1, zero.prefetch_bucket_size)))
        return Collective("weights", "all-gather", values * width, calls, phase, request.accumulation, is_hidden=True)

    calls = max(1, math.ceil(trained / zero.reduce_bucket_size))
    return [
        gather(forward, "forward"),
        gather(backward, "backward"),
        Collective(
            "gradients",
            "reduce-scatter",
            trained * width,
            calls,
            "backward",
            request.accumulation,
            is_hidden=zero.overlap_comm,
        ),
    ]


def _is_used(planned: PlannedModel, shape: ParameterShape, request: PlanRequest) -> bool:
    """Whether a parameter is gathered in the forward pass: not that of a tower, or of its layers, that never run."""
    if shape.part != "vision tower":
        return True
    layer = _TOWER_LAYER.search(shape.name)
    return request.tower == "runs" and (layer is None or int(layer.group(1)) < tower_layers_read(planned.config))
