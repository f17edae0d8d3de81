"""Where a run keeps weights, gradients and optimizer state: what each rank holds, by ZeRO stage.

Source: ZeRO (arXiv:1910.02054) as DeepSpeed 0.19 implements it, and transformers' `Trainer` without DeepSpeed. Of T
trained values on N ranks, with e bytes for a value of the module (2 under bf16 and fp16, else 4), a rank holds:

| | weights trained | master and state | gradients, backward | optimizer step, on top |
| --- | --- | --- | --- | --- |
| no DeepSpeed | 4T | state of T | 4T, in the trace; N > 1: 4T in buckets | gradients |
| stage 0 | eT | 4T (e = 2), state of T | eT, in the trace | gradients, and 4T of them as float32 (e = 2) |
| stage 1 | eT | 4T/N, state of T/N | eT, in the trace, and eT/N | eT/N, and 4T/N as float32 |
| stage 2 | eT | 4T/N, state of T/N | eT/N, twice with accumulation | eT/N, and 4T/N as float32 |
| stage 3 | eT/N | 4T/N, state of T/N | eT/N, always | 4T/N as float32 |

Frozen weights are whole on every rank but in stage 3. Gradients "in the trace" are part of the traced step, because
they come into being as activations go. Stages 1 and 2 allocate buffers of `reduce_bucket_size` values in each backward
pass and copy what is in one to reduce it; stage 3 keeps one. Stage 3 also holds the weights it has gathered: see
`_gathered`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from llava_ft.planning.model import ParameterShape, largest
from llava_ft.planning.request import PlanRequest, ZeroSettings
from llava_ft.planning.step import Gradients

TEMPORARIES = "optimizer temporaries"

_MIN_8BIT_VALUES: Final = 4096
_BLOCK_8BIT: Final = 256


@dataclass(frozen=True)
class OptimizerKind:
    """How an optimizer uses memory.

    Sizes of state are those of torch, transformers and bitsandbytes: bitsandbytes' 8-bit state is a byte for each value
    and moment with a float32 scale for each block of 256, and parameters below 4096 values keep 32-bit state.
    """

    moments: int  # values kept for each trained value
    bits: int = 32  # of each
    is_factored: bool = False  # a matrix keeps one value for each row and column instead (Adafactor)
    is_foreach: bool = False  # a step on a GPU makes a temporary of all parameters of a group at once

    def state_bytes(self, shapes: Iterable[tuple[int, ...]]) -> int:
        """Return the bytes of the state for parameters of these shapes."""
        total = 0
        for shape in shapes:
            count = math.prod(shape)
            if self.is_factored and len(shape) >= 2:
                total += 4 * (count // shape[-1] + count // shape[-2])
            elif self.bits == 8 and count >= _MIN_8BIT_VALUES:
                total += self.moments * (count + 4 * math.ceil(count / _BLOCK_8BIT))
            else:
                total += 4 * self.moments * count
        return total

    def step_bytes(self, sizes: Iterable[int], *, on_gpu: bool) -> int:
        """Return the bytes that a step takes beside gradients and state.

        Args:
            sizes: Numbers of values of the parameters that are updated together, float32.
            on_gpu: Whether the kernels are those of a GPU.
        """
        counts = list(sizes)
        if self.is_foreach and on_gpu:
            return 4 * sum(counts)
        if self.bits == 8 and on_gpu:
            return 0
        temporaries = 2 if self.bits == 32 else 5
        return 4 * temporaries * max(counts, default=0)


KINDS: Final = {
    "adamw_torch": OptimizerKind(2, is_foreach=True),
    "adamw_torch_fused": OptimizerKind(2),
    "adamw_8bit": OptimizerKind(2, bits=8),
    "adamw_bnb_8bit": OptimizerKind(2, bits=8),
    "paged_adamw_32bit": OptimizerKind(2),
    "paged_adamw_8bit": OptimizerKind(2, bits=8),
    "adafactor": OptimizerKind(1, is_factored=True),
    "lion_32bit": OptimizerKind(1),
    "lion_8bit": OptimizerKind(1, bits=8),
    "paged_lion_32bit": OptimizerKind(1),
    "paged_lion_8bit": OptimizerKind(1, bits=8),
    "sgd": OptimizerKind(0),
    "adagrad": OptimizerKind(1, is_foreach=True),
    "rmsprop": OptimizerKind(1, is_foreach=True),
}
"""By transformers' name for `optim`."""


def optimizer_kind(name: str) -> tuple[OptimizerKind, str | None]:
    """Return how an optimizer uses memory, and a note if it is not known and was taken for AdamW."""
    if name in KINDS:
        return KINDS[name], None
    return KINDS["adamw_torch"], f"optim {name} is not known here; its state is counted like adamw_torch's."


@dataclass
class Placement:
    """Bytes of one rank. "Device" is the GPU, or the process's memory on a CPU."""

    weights: int = 0  # on the device, always
    gathered: int = 0  # weights of other ranks that are on the device while modules run (stage 3)
    optimizer: int = 0  # master weights and optimizer state on the device
    buckets: int = 0  # buffers on the device, always
    backward_gradients: int = 0  # in the backward pass, those that the traced step does not have
    backward_buckets: int = 0  # buffers in the backward pass
    step_gradients: int = 0  # while the optimizer runs
    step_temporaries: int = 0  # what the optimizer's step takes on top
    start: int = 0  # most that is on the device before the first step
    host: dict[str, int] = field(default_factory=dict[str, int])  # offloaded to the host's memory
    gradients: Gradients = "fresh"  # in the traced step


def place(shapes: Sequence[ParameterShape], request: PlanRequest) -> Placement:
    """Settle what a rank holds and where."""
    if request.zero is None or request.zero.stage == 0:
        return _whole(shapes, request)
    return (_stage_1_and_2 if request.zero.stage < 3 else _stage_3)(shapes, request, request.zero)


def weight_bytes(shape: ParameterShape, request: PlanRequest) -> int:
    """Bytes of one parameter on a rank that holds it whole."""
    if shape.packed_bytes is not None:
        return shape.packed_bytes
    return shape.numel * (shape.dtype if request.zero is None else request.compute_dtype).itemsize


def _whole(shapes: Sequence[ParameterShape], request: PlanRequest) -> Placement:
    """Without DeepSpeed, and at its stage 0: every rank holds everything."""
    trained = [shape for shape in shapes if shape.is_trained]
    kind, _ = optimizer_kind(request.optimizer)
    count, weights = _count(trained), sum(weight_bytes(shape, request) for shape in shapes)
    placement = Placement(
        weights=weights,
        optimizer=kind.state_bytes(shape.shape for shape in trained),
        step_gradients=4 * count,
        step_temporaries=kind.step_bytes(_largest_group(trained, request), on_gpu=request.on_gpu),
        start=weights,
        gradients=_kept_gradients(request),
    )
    is_divided = request.machine.world_size > 1
    if request.zero is None:
        placement.buckets = 4 * count * is_divided
        return placement
    size = request.compute_dtype.itemsize
    masters = 0 if size == 4 else 4 * count
    placement.optimizer += masters
    placement.backward_buckets = min(request.zero.reduce_bucket_size, count) * size * is_divided
    placement.step_gradients = size * count + masters
    placement.start = max(_as_loaded(shapes), weights + masters)
    return placement


def _stage_1_and_2(shapes: Sequence[ParameterShape], request: PlanRequest, zero: ZeroSettings) -> Placement:
    trained = [shape for shape in shapes if shape.is_trained]
    kind, _ = optimizer_kind(request.optimizer)
    count, size, ranks = _count(trained), request.compute_dtype.itemsize, request.machine.world_size
    share = -(-count // ranks)
    group = -(-sum(_largest_group(trained, request)) // ranks)
    weights = sum(weight_bytes(shape, request) for shape in shapes)
    masters, state, partition = 4 * share, kind.state_bytes([(share,)]), size * share
    accumulates = request.accumulation > 1
    placement = Placement(
        weights=weights,
        optimizer=masters + state,
        backward_gradients=partition * (2 if zero.stage == 2 and accumulates else 1),
        backward_buckets=zero.reduce_bucket_size * size * (2 if zero.overlap_comm else 1)
        + min(zero.reduce_bucket_size, count) * size,
        step_gradients=partition + 4 * group,
        step_temporaries=_flat_step(kind, group, request),
        start=max(_as_loaded(shapes), weights + size * group + masters),
        gradients="handed over" if zero.stage == 2 else _kept_gradients(request),
    )
    if zero.offload_optimizer:
        gradients = 4 * share + partition * accumulates
        placement.host = {
            "master weights": masters,
            "optimizer state": state,
            "gradients": gradients,
            "buffers": partition,
        }
        placement.host |= _host_step(kind, share, request)
        placement.optimizer = placement.backward_gradients = placement.step_temporaries = 0
        placement.buckets = size * largest(trained)
        placement.step_gradients = 0
        placement.start = max(_as_loaded(shapes), weights + size * group)
    return placement


def _stage_3(shapes: Sequence[ParameterShape], request: PlanRequest, zero: ZeroSettings) -> Placement:
    kind, _ = optimizer_kind(request.optimizer)
    size, ranks = request.compute_dtype.itemsize, request.machine.world_size
    count = _count([shape for shape in shapes if shape.is_trained])
    share = -(-count // ranks)
    divided = sum(-(-shape.numel // ranks) for shape in shapes) * size
    whole = sum(shape.numel for shape in shapes if _stays_whole(shape, zero)) * size
    masters, state = 4 * share, kind.state_bytes([(share,)])
    group = min(share, zero.sub_group_size)
    placement = Placement(
        weights=divided + whole,
        gathered=_gathered(shapes, request, zero) * size,
        optimizer=masters + state,
        buckets=zero.reduce_bucket_size * size + size * share,
        backward_buckets=min(zero.reduce_bucket_size, count) * size,
        step_gradients=4 * group,
        step_temporaries=_flat_step(kind, group, request),
        start=divided + size * largest(shapes) + masters,
        gradients="handed over",
    )
    if zero.offload_optimizer:
        placement.host |= {"master weights": masters, "optimizer state": state, "gradients": (4 + size) * share}
        placement.host |= _host_step(kind, group, request)
        placement.optimizer = placement.step_temporaries = placement.step_gradients = 0
        placement.buckets = zero.reduce_bucket_size * size
        placement.start -= masters
    if zero.offload_param:
        placement.host["weights"] = divided
        placement.weights = whole
        placement.start -= divided
    return placement


def _flat_step(kind: OptimizerKind, count: int, request: PlanRequest) -> int:
    """What the step of a flat share takes: its own temporaries, or the copy of the new weights in 16 bits."""
    size = request.compute_dtype.itemsize
    return max(size * count if size == 2 else 0, kind.step_bytes([count], on_gpu=request.on_gpu))


def _host_step(kind: OptimizerKind, count: int, request: PlanRequest) -> dict[str, int]:
    """What the step of an offloaded optimizer takes: nothing with DeepSpeed's, which is used where there is a GPU."""
    return {} if request.on_gpu else {TEMPORARIES: kind.step_bytes([count], on_gpu=False)}


def _gathered(shapes: Sequence[ParameterShape], request: PlanRequest, zero: ZeroSettings) -> int:
    """Count the values that a rank has gathered from the others when it has most.

    DeepSpeed keeps a weight whole if it is used again within `max_reuse_distance` values. The backward pass visits the
    modules in reverse, so at its beginning the last modules are whole whose values, counted there and back, are within
    that distance. To these come what is gathered ahead, and the module under way, of which a copy is made on arrival.
    """
    if request.machine.world_size == 1 and not zero.offload_param:
        return 0
    total = sum(shape.numel for shape in shapes if not _stays_whole(shape, zero))
    kept = zero.max_reuse_distance // 2
    ahead = min(zero.prefetch_bucket_size, zero.max_live_parameters)
    return min(total, max(kept + ahead, largest(shapes))) + largest(shapes)


def _stays_whole(shape: ParameterShape, zero: ZeroSettings) -> bool:
    return shape.numel < zero.param_persistence_threshold


def _as_loaded(shapes: Sequence[ParameterShape]) -> int:
    """Bytes of the model before DeepSpeed converts it: what is trained is read as float32."""
    return sum(
        shape.numel * shape.dtype.itemsize if shape.packed_bytes is None else shape.packed_bytes for shape in shapes
    )


def _largest_group(trained: Sequence[ParameterShape], request: PlanRequest) -> list[int]:
    """Sizes of the parameters that the optimizer updates together: those of one rate and decay."""
    groups: dict[tuple[float | None, float | None], list[int]] = {}
    for shape in trained:
        groups.setdefault(request.tuning.rate_and_decay(shape.name, len(shape.shape)), []).append(shape.numel)
    return max(groups.values(), key=sum, default=[])


def _kept_gradients(request: PlanRequest) -> Gradients:
    return "accumulated" if request.accumulation > 1 else "fresh"


def _count(shapes: Sequence[ParameterShape]) -> int:
    return sum(shape.numel for shape in shapes)
