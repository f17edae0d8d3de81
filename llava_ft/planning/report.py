"""A plan as text to read, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llava_ft.checkpoint.save import result_kind
from llava_ft.planning.memory import COMPONENTS, RankMemory
from llava_ft.planning.plan import Plan
from llava_ft.terminal import columns

_EPOCH = {
    "usable_records": "records",
    "training_records": "of which trained on",
    "packed_rows": "packed rows",
    "tokens_per_epoch": "tokens per epoch",
    "supervised_tokens_per_epoch": "supervised tokens per epoch",
    "images_per_epoch": "images per epoch",
    "steps_per_epoch": "steps per epoch",
    "steps": "steps of the run",
}


def as_text(plan: Plan) -> str:
    """Return the plan for a terminal, its verdict first."""
    machine, memory, batch = plan.request.machine, plan.memory, plan.batch
    each = f"per {machine.rank_name}"

    def verdict_of(memory: RankMemory | None) -> str:
        if memory is None:
            return ""
        return gib(memory.total) + (" fits" if memory.total <= (machine.memory or 0) else "     ")

    def host(memory: RankMemory) -> str:
        size = sum(memory.host.values()) * machine.gpus_per_node
        return gib(size) if size else ""

    ways = [
        (way.recomputation.flags, f"{way.share:.1%}", verdict_of(way.memory), host(way.memory)) for way in plan.ways
    ]
    num_parameters, num_trained = sum(part.parameters for part in plan.parts), sum(part.trained for part in plan.parts)
    parameters = [(p.part, f"{p.parameters:,}", f"{p.trained:,}", p.dtype, gib(p.num_bytes)) for p in plan.parts]
    share, held = f"{num_trained / num_parameters:.2%} trained", sum(part.num_bytes for part in plan.parts)
    parameters.append(("total", f"{num_parameters:,}", f"{num_trained:,}", share, gib(held)))

    sizes = [(name, *(_in_gib(phase.get(name, 0)) for phase in memory.components.values())) for name in COMPONENTS]
    sizes = [(name, *("" if size == "0.00" else size for size in row)) for name, *row in sizes if {*row} != {"0.00"}]
    sizes.append(("total", *map(_in_gib, memory.phases.values())))
    allowances = {f"{name} (allowance)": size for name, size in memory.allowances.items()}
    micro_batch = [
        f"Micro-batch: {batch.size} x {batch.length} positions, {batch.num_images} images, "
        f"{batch.num_supervised:,} supervised positions."
    ]
    if plan.most_if_supervised is not None:
        fits = machine.memory is None or plan.most_if_supervised <= machine.memory or not plan.fits
        warning = "" if fits else ", which does not fit"
        micro_batch.append(f"If all text is supervised the total is {gib(plan.most_if_supervised)}{warning}.")

    on_host = {name: size * machine.gpus_per_node for name, size in memory.host.items()}
    disk = plan.checkpoint | {"total": sum(plan.checkpoint.values()), "the run's result": sum(plan.result.values())}
    once = {"the vision cache, at most": plan.vision_cache, "merged_base, once": plan.merged_base}
    changes: list[tuple[str, ...]] = []
    for change in plan.changes:
        needs = f"; {host(change.alone)} of host memory per machine" if host(change.alone) else ""
        changes.append((change.flags, verdict_of(change.alone), verdict_of(change.together), change.cost + needs))
    sections = [
        [*_verdict(plan), _describe_run(plan)],
        _table(("Tried, the cheapest first", "computed again", f"{each}     ", "of the host"), ways),
        _table(("Parameters", "all", "trained", "held as", "size"), parameters, right=(1, 2, 4)),
        _table((f"Memory {each} in GiB", *memory.components), sizes),
        _sizes(f"Needed {each}", {f"tensors, most in: {memory.peak_phase}": memory.tensors} | allowances, total=True),
        micro_batch,
        _sizes("Host memory per machine, for what is offloaded", on_host, total=True),
        _table(("Data", ""), [(text, f"{plan.epoch[key]:,}") for key, text in _EPOCH.items() if key in plan.epoch]),
        _sizes("Disk per checkpoint", disk | {name: size for name, size in once.items() if size is not None}),
        _table(("What to change", "alone", "with those above", "costs"), changes, right=(1, 2)),
        ["Notes", *(f"  {note}" for note in plan.notes)] if plan.notes else [],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; sizes are bytes."""
    request, machine = plan.request, plan.request.machine
    return {
        "fits": plan.fits,
        "model": {
            "name": plan.model.args.model.model_name_or_path,
            "vision_tower": plan.model.config.mm_vision_tower,
            "tokens_per_image": plan.model.config.tokens_per_image,
            "new_tokens": plan.model.num_added_by_flags,
        },
        "machine": asdict(machine) | {"world_size": machine.world_size},
        "run": {
            "method": result_kind(request.tuning),
            "lora": asdict(request.lora) if request.lora else None,
            "quantization": str(request.quantization) if request.quantization else None,
            "compute_dtype": str(request.compute_dtype).removeprefix("torch."),
            "attention": request.attention,
            "gradient_checkpointing": request.recomputation.mode,
            "gradient_checkpointing_every": request.recomputation.every,
            "activation_offload": request.recomputation.offload,
            "batch_size": request.batch_size,
            "accumulation": request.accumulation,
            "samples_per_step": request.samples_per_step,
            "optimizer": request.optimizer,
            "zero": asdict(request.zero) if request.zero else None,
        },
        "parameters": [asdict(part) for part in plan.parts],
        "batch": asdict(plan.batch),
        "memory": _memory_as_dict(plan.memory) | {"total_if_all_text_is_supervised": plan.most_if_supervised},
        "epoch": plan.epoch,
        "disk": {
            "checkpoint": {"files": plan.checkpoint, "total": sum(plan.checkpoint.values())},
            "result": {"files": plan.result, "total": sum(plan.result.values())},
            "vision_cache": plan.vision_cache,
            "merged_base": plan.merged_base,
        },
        "ways": [
            {"flags": way.recomputation.flags, "computed_again": way.share}
            | {"total": way.memory.total, "host": sum(way.memory.host.values())}
            for way in plan.ways
        ],
        "changes": [
            {"flags": change.flags, "cost": change.cost, "alone": _memory_as_dict(change.alone)}
            | {"with_those_before": _memory_as_dict(change.together) if change.together else None}
            for change in plan.changes
        ],
        "notes": plan.notes,
    }


def gib(num_bytes: int) -> str:
    """Return a size as people read it: `13.05 GiB`."""
    return f"{_in_gib(num_bytes)} GiB"


def _in_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f}"


def _verdict(plan: Plan) -> list[str]:
    machine, total = plan.request.machine, plan.memory.total
    each = f"per {machine.rank_name}"
    if machine.memory is None:
        return [f"Needs {gib(total)} {each}. Give --gpu-memory, such as 24GiB, to see whether it fits."]
    there = f"{gib(total)} {each} of {gib(machine.memory)} ({machine.memory_source})"
    if plan.fits:
        how = f" with {plan.request.recomputation.flags}" if plan.ways else ""
        return [f"Fits{how}: {there}, {gib(machine.memory - total)} to spare."]
    lines = [f"Does not fit: {there}, {gib(total - machine.memory)} too much."]
    for change in plan.changes:
        if change.alone.total <= machine.memory:
            return [*lines, f"It fits with {change.flags} ({gib(change.alone.total)})."]
        if change.together is not None and change.together.total <= machine.memory:
            total = gib(change.together.total)
            return [*lines, f"It fits with all changes down to {change.flags} ({total}); they are listed below."]
    return [*lines, "None of the changes below makes it fit, alone or together."]


def _describe_run(plan: Plan) -> str:
    request, machine = plan.request, plan.request.machine
    method = {"full": "full", "projector": "projector alone"}.get(result_kind(request.tuning), "")
    if request.lora is not None:
        method = f"LoRA r={request.lora.r}"
    unit = machine.rank_name if machine.world_size == 1 else {"GPU": "GPUs", "process": "processes"}[machine.rank_name]
    nodes = f" on {machine.num_nodes} machines" if machine.num_nodes > 1 else ""
    words = [
        plan.model.args.model.model_name_or_path,
        method,
        str(request.quantization) if request.quantization else "",
        str(request.compute_dtype).removeprefix("torch."),
        f"{machine.world_size} {unit}{nodes}",
        str(request.zero) if request.zero else "",
        f"{request.batch_size} x {request.accumulation} x {machine.world_size} = {request.samples_per_step} samples "
        "a step",
        str(request.recomputation),
        f"{request.attention} attention",
        request.optimizer,
    ]
    return ", ".join(word for word in words if word)


def _sizes(heading: str, sizes: Mapping[str, int], *, total: bool = False) -> list[str]:
    with_total = {**sizes, "total": sum(sizes.values())} if total and sizes else sizes
    return _table((heading, ""), [(name, gib(size)) for name, size in with_total.items()])


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> list[str]:
    """Align columns, all but the first on the right if it is not said which. Without rows there is no table."""
    if not rows:
        return []
    return columns([heading, *((f"  {row[0]}", *row[1:]) for row in rows)], right or range(1, len(heading)))


def _memory_as_dict(memory: RankMemory) -> dict[str, Any]:
    return {
        "total": memory.total,
        "tensors": memory.tensors,
        "peak_phase": memory.peak_phase,
        "components": {phase: dict(parts) for phase, parts in memory.components.items()},
        "phases": memory.phases,
        "allowances": dict(memory.allowances),
        "host": dict(memory.host),
    }
