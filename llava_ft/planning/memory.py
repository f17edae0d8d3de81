"""The memory of one rank over a step: what it holds all the time, and what the step takes on top."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from llava_ft.planning.model import ParameterShape, build_model, parameter_shapes
from llava_ft.planning.placement import TEMPORARIES, place
from llava_ft.planning.request import Machine, PlanRequest, ZeroSettings
from llava_ft.planning.step import (
    ACTIVATIONS,
    BACKWARD,
    COPIES,
    GRADIENTS,
    LOGITS,
    VISION,
    Batch,
    StepTrace,
    trace_step,
)
from llava_ft.resolve import RunModel

START, OPTIMIZER_STEP = "start", "optimizer step"
OFFLOADED = "offloaded"
LAYER_INPUTS = "layer inputs"
COMPONENTS: Final = (
    "weights",
    "gathered weights",
    "optimizer state",
    GRADIENTS,
    "buckets",
    ACTIVATIONS,
    COPIES,
    LOGITS,
    VISION,
    OFFLOADED,
    TEMPORARIES,
)
"""What memory is for, in the order of the report."""

CUDA_CONTEXT: Final = 512 * 2**20
"""CUDA's context and the kernels' workspaces. An allowance, not a measurement: they differ by card and driver."""

COMMUNICATION: Final = 512 * 2**20
"""NCCL's buffers, with several GPUs. An allowance."""

FRAGMENTATION: Final = 0.05
"""Share of what is allocated that a GPU's caching allocator is allowed to lose to blocks that do not fit."""


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank, in bytes."""

    components: Mapping[str, Mapping[str, int]]  # by phase of a step, what is alive at its highest point, by purpose
    allowances: Mapping[str, int]  # what is added because it is not tensors
    host: Mapping[str, int]  # what is offloaded to the host's memory

    @property
    def phases(self) -> dict[str, int]:
        """For each phase the bytes of tensors at its highest point."""
        return {phase: sum(parts.values()) for phase, parts in self.components.items()}

    @property
    def peak_phase(self) -> str:
        """The phase that takes most."""
        phases = self.phases
        return max(phases, key=phases.__getitem__)

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the peak."""
        return max(self.phases.values())

    @property
    def total(self) -> int:
        """Bytes that the rank needs on its device."""
        return self.tensors + sum(self.allowances.values())


class MemoryPlanner:
    """Plans the memory of runs of one model; what was traced once is kept."""

    def __init__(self, run: RunModel):
        self.run = run
        self._traces: dict[tuple[object, ...], StepTrace] = {}
        self._shapes: dict[tuple[object, ...], list[ParameterShape]] = {}

    def shapes(self, request: PlanRequest) -> list[ParameterShape]:
        """List the parameters of the run's model."""
        key = (request.tuning, request.lora, request.quantization, request.compute_dtype, request.tower)
        if key not in self._shapes:
            self._shapes[key] = parameter_shapes(build_model(self.run, request), request)
        return self._shapes[key]

    def plan(self, request: PlanRequest, batch: Batch) -> RankMemory:
        """Plan one rank's memory with the micro-batch that takes most."""
        placement = place(self.shapes(request), request)
        needs_mask = batch.is_padded and request.attention == "eager"  # others are told where samples are
        batch = replace(batch, is_padded=needs_mask)
        # Runs that differ in what a trace does not see share it.
        seen = request.changed(
            machine=Machine(request.machine.device),
            batch_size=1,
            accumulation=1,
            optimizer="",
            max_steps=-1,
            num_epochs=1.0,
            zero=None if request.zero is None else ZeroSettings(),
        )
        key = (seen, batch, placement.gradients)
        if key not in self._traces:
            self._traces[key] = trace_step(build_model(self.run, request), request, batch, placement.gradients)
        trace = self._traces[key]

        always = {"weights": placement.weights, "optimizer state": placement.optimizer, "buckets": placement.buckets}
        components: dict[str, dict[str, int]] = {START: {"weights": placement.start}}
        for phase, peak in trace.peaks.items():
            parts = always | {"gathered weights": placement.gathered}
            for label, size in peak.items():
                parts[label] = parts.get(label, 0) + size
            if phase == BACKWARD:
                parts[GRADIENTS] = parts.get(GRADIENTS, 0) + placement.backward_gradients
                parts["buckets"] += placement.backward_buckets
            components[phase] = parts
        components[OPTIMIZER_STEP] = always | {
            GRADIENTS: placement.step_gradients,
            TEMPORARIES: placement.step_temporaries,
        }
        host = placement.host | ({LAYER_INPUTS: trace.on_host} if trace.on_host else {})
        if not request.on_gpu:  # what is offloaded is the rank's own, where both are one memory
            temporaries = host.pop(TEMPORARIES, 0)
            for phase, parts in components.items():
                if phase != START:
                    parts[OFFLOADED] = sum(host.values())
            components[OPTIMIZER_STEP][TEMPORARIES] += temporaries
            return RankMemory(components, {}, {})
        most = max(sum(parts.values()) for parts in components.values())
        allowances = {"CUDA context": CUDA_CONTEXT, "allocator": round(most * FRAGMENTATION)}
        if request.machine.world_size > 1:
            allowances["communication"] = COMMUNICATION
        return RankMemory(components, allowances, host)
