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

from llava_ft.planning.model import ParameterShape, largest, num_values
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
        """Return the bytes that a step on parameters of so many float32 values takes beside gradients and state."""
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


def optimizer_kind(name: str) -> OptimizerKind:
    """Return how an optimizer uses memory; one that is not in `KINDS` is taken for AdamW."""
    return KINDS.get(name, KINDS["adamw_torch"])


@dataclass
class Placement:
    """Bytes of one rank. "Device" is the GPU, or the process's memory on a CPU."""

    weights: int  # on the device, always
    optimizer: int  # master weights and optimizer state on the device
    step_gradients: int  # while the optimizer runs
    step_temporaries: int  # what the optimizer's step takes on top
    start: int  # most that is on the device before the first step
    gradients: Gradients  # in the traced step
    gathered: int = 0  # weights of other ranks that are on the device while modules run (stage 3)
    buckets: int = 0  # buffers on the device, always
    backward_gradients: int = 0  # in the backward pass, those that the traced step does not have
    backward_buckets: int = 0  # buffers in the backward pass
    host: dict[str, int] = field(default_factory=dict[str, int])  # offloaded to the host's memory


def weight_bytes(shape: ParameterShape, request: PlanRequest) -> int:
    """Bytes of one parameter on a rank that holds it whole."""
    if shape.packed_bytes is not None:
        return shape.packed_bytes
    return shape.numel * (shape.dtype if request.zero is None else request.compute_dtype).itemsize


def place(shapes: Sequence[ParameterShape], request: PlanRequest) -> Placement:
    """Settle what a rank holds and where."""
    zero, ranks, accumulates = request.zero, request.machine.world_size, request.accumulation > 1
    kind, size = optimizer_kind(request.optimizer), request.compute_dtype.itemsize
    kept: Gradients = "accumulated" if accumulates else "fresh"
    trained = [shape for shape in shapes if shape.is_trained]
    count, weights = num_values(trained), sum(weight_bytes(shape, request) for shape in shapes)
    # Before DeepSpeed converts the model, what is trained is float32.
    loaded = sum(s.numel * s.dtype.itemsize if s.packed_bytes is None else s.packed_bytes for s in shapes)
    groups: dict[tuple[float | None, float | None], list[int]] = {}
    for shape in trained:  # the optimizer updates those of one rate and decay together
        groups.setdefault(request.tuning.rate_and_decay(shape.name, len(shape.shape)), []).append(shape.numel)
    together = max(groups.values(), key=sum, default=[])

    if zero is None or zero.stage == 0:
        placement = Placement(
            weights=weights,
            optimizer=kind.state_bytes(shape.shape for shape in trained),
            step_gradients=4 * count,
            step_temporaries=kind.step_bytes(together, on_gpu=request.on_gpu),
            start=weights,
            gradients=kept,
        )
        is_divided = ranks > 1
        if zero is None:
            placement.buckets = 4 * count * is_divided
            return placement
        masters = 0 if size == 4 else 4 * count
        placement.optimizer += masters
        placement.backward_buckets = min(zero.reduce_bucket_size, count) * size * is_divided
        placement.step_gradients = size * count + masters
        placement.start = max(loaded, weights + masters)
        return placement

    share = -(-count // ranks)
    group = min(share, zero.sub_group_size) if zero.stage == 3 else -(-sum(together) // ranks)
    masters, state, partition = 4 * share, kind.state_bytes([(share,)]), size * share
    # A flat share's step takes its own temporaries, or the copy of the new weights in 16 bits.
    temporaries = max(size * group if size == 2 else 0, kind.step_bytes([group], on_gpu=request.on_gpu))
    divided = sum(-(-shape.numel // ranks) for shape in shapes) * size
    host = {"master weights": masters, "optimizer state": state}
    if zero.stage < 3:
        placement = Placement(
            weights=weights,
            optimizer=masters + state,
            backward_gradients=partition * (2 if zero.stage == 2 and accumulates else 1),
            backward_buckets=zero.reduce_bucket_size * size * (2 if zero.overlap_comm else 1)
            + min(zero.reduce_bucket_size, count) * size,
            step_gradients=partition + 4 * group,
            step_temporaries=temporaries,
            start=max(loaded, weights + size * group + masters),
            gradients="handed over" if zero.stage == 2 else kept,
        )
        host |= {"gradients": masters + partition * accumulates, "buffers": partition}
        if zero.offload_optimizer:
            placement.backward_gradients, placement.buckets = 0, size * largest(trained)
            placement.start = max(loaded, weights + size * group)
    else:
        whole = size * num_values([s for s in shapes if s.numel < zero.param_persistence_threshold])
        placement = Placement(
            weights=divided + whole,
            gathered=_gathered(shapes, request, zero) * size,
            optimizer=masters + state,
            buckets=zero.reduce_bucket_size * size + partition,
            backward_buckets=min(zero.reduce_bucket_size, count) * size,
            step_gradients=4 * group,
            step_temporaries=temporaries,
            start=divided + size * largest(shapes) + masters,
            gradients="handed over",
        )
        host |= {"gradients": masters + partition}
        if zero.offload_optimizer:
            placement.buckets -= partition
            placement.start -= masters
    if zero.offload_optimizer:
        placement.optimizer = placement.step_temporaries = placement.step_gradients = 0
        if not request.on_gpu:  # with a GPU the step is DeepSpeed's own, which takes nothing on top
            host[TEMPORARIES] = kind.step_bytes([group if zero.stage == 3 else share], on_gpu=False)
        placement.host = host
    if zero.offload_param:  # in stage 3 alone
        placement.weights -= divided
        placement.start -= divided
        placement.host["weights"] = divided
    return placement


def _gathered(shapes: Sequence[ParameterShape], request: PlanRequest, zero: ZeroSettings) -> int:
    """Count the values that a rank has gathered from the others when it has most.

    DeepSpeed keeps a weight whole if it is used again within `max_reuse_distance` values. The backward pass visits the
    modules in reverse, so at its beginning the last modules are whole whose values, counted there and back, are within
    that distance. To these come what is gathered ahead, and the module under way, of which a copy is made on arrival.
    """
    if request.machine.world_size == 1 and not zero.offload_param:
        return 0
    total = num_values([shape for shape in shapes if shape.numel >= zero.param_persistence_threshold])
    kept = zero.max_reuse_distance // 2
    ahead = min(zero.prefetch_bucket_size, zero.max_live_parameters)
    return min(total, max(kept + ahead, largest(shapes))) + largest(shapes)
