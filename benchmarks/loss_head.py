#!/usr/bin/env python3
"""Compares ways to compute the loss of supervised positions: all logits at once, in chunks, Liger's kernel.

    python benchmarks/loss_head.py --preset h200_7b [--output FOLDER] [--dry-run]

Forward and backward pass of the output layer and cross-entropy, with the matrix frozen as under LoRA and trained as in
full fine-tuning. Memory is what a GPU's allocator held beyond inputs and weights; on a CPU it is left out.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import where
from measure import Meter
from report import described, markdown_table
from workload import PRESETS, Preset, find_preset

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


def measure(preset: Preset, positions: int, trains_matrix: bool) -> list[dict[str, object]]:
    """A row for each way."""
    device, width, words = torch.device(preset.device), preset.language["hidden_size"], preset.language["vocab_size"]
    generator = torch.Generator(preset.device).manual_seed(0)
    hidden = torch.randn(positions, width, device=device, dtype=preset.dtype, generator=generator)
    dtype = torch.float32 if trains_matrix else preset.dtype
    matrix = 0.02 * torch.randn(words, width, device=device, dtype=dtype, generator=generator)
    targets = torch.randint(words, (positions,), device=device, generator=generator)
    expected = F.cross_entropy(F.linear(hidden.float(), matrix.float()), targets, reduction="sum").item()
    rows: list[dict[str, object]] = []
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


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu_small")
    parser.add_argument("--output", type=Path, help="folder for loss_head_PRESET.json and .md")
    parser.add_argument("--dry-run", action="store_true", help="the smallest model in place of the preset's, on a CPU")
    options = parser.parse_args(argv)
    preset = find_preset(options.preset, dry_run=options.dry_run)
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"{preset.name} is for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    if preset.device == "cpu":
        torch.set_num_threads(1)
    about = where()
    sizes = (112 * preset.batch_size, 8192) if preset.device == "cuda" else (112 * preset.batch_size,)
    rows = [row for positions in sizes for trains in (False, True) for row in measure(preset, positions, trains)]
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
    text = (
        f"# The loss: {preset.name}\n\n`python benchmarks/loss_head.py --preset {preset.name}`; {described(about)}.\n\n"
        f"{markdown_table(names, lines)}\n"
    )
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"loss_head_{preset.name}"
        path.with_suffix(".json").write_text(json.dumps({"where": about, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
