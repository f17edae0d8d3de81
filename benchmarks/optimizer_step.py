#!/usr/bin/env python3
"""Times an AdamW step in torch's three ways, on tensors of the sizes that a run trains.

    python benchmarks/optimizer_step.py --preset h200_7b [--output FOLDER] [--dry-run]

Gradients are clipped before each step, as in training. The median of the steps; on a CPU of CPU seconds of one thread.
"""

import statistics
import sys
from typing import Any

import torch
from measure import Meter
from models import is_trained, preset_config
from part import Rows, run_part
from report import described, markdown_table
from workload import Preset

from llava_ft.models.builder import build_skeleton
from llava_ft.tuning.lora import add_lora

WAYS = {"one tensor after another": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
STEPS = 10


def trained_shapes(preset: Preset) -> list[torch.Size]:
    """Shapes of what the preset trains."""
    model: torch.nn.Module = build_skeleton(preset_config(preset))
    if preset.lora_r:
        with torch.device("meta"):
            model = add_lora(model, r=preset.lora_r, alpha=preset.lora_alpha, dropout=0.0)
    return [parameter.shape for name, parameter in model.named_parameters() if is_trained(name, preset)]


def measure(preset: Preset) -> Rows:
    """A row for each way."""
    device = torch.device(preset.device)
    rows: Rows = []
    for way, options in WAYS.items():
        torch.manual_seed(0)
        weights = [torch.randn(shape, device=device, requires_grad=True) for shape in trained_shapes(preset)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer = torch.optim.AdamW(weights, lr=1e-4, **options)
        meter = Meter(device)
        for _ in range(STEPS):
            meter.start()
            torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=options.get("foreach"))
            optimizer.step()
            meter.stop()
        values = sum(weight.numel() for weight in weights)
        row = {"way": way, "seconds": statistics.median(meter.seconds[2:]), "tensors": len(weights), "values": values}
        rows.append(row | {"checksum": sum(weight.double().sum().item() for weight in weights) / values})
    return rows


def page(preset: Preset, rows: Rows, about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [[str(row["way"]), f"{1000 * row['seconds']:.3f}"] for row in rows]
    return (
        f"# An AdamW step: {preset.name}\n\n`python benchmarks/optimizer_step.py --preset {preset.name}`; "
        f"{described(about)}.\n\n{rows[0]['values']:,} values in {rows[0]['tensors']} tensors, float32, clipped.\n\n"
        f"{markdown_table(['', 'ms'], lines)}\n"
    )


if __name__ == "__main__":
    sys.exit(run_part("optimizer_step", __doc__, measure, page))
