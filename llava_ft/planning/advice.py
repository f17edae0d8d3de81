"""What to change if a run does not fit, and which recomputation is the cheapest that fits (`--fit`).

Each change is planned like the run itself. The order is by what is given up: some time (recomputation, a smaller
micro-batch with more accumulation, ZeRO), the precision of frozen weights (4 bits), more time (offload), and what the
run can learn (a smaller rank, LoRA instead of the whole model).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from llava_ft.args.deepspeed_file import read_deepspeed_config
from llava_ft.models.flops import Counts, Flops, decoder_forward, model_flops
from llava_ft.planning.memory import MemoryPlanner, RankMemory
from llava_ft.planning.model import ModelOutline, ParameterShape
from llava_ft.planning.request import LoraSettings, PlanRequest, ZeroSettings
from llava_ft.planning.step import Batch
from llava_ft.planning.workload import Workload
from llava_ft.tuning.freeze import TuningPlan
from llava_ft.tuning.quant import Quantization
from llava_ft.tuning.recompute import Recomputation, is_cheap

_SMALLEST_RANK = 16
_RANK_OF_ADVICE = 64

WAYS: Final = (
    Recomputation("none"),
    Recomputation("selective"),
    Recomputation("full", 4),
    Recomputation("full", 2),
    Recomputation("full"),
    Recomputation("full", offload=True),
)
"""What `--fit` tries. The inputs of layers go to the host's memory last: that costs time that is not counted in
FLOPs."""


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


def find_ways(planner: MemoryPlanner, request: PlanRequest, batch: Batch, capacity: int) -> list[Way]:
    """Plan one way to recompute after the other until one fits.

    Args:
        planner: Plans memory.
        request: The run; what it says of recomputation is not looked at.
        batch: The micro-batch that takes most.
        capacity: Bytes that a rank has.

    Returns:
        What was tried, by FLOPs and in the order of `WAYS` where these are equal. If any fits it is the last one.
    """
    geometry, length = planner.outline.config.image_geometry, batch.length
    counts = Counts(
        positions=batch.size * length,
        supervised=batch.num_supervised,
        pairs=batch.size * length * (length + 1) / 2,
        tiles=batch.num_images * geometry.num_tiles(batch.image_size_wh) if geometry and batch.num_images else 0,
    )
    shapes = planner.shapes(request)
    forward, backward = model_flops(planner.outline.config, shapes, runs_tower=request.tower == "runs")
    needed = (forward + backward).of(counts)
    shares = {
        way: float(recomputed_flops(planner.outline, shapes, request.changed(recomputation=way)).of(counts) / needed)
        for way in WAYS
        if not (way.offload and not request.on_gpu) and not (way.mode == "selective" and request.keeps_little)
    }
    tried: list[Way] = []
    for way in sorted(shares, key=lambda way: (way.offload, shares[way])):
        memory = planner.plan(request.changed(recomputation=way), batch)
        tried.append(Way(way, shares[way], memory))
        if memory.total <= capacity:
            break
    return tried


def recomputed_flops(outline: ModelOutline, shapes: Sequence[ParameterShape], request: PlanRequest) -> Flops:
    """Count what a run computes again: all of a layer, or the products that `selective` does not keep.

    torch stops computing a layer again at the last tensor that its backward pass needs, which may be before its last
    product; that is not taken off.
    """
    wanted, config = request.recomputation, outline.config
    layers = [index for index in range(int(config.num_hidden_layers)) if wanted.includes(index)]
    if wanted.mode != "selective":
        return decoder_forward(config, shapes, layers)
    if request.keeps_little:
        return Flops()
    cheap = [s for s in shapes if s.part == "LoRA" and len(s.shape) == 2 and is_cheap(s.shape[1], s.shape[0])]
    again = decoder_forward(config, cheap, layers)
    return replace(again, per_pair=again.per_pair / 2 if request.attention == "eager" else 0.0)  # of the scores


def advise(planner: MemoryPlanner, request: PlanRequest, workload: Workload, capacity: int) -> list[Change]:
    """Plan every change that applies, alone and on top of those before it until the run fits.

    Args:
        planner: Plans memory.
        request: The run that does not fit.
        workload: Its data.
        capacity: Bytes that a rank has.
    """

    def memory(changed: PlanRequest) -> RankMemory:
        return planner.plan(changed, workload.largest_batch(changed.batch_size))

    changes: list[Change] = []
    so_far, least = request, memory(request).total
    as_it_is = least
    for apply, cost in _KINDS:
        found = apply(request)
        if found is None:
            continue
        flags, alone = found[0], memory(found[1])
        together = None
        following = apply(so_far) if least > capacity else None
        if following is not None:
            together = memory(following[1])
            if together.total <= least:  # one that saves nothing yet may do so on top of a later one
                so_far, least = following[1], together.total
            else:
                together = None
        if alone.total < as_it_is or together is not None:
            changes.append(Change(flags, cost, alone, together))
    return changes


_Change = tuple[str, PlanRequest]
"""The flags of a change, and the request with it."""


def _selective(request: PlanRequest) -> _Change | None:
    if request.recomputation.mode != "none" or request.keeps_little:
        return None
    return _recompute(request, Recomputation("selective"))


def _full(request: PlanRequest) -> _Change | None:
    recomputation = request.recomputation
    if recomputation.mode == "full" and recomputation.every == 1:
        return None
    _, changed = _recompute(request, Recomputation("full", offload=recomputation.offload))
    return "--gradient_checkpointing full", changed


def _layer_inputs_on_host(request: PlanRequest) -> _Change | None:
    if not request.on_gpu or request.recomputation.offload:
        return None
    return _recompute(request, Recomputation("full", offload=True))


def _recompute(request: PlanRequest, recomputation: Recomputation) -> _Change:
    return recomputation.flags, request.changed(recomputation=recomputation)


def _batch_of_one(request: PlanRequest) -> _Change | None:
    if request.batch_size == 1:
        return None
    accumulation = request.accumulation * request.batch_size
    flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation}"
    return flags, request.changed(batch_size=1, accumulation=accumulation)


def _stage(stage: int) -> Callable[[PlanRequest], _Change | None]:
    def apply(request: PlanRequest) -> _Change | None:
        current = request.zero.stage if request.zero else 0
        if current >= stage or request.machine.world_size == 1 or (stage == 3 and request.quantization is not None):
            return None
        return _deepspeed(request, f"zero{stage}.json")

    return apply


def _offload(stage: int) -> Callable[[PlanRequest], _Change | None]:
    def apply(request: PlanRequest) -> _Change | None:
        flags, changed = _deepspeed(request, f"zero{stage}_offload.json")
        if not request.on_gpu or request.zero == changed.zero or (stage == 3 and request.quantization is not None):
            return None
        return flags, changed

    return apply


def _deepspeed(request: PlanRequest, file: str) -> _Change:
    """Use one of the configurations in configs/."""
    config, _ = read_deepspeed_config(file, [])
    return f"--deepspeed {file}", request.changed(zero=ZeroSettings.from_config(config, hidden_size=0))


def _four_bits(request: PlanRequest) -> _Change | None:
    if request.quantization == Quantization(4) or request.tuning.train_language_model:
        return None
    zero2, changed = _deepspeed(request.changed(quantization=Quantization(4)), "zero2.json")
    if request.machine.world_size == 1 and (request.zero is None or request.zero.stage != 3):
        changed = changed.changed(zero=request.zero)
        zero2 = zero2 if request.zero == _deepspeed(request, "zero2.json")[1].zero else ""
    return f"--bits 4 {zero2}".strip(), changed


def _smaller_rank(request: PlanRequest) -> _Change | None:
    if request.lora is None or request.lora.r <= _SMALLEST_RANK:
        return None
    return f"--lora_r {_SMALLEST_RANK}", request.changed(lora=replace(request.lora, r=_SMALLEST_RANK))


def _lora_instead(request: PlanRequest) -> _Change | None:
    if not request.tuning.train_language_model:
        return None
    tuning = TuningPlan("lora", request.tuning.train_projector, train_language_model=False)
    lora = LoraSettings(_RANK_OF_ADVICE, 2 * _RANK_OF_ADVICE, 0.05, "none", None)
    flags = f"--lora_enable True --lora_r {lora.r} --lora_alpha {lora.alpha}"
    return flags, request.changed(tuning=tuning, lora=lora)


_KINDS: Final[tuple[tuple[Callable[[PlanRequest], _Change | None], str], ...]] = (
    (_selective, "norms and activations computed twice"),
    (_full, "a third to a half more computation"),
    (_batch_of_one, "speed; the steps stay the same"),
    (_stage(2), "communication"),
    (_stage(3), "more communication"),
    (_four_bits, "speed, and the precision of frozen weights"),
    (_layer_inputs_on_host, "layers computed again, and copies to the host's memory and back"),
    (_offload(2), "much speed"),
    (_offload(3), "much speed"),
    (_smaller_rank, "what the adapter can learn"),
    (_lora_instead, "the language model itself stays fixed"),
)
"""Each change gives None where it makes no difference; and what it costs."""
