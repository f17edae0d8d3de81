"""What to change if a run does not fit, and which recomputation is the cheapest that fits (`--fit`).

Each change is planned like the run itself. The order is by what is given up: some time (recomputation, a smaller
micro-batch with more accumulation, ZeRO), the precision of frozen weights (4 bits), more time (offload), and what the
run can learn (a smaller rank, LoRA instead of the whole model).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from llava_ft.args.deepspeed_file import read_deepspeed_config
from llava_ft.models.flops import Counts, Flops, decoder_forward, model_flops
from llava_ft.models.parts import LANGUAGE_MODEL
from llava_ft.planning.memory import MemoryPlanner, RankMemory
from llava_ft.planning.model import ParameterShape
from llava_ft.planning.request import LoraSettings, PlanRequest, ZeroSettings
from llava_ft.planning.step import Batch
from llava_ft.planning.workload import Workload
from llava_ft.resolve import RunModel
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
    """One way to recompute."""

    recomputation: Recomputation
    share: float  # FLOPs that are computed again, of those that training needs
    memory: RankMemory


@dataclass(frozen=True)
class Change:
    """A change and what it leads to."""

    flags: str  # what to add to the command line
    cost: str  # what is given up for it
    alone: RankMemory
    # With those changes before it that have one too; None if they led to a run that fits, or if it would take more.
    together: RankMemory | None


def find_ways(planner: MemoryPlanner, request: PlanRequest, batch: Batch, capacity: int) -> list[Way]:
    """Plan one way to recompute after the other until one fits into `capacity` bytes; that is the last one then.

    The order is by FLOPs, and that of `WAYS` where these are equal.
    """
    geometry, length = planner.run.config.image_geometry, batch.length
    counts = Counts(
        positions=batch.size * length,
        supervised=batch.num_supervised,
        pairs=batch.size * length * (length + 1) / 2,
        tiles=batch.num_images * geometry.num_tiles(batch.image_size_wh) if geometry and batch.num_images else 0,
    )
    shapes = planner.shapes(request)
    forward, backward = model_flops(planner.run.config, shapes, runs_tower=request.tower == "runs")
    needed = (forward + backward).of(counts)
    shares = {
        way: float(recomputed_flops(planner.run, shapes, request.changed(recomputation=way)).of(counts) / needed)
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


def recomputed_flops(run: RunModel, shapes: Sequence[ParameterShape], request: PlanRequest) -> Flops:
    """Count what a run computes again: all of a layer, or the products that `selective` does not keep.

    torch stops computing a layer again at the last tensor that its backward pass needs, which may be before its last
    product; that is not taken off.
    """
    wanted, config = request.recomputation, run.config
    layers = [index for index in range(int(config.num_hidden_layers)) if wanted.includes(index)]
    if wanted.mode != "selective":
        return decoder_forward(config, shapes, layers)
    if request.keeps_little:
        return Flops()
    cheap = [s for s in shapes if s.part == "LoRA" and len(s.shape) == 2 and is_cheap(s.shape[1], s.shape[0])]
    again = decoder_forward(config, cheap, layers)
    return replace(again, per_pair=again.per_pair / 2 if request.attention == "eager" else 0.0)  # of the scores


def advise(planner: MemoryPlanner, request: PlanRequest, workload: Workload, capacity: int) -> list[Change]:
    """Plan every change that applies to a run that does not fit, alone and on top of those before it until it fits."""

    def memory(changed: PlanRequest) -> RankMemory:
        return planner.plan(changed, workload.largest_batch(changed.batch_size))

    changes: list[Change] = []
    so_far = request
    as_it_is = least = memory(request).total
    for name, (flags, cost, changed) in _changes(request).items():
        alone, together = memory(changed), None
        if least > capacity and name in (following := _changes(so_far)):
            candidate = following[name][2]
            together = memory(candidate)
            if together.total <= least:  # one that saves nothing yet may do so on top of a later one
                so_far, least = candidate, together.total
            else:
                together = None
        if alone.total < as_it_is or together is not None:
            changes.append(Change(flags, cost, alone, together))
    return changes


def _changes(request: PlanRequest) -> dict[str, tuple[str, str, PlanRequest]]:
    """Find the changes that make a difference, in order: for each its flags, what is given up, and the request."""
    recomputation, zero, lora = request.recomputation, request.zero, request.lora
    stage, ranks = zero.stage if zero else 0, request.machine.world_size
    stages = (2, 3) if request.quantization is None else (2,)  # ZeRO-3 cannot divide packed weights
    found: dict[str, tuple[str, str, PlanRequest]] = {}

    def add(name: str, flags: str, cost: str, **values: Any) -> None:
        found[name] = flags, cost, request.changed(**values)

    def configured(file: str) -> ZeroSettings:
        return ZeroSettings.from_config(read_deepspeed_config(file, [])[0], hidden_size=0)

    if recomputation.mode == "none" and not request.keeps_little:
        way = Recomputation("selective")
        add("selective", way.flags, "norms and activations computed twice", recomputation=way)
    if recomputation.mode != "full" or recomputation.every != 1:
        way = Recomputation("full", offload=recomputation.offload)
        add("full", "--gradient_checkpointing full", "a third to a half more computation", recomputation=way)
    if request.batch_size > 1:
        accumulation = request.accumulation * request.batch_size
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulation}"
        add("batch of one", flags, "speed; the steps stay the same", batch_size=1, accumulation=accumulation)
    for wanted, cost in zip(stages, ("communication", "more communication"), strict=False):
        if stage < wanted and ranks > 1:
            file = f"zero{wanted}.json"
            add(f"stage {wanted}", f"--deepspeed {file}", cost, zero=configured(file))
    if request.quantization != Quantization(4) and not request.tuning.trains_any(LANGUAGE_MODEL):
        zero2 = configured("zero2.json")
        settings = zero2 if ranks > 1 or stage == 3 else zero
        flags = "--bits 4 --deepspeed zero2.json" if settings == zero2 else "--bits 4"
        cost = "speed, and the precision of frozen weights"
        add("4 bits", flags, cost, quantization=Quantization(4), zero=settings)
    if request.on_gpu and not recomputation.offload:
        way = Recomputation("full", offload=True)
        cost = "layers computed again, and copies to the host's memory and back"
        add("layer inputs on host", way.flags, cost, recomputation=way)
    for wanted in stages:
        file = f"zero{wanted}_offload.json"
        if request.on_gpu and zero != configured(file):
            add(f"stage {wanted} with offload", f"--deepspeed {file}", "much speed", zero=configured(file))
    if lora is not None and lora.r > _SMALLEST_RANK:
        smaller = replace(lora, r=_SMALLEST_RANK)
        add("smaller rank", f"--lora_r {_SMALLEST_RANK}", "what the adapter can learn", lora=smaller)
    if request.tuning.trains_any(LANGUAGE_MODEL):
        adapters = LoraSettings(_RANK_OF_ADVICE, 2 * _RANK_OF_ADVICE, 0.05, "none", None)
        flags = f"--lora_enable True --lora_r {adapters.r} --lora_alpha {adapters.alpha}"
        add("LoRA", flags, "the language model itself stays fixed", tuning=request.tuning.with_lora(), lora=adapters)
    return found
