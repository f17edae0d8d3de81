"""What to change if a run does not fit: each change planned like the run itself, in order of what it costs.

The order is by what is given up: some time (recomputation, a smaller micro-batch with more accumulation, ZeRO), the
precision of frozen weights (4 bits), more time (offload), and what the run can learn (a smaller rank, LoRA instead of
the whole model).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_ft.args.deepspeed_file import find_deepspeed_config, read_deepspeed_config
from llava_ft.planning.flops import keeps_little
from llava_ft.planning.memory import MemoryPlanner, RankMemory
from llava_ft.planning.request import LoraSettings, PlanRequest
from llava_ft.planning.workload import Workload
from llava_ft.planning.zero import ZeroSettings
from llava_ft.tuning.freeze import TuningPlan
from llava_ft.tuning.quant import Quantization
from llava_ft.tuning.recompute import Recomputation

_SMALLEST_RANK = 16
_RANK_OF_ADVICE = 64


@dataclass(frozen=True)
class Change:
    """A change and what it leads to.

    Attributes:
        flags: What to add to the command line.
        cost: What is given up for it.
        alone: Memory with it alone.
        together: Memory with it and those changes before it that have one too; None if they led to a run that fits, or
            if it would take more on top of them.
    """

    flags: str
    cost: str
    alone: RankMemory
    together: RankMemory | None


@dataclass(frozen=True)
class _Kind:
    flags: Callable[[PlanRequest], str]
    cost: str
    apply: Callable[[PlanRequest], PlanRequest | None]
    """The request with the change; None if it makes no difference there."""


def advise(planner: MemoryPlanner, request: PlanRequest, workload: Workload, capacity: int) -> list[Change]:
    """Plan every change that applies, alone and on top of those before it until the run fits.

    Args:
        planner: Plans memory.
        request: The run that does not fit.
        workload: Its data.
        capacity: Bytes that a rank has.
    """
    changes: list[Change] = []
    as_it_is = planner.plan(request, workload.largest_batch(request.batch_size)).total
    so_far, least = request, as_it_is
    for kind in _KINDS:
        changed = kind.apply(request)
        if changed is None:
            continue
        alone = planner.plan(changed, workload.largest_batch(changed.batch_size))
        together = None
        following = kind.apply(so_far) if least > capacity else None
        if following is not None:
            together = planner.plan(following, workload.largest_batch(following.batch_size))
            if together.total <= least:  # one that saves nothing yet may do so on top of a later one
                so_far, least = following, together.total
            else:
                together = None
        if alone.total < as_it_is or together is not None:
            changes.append(Change(kind.flags(changed), kind.cost, alone, together))
    return changes


def _selective(request: PlanRequest) -> PlanRequest | None:
    if request.recomputation.mode != "none" or keeps_little(request):
        return None
    return request.changed(recomputation=Recomputation("selective"))


def _full(request: PlanRequest) -> PlanRequest | None:
    recomputation = request.recomputation
    is_there = recomputation.mode == "full" and recomputation.every == 1
    return None if is_there else request.changed(recomputation=Recomputation("full", offload=recomputation.offload))


def _layer_inputs_on_host(request: PlanRequest) -> PlanRequest | None:
    if request.machine.device == "cpu" or request.recomputation.offload:
        return None
    return request.changed(recomputation=Recomputation("full", offload=True))


def _batch_of_one(request: PlanRequest) -> PlanRequest | None:
    if request.batch_size == 1:
        return None
    return request.changed(batch_size=1, accumulation=request.accumulation * request.batch_size)


def _stage(stage: int) -> Callable[[PlanRequest], PlanRequest | None]:
    def apply(request: PlanRequest) -> PlanRequest | None:
        current = request.zero.stage if request.zero else 0
        if current >= stage or request.machine.world_size == 1 or (stage == 3 and request.quantization is not None):
            return None
        return request.changed(zero=_settings(f"zero{stage}.json"))

    return apply


def _four_bits(request: PlanRequest) -> PlanRequest | None:
    if request.quantization == Quantization(4) or request.tuning.train_language_model:
        return None
    is_divided = request.zero is not None and request.zero.stage == 3
    zero = _settings("zero2.json") if is_divided or request.machine.world_size > 1 else request.zero
    return request.changed(quantization=Quantization(4), zero=zero)


def _offload(stage: int) -> Callable[[PlanRequest], PlanRequest | None]:
    def apply(request: PlanRequest) -> PlanRequest | None:
        settings = _settings(f"zero{stage}_offload.json")
        if request.machine.device == "cpu" or request.zero == settings:
            return None
        if stage == 3 and request.quantization is not None:
            return None
        return request.changed(zero=settings)

    return apply


def _smaller_rank(request: PlanRequest) -> PlanRequest | None:
    if request.lora is None or request.lora.r <= _SMALLEST_RANK:
        return None
    return request.changed(lora=dataclasses.replace(request.lora, r=_SMALLEST_RANK))


def _lora_instead(request: PlanRequest) -> PlanRequest | None:
    if not request.tuning.train_language_model:
        return None
    tuning = TuningPlan("lora", request.tuning.train_projector, train_language_model=False)
    return request.changed(tuning=tuning, lora=LoraSettings(_RANK_OF_ADVICE, 2 * _RANK_OF_ADVICE, 0.05, "none", None))


def _settings(file: str) -> ZeroSettings:
    """Read one of the configurations in configs/."""
    return ZeroSettings.from_config(read_deepspeed_config(Path(find_deepspeed_config(file, []))), hidden_size=0)


def _fixed(flags: str) -> Callable[[PlanRequest], str]:
    return lambda _: flags


_KINDS = (
    _Kind(_fixed("--gradient_checkpointing selective"), "norms and activations computed twice", _selective),
    _Kind(_fixed("--gradient_checkpointing full"), "a third to a half more computation", _full),
    _Kind(
        lambda r: f"--per_device_train_batch_size 1 --gradient_accumulation_steps {r.accumulation}",
        "speed; the steps stay the same",
        _batch_of_one,
    ),
    _Kind(_fixed("--deepspeed zero2.json"), "communication", _stage(2)),
    _Kind(_fixed("--deepspeed zero3.json"), "more communication", _stage(3)),
    _Kind(
        lambda r: "--bits 4" + (" --deepspeed zero2.json" if r.zero == _settings("zero2.json") else ""),
        "speed, and the precision of frozen weights",
        _four_bits,
    ),
    _Kind(
        lambda r: r.recomputation.flags,
        "layers computed again, and copies to the host's memory and back",
        _layer_inputs_on_host,
    ),
    _Kind(_fixed("--deepspeed zero2_offload.json"), "much speed", _offload(2)),
    _Kind(_fixed("--deepspeed zero3_offload.json"), "much speed", _offload(3)),
    _Kind(_fixed(f"--lora_r {_SMALLEST_RANK}"), "what the adapter can learn", _smaller_rank),
    _Kind(
        _fixed(f"--lora_enable True --lora_r {_RANK_OF_ADVICE} --lora_alpha {2 * _RANK_OF_ADVICE}"),
        "the language model itself stays fixed",
        _lora_instead,
    ),
)
