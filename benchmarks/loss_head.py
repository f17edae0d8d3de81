#!/usr/bin/env python3
"""Compares ways to compute the loss of supervised positions: all logits at once, in chunks, Liger's kernel.

    python benchmarks/loss_head.py --preset h200_7b [--output FOLDER] [--dry-run]

Forward and backward pass of the output layer and cross-entropy, with the matrix frozen as under LoRA and trained as in
full fine-tuning. Memory is what a GPU's allocator held beyond inputs and weights; on a CPU it is left out.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import Meter
from part import Rows, run_part
from report import described, markdown_table
from workload import Preset

from llava_ft.models import loss as program

PASSES = 10
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ways(device: torch.device) -> dict[str, Way]:
    """The ways that run on a device: `(hidden, targets, matrix) -> loss`."""
    found: dict[str, Way] = {
        "all logits": lambda hidden, targets, matrix: F.cross_entropy(
            F.linear(hidden, matrix.to(hidden.dtype)).float(), targets, reduction="sum"
        ),
        "in chunks": lambda hidden, targets, matrix: program._ChunkedCrossEntropy.apply(hidden, targets, matrix),
    }
    probe = torch.zeros(1, 8, device=device), (torch.zeros(8, 8, device=device),), torch.zeros(1, dtype=torch.int64)
    liger = program.fused_kernel(*probe)
    if liger is not None:
        found["Liger's kernel"] = lambda hidden, targets, matrix: liger(
            hidden, matrix.to(hidden.dtype), targets, reduction="sum"
        )
    return found


def measure(preset: Preset, positions: int, trains_matrix: bool) -> Rows:
    """A row for each way."""
    device, width, words = torch.device(preset.device), preset.language["hidden_size"], preset.language["vocab_size"]
    generator = torch.Generator(preset.device).manual_seed(0)
    hidden = torch.randn(positions, width, device=device, dtype=preset.dtype, generator=generator)
    dtype = torch.float32 if trains_matrix else preset.dtype
    matrix = 0.02 * torch.randn(words, width, device=device, dtype=dtype, generator=generator)
    targets = torch.randint(words, (positions,), device=device, generator=generator)
    expected = F.cross_entropy(F.linear(hidden.float(), matrix.float()), targets, reduction="sum").item()
    rows: Rows = []
    for name, way in ways(device).items():
        inputs = hidden.clone().requires_grad_(), targets, matrix.clone().requires_grad_(trains_matrix)
        meter, held, loss = Meter(device), torch.cuda.memory_allocated() if device.type == "cuda" else 0, None
        for _ in range(PASSES):
            meter.start()
            loss = way(*inputs)
            loss.backward()
            meter.stop()
            inputs[0].grad = inputs[2].grad = None
        assert loss is not None
        row = {"way": name, "positions": positions, "matrix": "trained" if trains_matrix else "frozen"}
        row |= {"seconds": statistics.median(meter.seconds[2:]), "difference": abs(loss.item() / expected - 1)}
        rows.append(row | ({"bytes": meter.peak_bytes() - held} if device.type == "cuda" else {}))
    return rows


def measure_all(preset: Preset) -> Rows:
    """Rows for each number of positions, with the matrix frozen and trained."""
    sizes = (112 * preset.batch_size, 8192) if preset.device == "cuda" else (112 * preset.batch_size,)
    return [row for positions in sizes for trains in (False, True) for row in measure(preset, positions, trains)]


def page(preset: Preset, rows: Rows, about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        [
            f"{row['positions']:,}",
            str(row["matrix"]),
            str(row["way"]),
            f"{1000 * row['seconds']:.2f}",
            f"{row['bytes'] / 1e6:,.0f}" if "bytes" in row else "",
            f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    names = ["positions", "matrix", "", "ms", "MB", "from float32"]
    return (
        f"# The loss: {preset.name}\n\n`python benchmarks/loss_head.py --preset {preset.name}`; {described(about)}.\n\n"
        f"{markdown_table(names, lines)}\n"
    )


if __name__ == "__main__":
    sys.exit(run_part("loss_head", __doc__, measure_all, page))
