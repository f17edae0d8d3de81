#!/usr/bin/env python3
"""Compares the memory that `llava-ft plan` says runs take on this GPU with the runs themselves, and times their steps.

    python benchmarks/planned.py [NAME ...] [--output FOLDER] [--list] [--dry-run]

Each run is one of the program with its flags, in a process of its own, on a LLaVA of random weights in bfloat16 that is
written first (7B: 14 GB), and on records that are all as long as `model_max_length` and have an image each. The peak is
`torch.cuda.max_memory_allocated`, which the plan's tensors are compared with, without its allowances for CUDA's context
and fragmentation. The time is the median of the steps behind the first two.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import where
from random_model import WORDS, write_model
from report import described, markdown_table
from workload import Preset, find_preset

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS, NOT_TIMED = 6, 2


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        preset: Its model and how it is trained.
        flags: Flags beside the preset's.
        length: Tokens of every sample.
    """

    preset: str
    flags: dict[str, str] = field(default_factory=dict)
    length: int = 763

    def command_line(self, folder: Path, *, dry_run: bool) -> list[str]:
        """The flags of the run, as for `train.py`."""
        preset = find_preset(self.preset, dry_run=dry_run)
        values = preset.flags | {"padding_free": "True", "mm_projector_lr": "2e-5"} | self.flags
        values |= {
            "model_name_or_path": str(folder / "model"),
            "data_path": str(folder / "data" / "records.json"),
            "image_folder": str(folder / "data"),
            "output_dir": str(folder / "output"),
            "model_max_length": str(preset.max_length if dry_run else self.length),
            "max_steps": str(STEPS),
            "logging_steps": "1",
            "save_strategy": "no",
        }
        return [text for name, value in values.items() for text in (f"--{name}", value)]


CASES = {
    "lora_7b": Case("h200_7b"),
    "qlora_7b_2048": Case("qlora_24gb", {"per_device_train_batch_size": "1"}, 2048),
    "lora_7b_selective": Case("h200_7b", {"gradient_checkpointing": "selective"}),
    "lora_7b_full_offload": Case("h200_7b", {"gradient_checkpointing": "full", "activation_offload": "True"}),
    "full_7b": Case("h200_7b_full"),
    "lora_13b": Case("h200_13b"),
}


def make_data(folder: Path, preset: Preset) -> None:
    """Write records that are longer than any limit, each with a picture of its own."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng, side = random.Random(1), preset.vision["image_size"]
    records = []
    for number in range(STEPS * preset.batch_size):
        Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(folder / f"{number}.png")
        question, answer = (" ".join(rng.choices(WORDS, k=count)) for count in (20, 2500))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))


def predict(argv: list[str]) -> dict[str, Any]:
    """What `llava-ft plan` says."""
    from llava_ft.args import parse_args
    from llava_ft.planning.plan import make_plan
    from llava_ft.planning.request import plan_machine

    args = parse_args(argv)
    plan = make_plan(args, plan_machine(args.inherited, gpus=1, nodes=1, gpu_memory="1000GiB"))
    return {"bytes": plan.memory.tensors, "peak_in": plan.memory.peak_phase}


def child(argv: list[str]) -> None:
    """Train in this process, and print what it took."""
    import time

    import torch
    from transformers import TrainerCallback

    from llava_ft.args import parse_args
    from llava_ft.training.distributed import join_ranks, leave_ranks
    from llava_ft.training.run import prepare_run

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.begin = self.now()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.append(self.now() - self.begin)

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

    args = parse_args(argv)
    watch = join_ranks(args)
    run, clock = prepare_run(args), Clock()
    run.trainer.add_callback(clock)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run.trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    result = {"bytes": peak, "seconds": clock.seconds, "log": run.trainer.state.log_history, "notes": args.notes}
    print("RESULT " + json.dumps(result))
    run.stop.release()
    leave_ranks(watch)


def measure(argv: list[str], dry_run: bool) -> dict[str, Any]:
    """Run in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry_run else {}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"error": (done.stderr or done.stdout)[-3000:]}
    return json.loads(lines[-1].removeprefix("RESULT "))


def compare(name: str, folder: Path, *, dry_run: bool) -> dict[str, Any]:
    """Plan and measure one run."""
    case = CASES[name]
    argv = case.command_line(folder, dry_run=dry_run)
    preset = find_preset(case.preset, dry_run=dry_run)
    row: dict[str, Any] = {"name": name, "flags": argv, "planned": predict(argv), "measured": measure(argv, dry_run)}
    measured = row["measured"]
    if "error" in measured:
        return row
    row["step_seconds"] = statistics.median(measured["seconds"][NOT_TIMED:])
    batch = int(case.flags.get("per_device_train_batch_size", preset.batch_size))
    row["samples_per_second"] = batch / row["step_seconds"]
    if measured["bytes"]:
        row["ratio"] = round(row["planned"]["bytes"] / measured["bytes"], 3)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = ["run", "planned GB", "measured GB", "ratio", "s/step", "samples/s"]
    lines = []
    for row in rows:
        planned, measured = row["planned"], row["measured"]
        if "error" in measured:
            lines.append([row["name"], f"{planned['bytes'] / 1e9:.2f}", "failed"])
            continue
        peak = "" if measured["bytes"] is None else f"{measured['bytes'] / 1e9:.2f}"
        figures = [f"{planned['bytes'] / 1e9:.2f}", peak, str(row.get("ratio", ""))]
        lines.append([row["name"], *figures, f"{row['step_seconds']:.3f}", f"{row['samples_per_second']:.2f}"])
    return markdown_table(names, lines)


def measure_all(names: list[str], *, dry_run: bool) -> Iterator[dict[str, Any]]:
    """Compare cases; those with the same model share its files, and there is never more than one on the disk."""
    presets = {name: find_preset(CASES[name].preset, dry_run=dry_run) for name in names}
    widths = sorted({preset.language["hidden_size"] for preset in presets.values()})
    for width in widths:
        chosen = {name: preset for name, preset in presets.items() if preset.language["hidden_size"] == width}
        preset = max(chosen.values(), key=lambda preset: preset.batch_size)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_model(folder / "model", preset.language, preset.vision, dtype="bfloat16")
            make_data(folder / "data", preset)
            for name in chosen:
                yield compare(name, folder, dry_run=dry_run)


def main(argv: list[str] | None = None) -> int:
    """Compare what is asked for, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs; all when absent")
    parser.add_argument("--output", type=Path, help="folder for planned.json and planned.md")
    parser.add_argument("--list", action="store_true", help="print the names of the runs")
    parser.add_argument("--dry-run", action="store_true", help="one run of the smallest model, on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(json.loads(options.child))
        return 0
    if options.list:
        print("\n".join(CASES))
        return 0
    if unknown := sorted(set(options.names) - set(CASES)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(CASES)}")
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("These runs are for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    about = where()
    rows: list[dict[str, Any]] = []
    for row in measure_all(options.names or list(CASES)[: 1 if options.dry_run else None], dry_run=options.dry_run):
        rows.append(row)
        print(row["measured"].get("error", table([row])), flush=True)
        if options.output:  # after each, because all take a while
            write_results(options.output, rows, about)
    return 1 if any("error" in row["measured"] for row in rows) else 0


def write_results(folder: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the rows with what they were measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planned.json").write_text(json.dumps({"where": about, "rows": rows}, indent=1) + "\n")
    text = f"# Planned and measured runs\n\n`python benchmarks/planned.py`; {described(about)}.\n\n{table(rows)}\n"
    (folder / "planned.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
