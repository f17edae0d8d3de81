"""How long a step takes on many GPUs, computed from a stated model; nothing here is measured. See docs/scaling.md.

A step is its computation at an achievable share of the GPU's peak, the wait for the rank with the most work, the
communication that computation does not hide, and the optimizer's step at the memory's bandwidth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from llava_ft.errors import UserError
from llava_ft.planning.balance import Balance, Drawing, Samples, draw_balance
from llava_ft.planning.communication import Collective, collectives
from llava_ft.planning.flops import StepFlops, step_flops
from llava_ft.planning.hardware import MEMORY_EFFICIENCY, Fabric, Gpu
from llava_ft.planning.optimizers import optimizer_kind
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.shapes import ParameterShape, PlannedModel

DEFAULT_SHARE: Final = 0.4
"""Share of the peak rate at which a step's matrix products run. An assumption: the Llama 3 report
(arXiv:2407.21783, table 4) has 38-43% on H100s, communication included."""

HIDDEN_SHARE: Final = 0.8
"""Share of the time of computation beside which communication can run. An assumption."""

DECODED_PER_CORE_SECOND: Final = 112.4
"""Images of 640 x 480 pixels that a core loads a second: full decoding, 8-bit pixels, two workers, as measured in
benchmarks/results/data_path.md."""

COMPUTATION, RECOMPUTATION, WAITING, COMMUNICATION, OPTIMIZER = (
    "computation",
    "recomputation",
    "waiting for the slowest rank",
    "communication not hidden",
    "optimizer step",
)


@dataclass(frozen=True)
class TimeSettings:
    """What the time of a step is worked out from, beside the run.

    Attributes:
        gpu: The kind of GPU.
        network: Bytes a second of a GPU's share of the network in each direction; None is that of the GPU's kind.
        share: Share of the peak rate at which matrix products run.
        notes: What was assumed.
    """

    gpu: Gpu
    network: float | None = None
    share: float = DEFAULT_SHARE
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if not 0 < self.share <= 1:
            raise UserError(f"--mfu is {self.share}. Allowed is a share above 0 and up to 1, such as {DEFAULT_SHARE}.")
        if self.network is not None and not (self.network > 0 and math.isfinite(self.network)):
            raise UserError(f"--network is {self.network / 1e9}. Allowed are numbers above 0, in GB/s for each GPU.")


@dataclass(frozen=True)
class StepTime:
    """The computed time of a step.

    Attributes:
        settings: What it was worked out from.
        parts: Seconds by what they go to.
        samples: Samples of a step on all ranks.
        tokens: Positions of these samples, without padding.
        model_flops: FLOPs that training on them needs, all ranks together.
        computed_flops: FLOPs that are computed, with padding and recomputation.
        waiting: Work of the slowest rank over the average.
        collectives: What is sent.
        sent_bytes: What a rank sends in a step.
        hidden_seconds: Communication that runs beside computation.
        images: Images of a step.
        machine: Number of machines and of GPUs.
    """

    settings: TimeSettings
    parts: Mapping[str, float]
    samples: float
    tokens: float
    model_flops: float
    computed_flops: float
    waiting: float
    collectives: Sequence[Collective]
    sent_bytes: float
    hidden_seconds: float
    images: float
    machine: Fabric

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return sum(self.parts.values())

    @property
    def samples_per_second(self) -> float:
        """Samples a second of all GPUs."""
        return self.samples / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs a second over the peak of all GPUs."""
        return self.model_flops / self.seconds / (self.settings.gpu.flops * self.machine.world_size)

    @property
    def loading_cores(self) -> float:
        """Cores of each machine that decoding its images takes, all of them 640 x 480 pixels."""
        return self.images / self.seconds / self.machine.num_nodes / DECODED_PER_CORE_SECOND

    @property
    def limit(self) -> str:
        """What costs most beside computation."""
        others = {name: seconds for name, seconds in self.parts.items() if name != COMPUTATION}
        return max(others, key=others.__getitem__)


class TimePlanner:
    """Plans step times of runs of one model.

    Args:
        planned: The model.
        shapes: Its parameters.
        samples: What it is trained on.
        drawing: How samples become micro-batches; ranks, batch size and accumulation are put in from the request.
    """

    def __init__(
        self, planned: PlannedModel, shapes: Sequence[ParameterShape], samples: Samples, drawing: Drawing
    ) -> None:
        self._planned = planned
        self._shapes = shapes
        self._samples = samples
        self._drawing = drawing

    def plan(self, request: PlanRequest, settings: TimeSettings) -> StepTime:
        """Compute the time of a step."""
        flops = step_flops(self._planned, self._shapes, request)
        balance = draw_balance(self._samples, self._drawn_for(request), flops.computed)
        sent = collectives(self._planned, self._shapes, request)
        gpu, machine = settings.gpu, request.machine
        network = gpu.network if settings.network is None else settings.network
        fabric = Fabric(machine.gpus_per_node, machine.num_nodes, gpu.link, network)
        rate = gpu.flops * settings.share * (1.0 if request.compute_dtype.itemsize == 2 else 0.5)
        visible, hidden = _communication(sent, fabric, _computing(flops, balance, rate), request.accumulation)
        times = request.accumulation
        products = times * float(flops.model.of(balance.computed)) / rate
        again = times * float(flops.recomputed.of(balance.computed)) / rate
        parts = {
            COMPUTATION: products,
            RECOMPUTATION: again,
            WAITING: (products + again) * (balance.waiting - 1),
            COMMUNICATION: visible,
            OPTIMIZER: _optimizer_seconds(self._shapes, request, gpu),
        }
        ranks = machine.world_size * times
        per_row = self._drawing.samples_per_row
        return StepTime(
            settings=settings,
            parts=parts,
            samples=request.samples_per_step * per_row,
            tokens=ranks * float(balance.useful.positions),
            model_flops=ranks * float(flops.model.of(balance.useful)),
            computed_flops=ranks * float(flops.computed.of(balance.computed)),
            waiting=balance.waiting,
            collectives=sent,
            sent_bytes=sum(c.rounds * fabric.sent_bytes(c.kind, c.num_bytes) for c in sent),
            hidden_seconds=hidden,
            images=ranks * float(balance.useful.tiles),
            machine=fabric,
        )

    def on_one_node(self, request: PlanRequest, settings: TimeSettings) -> StepTime:
        """Compute the time of a step on one machine with the same batch for each GPU."""
        return self.plan(request.changed(machine=replace(request.machine, num_nodes=1)), settings)

    def _drawn_for(self, request: PlanRequest) -> Drawing:
        return replace(
            self._drawing,
            batch_size=request.batch_size,
            ranks=request.machine.world_size,
            accumulation=request.accumulation,
            waits_each=request.zero is not None and request.zero.stage >= 2,
        )


def efficiency(time: StepTime, reference: StepTime) -> float:
    """Samples a second of each GPU, over those of a reference."""
    each = time.samples_per_second / time.machine.world_size
    return each / (reference.samples_per_second / reference.machine.world_size)


def _computing(flops: StepFlops, balance: Balance, rate: float) -> dict[str, float]:
    """Seconds of the passes of a micro-batch, beside which communication can run."""
    return {
        "forward": float(flops.forward.of(balance.computed)) / rate,
        "backward": float((flops.backward + flops.recomputed).of(balance.computed)) / rate,
    }


def _communication(
    sent: Sequence[Collective], fabric: Fabric, computing: Mapping[str, float], accumulation: int
) -> tuple[float, float]:
    """Return the seconds of a step that wait for communication, and those of communication that is hidden."""
    visible = hidden = 0.0
    for phase in ("forward", "backward", "step"):
        members = [collective for collective in sent if collective.phase == phase]
        for rounds in {collective.rounds for collective in members}:
            group = [collective for collective in members if collective.rounds == rounds]
            seconds = {c: fabric.seconds(c.kind, c.num_bytes, c.calls) for c in group}
            can_hide = sum(taken for c, taken in seconds.items() if c.is_hidden)
            is_hidden = min(can_hide, HIDDEN_SHARE * computing.get(phase, 0.0))
            assert rounds in (1, accumulation)
            visible += rounds * (sum(seconds.values()) - is_hidden)
            hidden += rounds * is_hidden
    return visible, hidden


def _optimizer_seconds(shapes: Sequence[ParameterShape], request: PlanRequest, gpu: Gpu) -> float:
    """Seconds of the optimizer's step by the bytes it moves.

    Gradients are read twice, once for their norm; weights and moments are read and written; with DeepSpeed a copy of
    the weights in the compute dtype is written.
    """
    kind, _ = optimizer_kind(request.optimizer)
    values = sum(shape.numel for shape in shapes if shape.is_trained)
    each = 2 * 4 + 2 * 4 + 2 * kind.moments * kind.bits / 8
    if request.zero is not None:
        each += request.compute_dtype.itemsize
        if request.zero.stage >= 1:
            values /= request.machine.world_size
    return values * each / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)


def time_as_dict(time: StepTime, one_node: StepTime, epoch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's time as JSON values: seconds, bytes, FLOPs."""
    gpus = time.machine.world_size
    steps = epoch.get("steps_per_epoch")
    return {
        "computed_not_measured": True,
        "gpu": time.settings.gpu.name,
        "peak_flops_per_second": time.settings.gpu.flops,
        "share_of_peak": time.settings.share,
        "network_bytes_per_second": time.machine.network,
        "step_seconds": time.seconds,
        "parts": dict(time.parts),
        "samples_per_second": time.samples_per_second,
        "tokens_per_second": time.tokens / time.seconds,
        "model_flops_per_sample": time.model_flops / time.samples,
        "computed_flops_per_sample": time.computed_flops / time.samples,
        "mfu": time.mfu,
        "slowest_rank": time.waiting,
        "sent_bytes_per_gpu": time.sent_bytes,
        "hidden_communication_seconds": time.hidden_seconds,
        "collectives": [
            {"what": c.what, "kind": c.kind, "bytes": c.num_bytes, "calls": c.calls, "rounds": c.rounds}
            for c in time.collectives
        ],
        "efficiency_against_one_machine": efficiency(time, one_node),
        "loading_cores_per_machine": time.loading_cores,
        "epoch_seconds": None if steps is None else steps * time.seconds,
        "epoch_gpu_hours": None if steps is None else steps * time.seconds * gpus / 3600,
        "notes": list(time.settings.notes),
    }
