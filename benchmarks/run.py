#!/usr/bin/env python3
"""Compares a training step with the original's computation and with transformers' Trainer and PEFT, on the same work.

    python benchmarks/run.py --preset cpu_small | cpu_small_r128 | h200_7b | h200_13b | h200_7b_full | qlora_24gb
        [--output benchmarks/results] [--steps N] [--rounds N] [--variants NAME ...] [--budget-seconds N] [--dry-run]

Each variant runs in a process of its own, with the same random weights, samples, batches and optimizer; the variants
take turns, round by round, so that other work on the machine hits all of them. On a CPU times are CPU seconds of one
thread, and memory is what is resident beyond interpreter and imports. The losses of all steps are compared, and losses
and gradients of two batches before the first step, with those of the plain path of this program.

A variant that fails, that cannot run on this machine, or that the budget has no time for is a row that says so; the
exit status is 1 if one failed. With --dry-run the smallest model takes
the preset's place, on a CPU: its figures mean nothing, and are written nowhere.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from comparison import summarise
from machine import where
from report import page
from variants import MAIN, ORIGINAL, PLAIN, TRANSFORMERS, all_variants
from workload import PRESETS, Preset, find_preset

REPOSITORY = Path(__file__).resolve().parents[1]
LONGEST_RUN = 7200.0
"""Seconds that one variant may take."""

FIRST = (PLAIN, MAIN, ORIGINAL, TRANSFORMERS, "joined", "cached", "compiled")


def run_child(wish: dict[str, Any], preset: Preset, seconds: float) -> dict[str, Any]:
    """Run one variant once, in a process of its own.

    Args:
        wish: For `step.py`.
        preset: What is trained.
        seconds: How long it may take.

    Returns:
        What it measured; `missing` and why, if it cannot run here or has no time; `error` and `output`, if it failed.
    """
    if seconds <= 0:
        return {"missing": "no time was left"}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    if preset.device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # transformers' trainer would divide a batch among several
    command = [sys.executable, str(Path(__file__).with_name("step.py")), json.dumps(wish)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"missing": f"it was not done within {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        output = (done.stderr or done.stdout).strip()
        return {"error": (output.splitlines() or ["no output"])[-1], "output": output[-3000:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure(
    preset: Preset, names: list[str], options: argparse.Namespace, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Run the variants, round by round, for as long as there is time.

    Args:
        preset: What they train.
        names: Which.
        options: Of the command line.
        folder: Where gradients go.

    Returns:
        The results of each variant, one for each round.
    """
    end = time.monotonic() + (options.budget_seconds or float("inf"))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in sorted(names, key=place):
            if any("seconds" not in run for run in runs[name]):
                continue
            left = min(end - time.monotonic(), LONGEST_RUN)
            wish = {
                "variant": name,
                "preset": preset.name,
                "dry_run": options.dry_run,
                "num_steps": options.steps,
                "gradients": str(folder / f"{name}.pt"),
            }
            run = run_child(wish, preset, left)
            if "missing" in run and number:
                continue  # the rounds before are results
            runs[name].append(run)
            said = run.get("output") or run.get("missing") or f"{sum(run['seconds']):.1f} s"
            print(f"round {number + 1}, {name}: {said}", file=sys.stderr, flush=True)
    return runs


def place(name: str) -> int:
    """Where a variant comes in a round: those first that most is to be learnt from, should time run out."""
    return FIRST.index(name) if name in FIRST else len(FIRST)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu_small")
    parser.add_argument("--output", type=Path, help="folder for speed_PRESET.json and .md")
    parser.add_argument("--steps", type=int, help="steps of a round; the preset's when absent")
    parser.add_argument("--rounds", type=int, default=2, help="times that each variant runs")
    parser.add_argument("--variants", nargs="*", help="names, the plain path is always added; all when absent")
    parser.add_argument("--budget-seconds", type=float, help="begin no variant after this time, and end the last one")
    parser.add_argument("--dry-run", action="store_true", help="the smallest model in place of the preset's, on a CPU")
    parser.add_argument("--list", action="store_true", help="print the names of the preset's variants")
    options = parser.parse_args(argv)
    preset = find_preset(options.preset, dry_run=options.dry_run)
    options.steps = options.steps or preset.num_steps
    known = [variant.name for variant in all_variants(preset)]
    if unknown := sorted(set(options.variants or ()) - set(known)):
        parser.error(f"unknown variants {', '.join(unknown)}; {options.preset} has {', '.join(known)}")
    options.variants = [name for name in known if not options.variants or name in options.variants or name == PLAIN]
    if options.dry_run and options.output:
        parser.error("a dry run has no results: leave --output or --dry-run out")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write if asked to."""
    options = parse(argv)
    preset = find_preset(options.preset, dry_run=options.dry_run)
    if options.list:
        print("\n".join(options.variants))
        return 0
    import torch

    about = where()
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"{preset.name} is for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = measure(preset, options.variants, options, folder)
        content = {"preset": preset.name, "where": about} | summarise(runs, preset, options.steps, folder)
    text = page(preset, options, content)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"speed_{preset.name}"
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
    return 1 if any("error" in row for row in content["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
