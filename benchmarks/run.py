#!/usr/bin/env python3
"""Compares a training step with the original's computation and with transformers' Trainer and PEFT, on the same work.

    python benchmarks/run.py --preset cpu_small | h200_7b | h200_13b | qlora_24gb
        [--output benchmarks/results] [--steps N] [--rounds N] [--variants NAME ...]

Each variant runs in a process of its own, with the same random weights, samples, batches and optimizer; the variants
take turns, round by round, so that other work on the machine hits all of them. On a CPU times are CPU seconds of one
thread, and memory is what is resident beyond interpreter and imports. The losses of all steps are compared, and losses
and gradients of two batches before the first step, with those of the plain path of this program.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import where
from measure import model_flops
from variants import all_variants
from workload import PRESETS, Preset, make_batches

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINES = {"original": "(a)", "transformers": "(b)"}
PLAIN = "plain"


def run_child(name: str, preset: Preset, num_steps: int, folder: Path) -> dict[str, Any]:
    """Run one variant once."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    if preset.device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("variants.py")
    command = [sys.executable, str(script), name, preset.name, str(num_steps), str(folder / f"{name}.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7200)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{(done.stderr or done.stdout)[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def differences(folder: Path, name: str) -> dict[str, float]:
    """Largest differences of a variant from the plain path before the first step."""
    import torch

    plain, other = (torch.load(folder / f"{each}.pt", weights_only=True) for each in (PLAIN, name))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, other, strict=True))
    gradients = [
        ((b["gradients"][key] - value).norm() / value.norm().clamp(min=1e-30)).item()
        for a, b in zip(plain, other, strict=True)
        for key, value in a["gradients"].items()
        if value.norm() > 0
    ]
    names = [set(each["gradients"]) for each in (plain[0], other[0])]
    if names[0] != names[1]:
        raise SystemExit(f"{name} trains other parameters than {PLAIN}: {sorted(names[0] ^ names[1])[:5]}")
    return {"loss_difference": loss, "gradient_difference": max(gradients)}


def summarise(
    runs: dict[str, list[dict[str, Any]]], preset: Preset, num_steps: int, folder: Path
) -> list[dict[str, Any]]:
    """One row for each variant."""
    samples = [sample for batch in make_batches(preset, num_steps) for sample in batch]
    tokens = sum(len(sample.input_ids) for sample in samples)
    rate = statistics.median(run["product_rate"] for each in runs.values() for run in each)
    rows: list[dict[str, Any]] = []
    for name, each in runs.items():
        seconds = sum(statistics.median(times) for times in zip(*(run["seconds"] for run in each), strict=True))
        flops = model_flops(preset, samples, with_tower=not each[0]["cached"])
        steps = zip(runs[PLAIN][0]["losses"], each[0]["losses"], strict=True)
        row = {
            "name": name,
            "label": each[0]["label"],
            "samples_per_second": len(samples) / seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops / seconds,
            "share_of_product_rate": flops / seconds / rate,
            "peak_bytes": statistics.median(run["peak"] for run in each),
            "largest_loss_difference_of_a_step": max(abs(a - b) for a, b in steps),
            **differences(folder, name),
        }
        rows.append(row)
    for baseline in (row for row in rows if row["name"] in BASELINES):
        key = BASELINES[baseline["name"]]
        for row in rows:
            row[f"speed_to_{key}"] = row["samples_per_second"] / baseline["samples_per_second"]
            row[f"memory_to_{key}"] = row["peak_bytes"] / baseline["peak_bytes"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    keys = [key for name, key in BASELINES.items() if any(row["name"] == name for row in rows)]
    names = ["", "samples/s", "tokens/s", "model TFLOP/s", "of products", "peak, MB"]
    names += [f"speed to {key}" for key in keys] + [f"memory to {key}" for key in keys]
    names += ["loss", "loss of a step", "gradients"]
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for row in rows:
        cells = [
            row["label"],
            f"{row['samples_per_second']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['model_flops_per_second'] / 1e12:.4g}",
            f"{row['share_of_product_rate']:.0%}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            *(f"{row[f'speed_to_{key}']:.2f}" for key in keys),
            *(f"{row[f'memory_to_{key}']:.0%}" for key in keys),
            f"{row['loss_difference']:.0e}",
            f"{row['largest_loss_difference_of_a_step']:.0e}",
            f"{row['gradient_difference']:.0e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(preset: Preset, options: argparse.Namespace, content: dict[str, Any]) -> str:
    """The page of results."""
    described = ", ".join(f"{key} {value}" for key, value in content["where"].items() if value is not None)
    is_cpu = preset.device == "cpu"
    clock, memory = ("CPU seconds of one thread", "resident") if is_cpu else ("seconds", "on the device")
    dtype = str(preset.dtype).removeprefix("torch.")
    return (
        f"# A training step: {preset.name}\n\n"
        f"`python benchmarks/run.py --preset {preset.name} --steps {options.steps} --rounds {options.rounds}`; "
        f"{described}.\n\n"
        f"LoRA r={preset.lora_r} on the language model and the projector trained, {dtype}, {preset.batch_size} samples "
        f"a step, {options.steps * preset.batch_size} samples of `benchmarks/workload.py`, random weights. Times are "
        f"{clock}, the median of {options.rounds} rounds step by step. Model FLOPs are those that training needs "
        "(`benchmarks/measure.py`), the same for all rows but the cached one; matrix products alone ran at "
        f"{content['product_rate'] / 1e12:.3g} TFLOP/s. Memory is {memory}, weights included. The last columns are the "
        "largest differences from the third row: of the loss of two batches before training, of the loss of any step, "
        "and of a gradient (norm of the difference to the norm).\n\n"
        f"{table(content['rows'])}\n"
    )


def main() -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu_small")
    parser.add_argument("--output", type=Path, help="folder for speed_PRESET.json and .md")
    parser.add_argument("--steps", type=int, help="steps of a round; the preset's when absent")
    parser.add_argument("--rounds", type=int, default=2, help="times that each variant runs")
    parser.add_argument("--variants", nargs="*", help="names; all when absent")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    options.steps = options.steps or preset.num_steps
    known = [variant.name for variant in all_variants()]
    names = [name for name in known if not options.variants or name in options.variants or name == PLAIN]
    import torch

    about = where()
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"{preset.name} is for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(options.rounds):
            for name in names:
                runs[name].append(run_child(name, preset, options.steps, folder))
                print(f"round {number + 1}, {name}: {sum(runs[name][-1]['seconds']):.1f} s", file=sys.stderr)
        rows = summarise(runs, preset, options.steps, folder)
    rate = statistics.median(run["product_rate"] for each in runs.values() for run in each)
    content = {"preset": preset.name, "where": about, "product_rate": rate, "rows": rows, "runs": runs}
    text = report(preset, options, content)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"speed_{preset.name}"
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
