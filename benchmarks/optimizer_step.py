#!/usr/bin/env python3
"""Times an AdamW step in torch's three ways, on tensors of the sizes that a run trains.

    python benchmarks/optimizer_step.py --preset h200_7b [--output FOLDER] [--dry-run]

Gradients are clipped before each step, as in training. The median of the steps; on a CPU of CPU seconds of one thread.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from machine import where
from measure import Meter
from models import is_trained, preset_config
from report import described, markdown_table
from workload import PRESETS, Preset, find_preset

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


def measure(preset: Preset) -> list[dict[str, object]]:
    """A row for each way."""
    device = torch.device(preset.device)
    rows: list[dict[str, object]] = []
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


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu_small")
    parser.add_argument("--output", type=Path, help="folder for optimizer_step_PRESET.json and .md")
    parser.add_argument("--dry-run", action="store_true", help="the smallest model in place of the preset's, on a CPU")
    options = parser.parse_args(argv)
    preset = find_preset(options.preset, dry_run=options.dry_run)
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"{preset.name} is for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    if preset.device == "cpu":
        torch.set_num_threads(1)
    about, rows = where(), measure(preset)
    lines = [[str(row["way"]), f"{1000 * row['seconds']:.3f}"] for row in rows]
    text = (
        f"# An AdamW step: {preset.name}\n\n`python benchmarks/optimizer_step.py --preset {preset.name}`; "
        f"{described(about)}.\n\n{rows[0]['values']:,} values in {rows[0]['tensors']} tensors, float32, clipped.\n\n"
        f"{markdown_table(['', 'ms'], lines)}\n"
    )
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"optimizer_step_{preset.name}"
        path.with_suffix(".json").write_text(json.dumps({"where": about, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
