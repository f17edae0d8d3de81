"""A plan as text to read, and as JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llava_ft.planning.advice import Change
from llava_ft.planning.fit import Way
from llava_ft.planning.memory import COMPONENTS, RankMemory
from llava_ft.planning.plan_command import Plan
from llava_ft.planning.scaling import StepTime, efficiency, time_as_dict

_GIB = 2**30
_SMALLEST_SHOWN = _GIB // 200
_INDENT = "  "


def as_text(plan: Plan) -> str:
    """Return the plan for a terminal, its verdict first."""
    sections = [
        [*_verdict(plan), _describe_run(plan)],
        _ways(plan),
        _parameters(plan),
        _memory(plan),
        _host(plan),
        _time(plan),
        _data(plan),
        _disk(plan),
        _changes(plan),
        ["Notes", *(f"{_INDENT}{note}" for note in plan.notes)] if plan.notes else [],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; sizes are bytes."""
    request, machine = plan.request, plan.request.machine
    return {
        "fits": plan.fits,
        "model": {
            "name": plan.model.name,
            "vision_tower": plan.model.config.mm_vision_tower,
            "tokens_per_image": plan.model.config.tokens_per_image,
            "new_tokens": plan.model.num_new_rows,
        },
        "machine": asdict(machine) | {"world_size": machine.world_size},
        "run": {
            "method": request.tuning.method,
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
        "time": None if plan.time is None else time_as_dict(*plan.time, plan.epoch),
        "epoch": plan.epoch,
        "disk": {
            "checkpoint": {"files": plan.checkpoint, "total": sum(plan.checkpoint.values())},
            "result": {"files": plan.result, "total": sum(plan.result.values())},
            "vision_cache": plan.vision_cache,
            "merged_base": plan.merged_base,
        },
        "ways": [
            {
                "flags": way.recomputation.flags,
                "computed_again": way.share,
                "total": way.memory.total,
                "host": sum(way.memory.host.values()),
            }
            for way in plan.ways
        ],
        "changes": [
            {
                "flags": change.flags,
                "cost": change.cost,
                "alone": _memory_as_dict(change.alone),
                "with_those_before": _memory_as_dict(change.together) if change.together else None,
            }
            for change in plan.changes
        ],
        "notes": plan.notes,
    }


def gib(num_bytes: int) -> str:
    """Return a size as people read it: `13.05 GiB`."""
    return f"{num_bytes / _GIB:,.2f} GiB"


def _verdict(plan: Plan) -> list[str]:
    machine, total = plan.request.machine, plan.memory.total
    each = f"per {machine.rank_name}"
    if machine.memory is None:
        return [f"Needs {gib(total)} {each}. Give --gpu-memory, such as 24GiB, to see whether it fits."]
    there = f"{gib(machine.memory)} ({machine.memory_source})"
    if plan.fits and plan.ways:
        spare = gib(machine.memory - total)
        return [f"Fits with {plan.request.recomputation.flags}: {gib(total)} {each} of {there}, {spare} to spare."]
    if plan.fits:
        return [f"Fits: {gib(total)} {each} of {there}, {gib(machine.memory - total)} to spare."]
    lines = [f"Does not fit: {gib(total)} {each} of {there}, {gib(total - machine.memory)} too much."]
    for change in plan.changes:
        if change.alone.total <= machine.memory:
            return [*lines, f"It fits with {change.flags} ({gib(change.alone.total)})."]
        if change.together is not None and change.together.total <= machine.memory:
            total = gib(change.together.total)
            return [*lines, f"It fits with all changes down to {change.flags} ({total}); they are listed below."]
    lines.append("None of the changes below makes it fit, alone or together.")
    return lines


def _describe_run(plan: Plan) -> str:
    request, machine = plan.request, plan.request.machine
    method = {"full": "full", "projector": "projector alone"}.get(request.tuning.method, "")
    if request.lora is not None:
        method = f"LoRA r={request.lora.r}"
    unit = machine.rank_name if machine.world_size == 1 else {"GPU": "GPUs", "process": "processes"}[machine.rank_name]
    nodes = f" on {machine.num_nodes} machines" if machine.num_nodes > 1 else ""
    words = [
        plan.model.name,
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


def _parameters(plan: Plan) -> list[str]:
    rows = [
        (part.part, f"{part.parameters:,}", f"{part.trained:,}", part.dtype, gib(part.num_bytes)) for part in plan.parts
    ]
    total, trained = sum(part.parameters for part in plan.parts), sum(part.trained for part in plan.parts)
    share = f"{trained / total:.2%} trained"
    rows.append(("total", f"{total:,}", f"{trained:,}", share, gib(sum(part.num_bytes for part in plan.parts))))
    return _table(("Parameters", "all", "trained", "held as", "size"), rows, left=(0, 3))


def _memory(plan: Plan) -> list[str]:
    memory, machine, batch = plan.memory, plan.request.machine, plan.batch
    phases = list(memory.components)
    rows = [
        (name, *(_two_digits(memory.components[phase].get(name, 0)) for phase in phases))
        for name in COMPONENTS
        if any(memory.components[phase].get(name, 0) >= _SMALLEST_SHOWN for phase in phases)
    ]
    rows.append(("total", *(_two_digits(memory.phases[phase]) or "0.00" for phase in phases)))
    needed = [(f"tensors, most in: {memory.peak_phase}", gib(memory.tensors))]
    needed += [(f"{name} (allowance)", gib(size)) for name, size in memory.allowances.items()]
    needed.append(("total", gib(memory.total)))
    lines = [
        *_table((f"Memory per {machine.rank_name} in GiB", *phases), rows),
        "",
        *_table((f"Needed per {machine.rank_name}", ""), needed),
        "",
        f"Micro-batch: {batch.size} x {batch.length} positions, {batch.num_images} images, "
        f"{batch.num_supervised:,} supervised positions.",
    ]
    if plan.most_if_supervised is not None:
        fits = machine.memory is None or plan.most_if_supervised <= machine.memory or not plan.fits
        warning = "" if fits else ", which does not fit"
        lines.append(f"If all text is supervised the total is {gib(plan.most_if_supervised)}{warning}.")
    return lines


def _two_digits(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.2f}" if num_bytes >= _SMALLEST_SHOWN else ""


def _time(plan: Plan) -> list[str]:
    if plan.time is None:
        return []
    time, one_node = plan.time
    rows = [(name, f"{1000 * seconds:,.1f} ms") for name, seconds in time.parts.items()]
    rows.append(("total", f"{1000 * time.seconds:,.1f} ms"))
    steps = plan.epoch.get("steps_per_epoch")
    facts = [
        ("samples per second", f"{time.samples_per_second:,.1f}"),
        ("positions per second, without padding", f"{time.tokens / time.seconds:,.0f}"),
        ("model FLOPs per sample", f"{time.model_flops / time.samples / 1e12:,.2f} TFLOP"),
        ("model FLOPs, share of the peak", f"{time.mfu:.1%}"),
        ("sent by each GPU", gib(round(time.sent_bytes))),
        ("communication hidden", f"{1000 * time.hidden_seconds:,.1f} ms"),
        ("work of the slowest rank, over the mean", f"{time.waiting:.2f}"),
        ("efficiency against one machine", f"{efficiency(time, one_node):.1%}"),
        ("cores of each machine for decoding 640 x 480 JPEGs", f"{time.loading_cores:,.1f}"),
    ]
    if steps is not None:
        facts += _epoch_facts(time, steps)
    settings = time.settings
    network = f", {time.machine.network / 1e9:g} GB/s of network each" if time.machine.num_nodes > 1 else ""
    stated = f"{settings.gpu.name}, {settings.share:.0%} of {settings.gpu.flops / 1e12:g} TFLOP/s{network}"
    return [
        *_table((f"Time of a step, computed and not measured ({stated})", ""), rows),
        "",
        *_table(("Per step, computed", ""), facts),
        *(f"{_INDENT}{note}" for note in settings.notes),
    ]


def _epoch_facts(time: StepTime, steps: int) -> list[tuple[str, str]]:
    hours = steps * time.seconds / 3600
    return [
        ("an epoch", f"{hours:,.2f} h"),
        ("an epoch, of all GPUs", f"{hours * time.machine.world_size:,.1f} GPU-hours"),
    ]


def _host(plan: Plan) -> list[str]:
    if not plan.memory.host:
        return []
    ranks = plan.request.machine.gpus_per_node
    rows = [(name, gib(size * ranks)) for name, size in plan.memory.host.items()]
    rows.append(("total", gib(sum(plan.memory.host.values()) * ranks)))
    return _table(("Host memory per machine, for what is offloaded", ""), rows)


def _data(plan: Plan) -> list[str]:
    if not plan.epoch:
        return []
    names = {
        "usable_records": "records",
        "training_records": "of which trained on",
        "packed_rows": "packed rows",
        "tokens_per_epoch": "tokens per epoch",
        "supervised_tokens_per_epoch": "supervised tokens per epoch",
        "images_per_epoch": "images per epoch",
        "steps_per_epoch": "steps per epoch",
        "steps": "steps of the run",
    }
    return _table(("Data", ""), [(text, f"{plan.epoch[key]:,}") for key, text in names.items() if key in plan.epoch])


def _disk(plan: Plan) -> list[str]:
    rows = [(name, gib(size)) for name, size in plan.checkpoint.items()]
    rows.append(("total", gib(sum(plan.checkpoint.values()))))
    rows.append(("the run's result", gib(sum(plan.result.values()))))
    if plan.vision_cache is not None:
        rows.append(("the vision cache, at most", gib(plan.vision_cache)))
    if plan.merged_base is not None:
        rows.append(("merged_base, once", gib(plan.merged_base)))
    return _table(("Disk per checkpoint", ""), rows)


def _ways(plan: Plan) -> list[str]:
    if not plan.ways:
        return []
    capacity, ranks = plan.request.machine.memory, plan.request.machine.gpus_per_node
    assert capacity is not None

    def row(way: Way) -> tuple[str, ...]:
        fits = " fits" if way.memory.total <= capacity else "     "
        host = sum(way.memory.host.values()) * ranks
        return way.recomputation.flags, f"{way.share:.1%}", gib(way.memory.total) + fits, gib(host) if host else ""

    heading = (
        "Tried, the cheapest first",
        "computed again",
        f"per {plan.request.machine.rank_name}     ",
        "of the host",
    )
    return _table(heading, [row(way) for way in plan.ways])


def _changes(plan: Plan) -> list[str]:
    if not plan.changes:
        return []
    capacity = plan.request.machine.memory
    assert capacity is not None

    def cell(memory: RankMemory | None) -> str:
        return "" if memory is None else gib(memory.total) + (" fits" if memory.total <= capacity else "     ")

    def row(change: Change) -> tuple[str, ...]:
        host = sum(change.alone.host.values()) * plan.request.machine.gpus_per_node
        needs = f"; {gib(host)} of host memory per machine" if host else ""
        return change.flags, cell(change.alone), cell(change.together), change.cost + needs

    heading = ("What to change", "alone", "with those above", "costs")
    return _table(heading, [row(change) for change in plan.changes], left=(0, 3))


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Align columns; those not in `left` are aligned on the right."""
    cells = [list(heading), *([f"{_INDENT}{row[0]}", *row[1:]] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    return [
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _memory_as_dict(memory: RankMemory) -> dict[str, Any]:
    values: Mapping[str, Any] = {
        "total": memory.total,
        "tensors": memory.tensors,
        "peak_phase": memory.peak_phase,
        "components": {phase: dict(parts) for phase, parts in memory.components.items()},
        "phases": dict(memory.phases),
        "allowances": dict(memory.allowances),
        "host": dict(memory.host),
    }
    return dict(values)
