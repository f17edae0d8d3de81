"""The tables of docs/scaling.md are those of the code.

    python -m tests.planning.test_scaling_page

writes them anew.
"""

import functools
import itertools
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from llava_ft.args import parse_args
from llava_ft.planning.balance import Drawing, Rows, Samples
from llava_ft.planning.hardware import GPUS
from llava_ft.planning.request import Machine, PlanRequest, plan_request
from llava_ft.planning.scaling import (
    COMMUNICATION,
    COMPUTATION,
    OPTIMIZER,
    WAITING,
    StepTime,
    TimePlanner,
    TimeSettings,
    efficiency,
)
from llava_ft.planning.shapes import ParameterShape, PlannedModel, build_model, find_planned_model, parameter_shapes

PAGE: Final = Path(__file__).parents[2] / "docs/scaling.md"
SIZES: Final = (8, 16, 32, 64, 128, 256, 512, 1024)
RECORDS: Final = 665_298
"""Records of llava_v1_5_mix665k."""

BASES: Final = {"7B": "lmsys/vicuna-7b-v1.5", "13B": "lmsys/vicuna-13b-v1.5"}
RUNS: Final = {
    "LoRA, ZeRO-2": ("lora.yaml", "zero2.json"),
    "LoRA, ZeRO-3": ("lora.yaml", "zero3.json"),
    "full, ZeRO-2": ("finetune.yaml", "zero2.json"),
    "full, ZeRO-3": ("finetune.yaml", "zero3.json"),
}


@functools.cache
def mixture(num: int = RECORDS) -> Samples:
    """Samples like those of LLaVA's mixture in outline: 6% text alone, log-normal text of 223 tokens on average."""
    random = np.random.default_rng(0)
    text = random.lognormal(np.log(223) - 0.32, 0.8, num).clip(60, 1471).astype(np.int64)
    tiles = (random.random(num) >= 0.06).astype(np.int64)
    return Samples(text + 576 * tiles, ((text - 35) // 2).clip(1), tiles)


@functools.cache
def run(size: str, name: str) -> tuple[PlannedModel, list[ParameterShape], PlanRequest]:
    file, zero = RUNS[name]
    args = parse_args(
        [
            "--config",
            file,
            "--deepspeed",
            zero,
            "--model_name_or_path",
            BASES[size],
            "--gradient_checkpointing",
            "False",
        ]
    )
    planned = find_planned_model(args)
    request = plan_request(args, Machine(), hidden_size=planned.config.hidden_size, has_vision=True)
    return planned, parameter_shapes(build_model(planned, request), request), request


@functools.cache
def step(
    size: str, name: str, gpus: int, batch: int, order: str = "modality_length", rows: Rows = "joined"
) -> StepTime:
    planned, shapes, request = run(size, name)
    request = request.changed(machine=Machine("cuda", 8, gpus // 8), batch_size=batch, accumulation=1)
    drawing = Drawing(order, rows, 1, 1, 1, waits_each=False)
    return TimePlanner(planned, shapes, mixture(), drawing).plan(request, TimeSettings(GPUS["H200"]))


def scaling_table(size: str, batches: dict[int, int]) -> str:
    """Samples a second, efficiency against 8 GPUs with 16 samples each, and GPU-hours of an epoch, for each run."""
    lines = f"| GPUs | samples a step | {' | '.join(RUNS)} |\n{'| --- ' * (len(RUNS) + 2)}|\n"
    for gpus, batch in batches.items():
        cells = [f"{gpus:,}", f"{gpus * batch:,}"]
        for name in RUNS:
            time = step(size, name, gpus, batch)
            hours = RECORDS / time.samples_per_second / 3600 * gpus
            share = efficiency(time, step(size, name, 8, 16))
            cells.append(f"{time.samples_per_second:,.0f}, {share:.0%}, {hours:.0f} h")
        lines += f"| {' | '.join(cells)} |\n"
    return lines


def parts_table() -> str:
    """Where the time of a step goes, 7B."""
    names = (COMPUTATION, WAITING, COMMUNICATION, OPTIMIZER)
    lines = f"| GPUs x samples of each | run | step, ms | {', ms | '.join(names)}, ms | hidden, ms | sent, GB |\n"
    lines += "| --- " * (len(names) + 5) + "|\n"
    for gpus, batch in ((8, 16), (64, 2), (128, 1), (128, 16), (1024, 16)):
        for name in RUNS:
            time = step("7B", name, gpus, batch)
            parts = " | ".join(f"{1000 * time.parts[part]:,.0f}" for part in names)
            hidden, sent = f"{1000 * time.hidden_seconds:,.0f}", f"{time.sent_bytes / 1e9:.1f}"
            lines += f"| {gpus:,} x {batch} | {name} | {1000 * time.seconds:,.0f} | {parts} | {hidden} | {sent} |\n"
    return lines


def order_table() -> str:
    """What rows, order and the batch of a GPU cost: 7B, LoRA, ZeRO-2, 128 GPUs."""
    lines = "| samples of a GPU | rows | order | slowest GPU over the mean | samples/s | model FLOPs of the peak |\n"
    lines += "| --- " * 6 + "|\n"
    for batch in (1, 4, 16):
        for rows, order in itertools.product(("padded", "joined"), ("random", "length", "modality_length")):
            time = step("7B", "LoRA, ZeRO-2", 128, batch, order, rows)
            rate = f"{time.samples_per_second:,.0f} | {time.mfu:.0%}"
            lines += f"| {batch} | {rows} | {order} | {time.waiting:.2f} | {rate} |\n"
    return lines


def flops_table() -> str:
    """FLOPs of an average sample."""
    lines = "| | trained values | model TFLOP per sample | computation of 16, s |\n| --- | --- | --- | --- |\n"
    for size in BASES:
        for name in ("LoRA, ZeRO-2", "full, ZeRO-2"):
            time, shapes = step(size, name, 8, 16), run(size, name)[1]
            values = sum(shape.numel for shape in shapes if shape.is_trained)
            tflop = time.model_flops / time.samples / 1e12
            kind = name.split(",")[0]
            lines += f"| {size}, {kind} | {values:,} | {tflop:.1f} | {time.parts[COMPUTATION]:.2f} |\n"
    return lines


def tables() -> dict[str, str]:
    """Tables by the mark that stands above each of them on the page."""
    made = {"flops": flops_table(), "order": order_table(), "parts": parts_table()}
    for size in BASES:
        made[f"fixed, {size}"] = scaling_table(size, {gpus: 128 // gpus for gpus in SIZES if gpus <= 128})
        made[f"weak, {size}"] = scaling_table(size, dict.fromkeys(SIZES, 16))
    return {f"<!-- computed by tests/planning/test_scaling_page.py: {name} -->\n": text for name, text in made.items()}


@pytest.mark.slow
def test_tables_are_the_code_s():
    page = PAGE.read_text(encoding="utf-8")
    for mark, table in tables().items():
        assert mark + table in page, mark


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    for mark, table in tables().items():
        before, after = page.split(mark)
        lines = after.splitlines(keepends=True)
        first = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
        page = before + mark + table + "".join(lines[first:])
    PAGE.write_text(page, encoding="utf-8")
