#!/usr/bin/env python3
"""Checks and times everything that needs a GPU, in one call, on the machine it is called on.

    python benchmarks/gpu.py --output benchmarks/results [--budget-seconds N] [--parts NAME ...] [--list] [--dry-run]

Each part runs in a process of its own with a time limit of its own, so that one that fails or hangs does not lose the
others. The budget is divided by the parts' weights; what a part leaves over goes to those behind it. After each part
OUTPUT/gpu.json and OUTPUT/gpu.md are written anew; parts of an earlier call that are in gpu.json stay, with the
hardware and commit that they were measured on, so that several short calls give one page.

With --dry-run each part runs on a CPU with the smallest model: to see that everything starts, before a GPU is paid for.
Exit status: 0 if all parts that ran are done, 1 if one failed, 2 if there is no GPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import where
from report import described, markdown_table

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
LAST_SECONDS = 20.0
"""A part that less would be left for is not started; one with a budget of its own ends so long before its limit."""


@dataclass(frozen=True)
class Call:
    """How a part is called.

    Attributes:
        output: Folder for its results.
        seconds: How long it may take.
        dry_run: Whether the smallest model takes the preset's place.
    """

    output: Path
    seconds: float
    dry_run: bool

    def script(self, name: str, *flags: str) -> list[str]:
        """The command of a script of this folder, whose results go to `output`."""
        dry = ["--dry-run"] if self.dry_run else ["--output", str(self.output)]
        return [sys.executable, str(HERE / name), *flags, *dry]


@dataclass(frozen=True)
class Part:
    """One thing to check or to time.

    Attributes:
        name: For the command line.
        title: For the page.
        weight: Its share of the budget.
        command: Makes its command.
    """

    name: str
    title: str
    weight: float
    command: Callable[[Call], Sequence[str]]


def _tests(call: Call) -> list[str]:
    which = ["--collect-only"] if call.dry_run else ["--timeout", str(int(call.seconds))]
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(REPOSITORY / "tests"),
        *which,
    ]


def _attention(call: Call) -> list[str]:
    return call.script("attention.py", "--check", "--time")


def _script(name: str, preset: str) -> Callable[[Call], list[str]]:
    return lambda call: call.script(name, "--preset", preset)


def _step(preset: str, num_steps: int) -> Callable[[Call], list[str]]:
    def command(call: Call) -> list[str]:
        steps, seconds = 2 if call.dry_run else num_steps, call.seconds - LAST_SECONDS
        flags = ["--rounds", "1", "--steps", str(steps), "--budget-seconds", f"{seconds:.0f}"]
        if call.dry_run:
            flags += ["--variants", "fast_lora" if preset == "h200_7b" else "plain"]
        return call.script("run.py", "--preset", preset, *flags)

    return command


PARTS = (
    Part("attention", "Attention kernels against each other", 4, _attention),
    Part("tests", "Tests that need a GPU", 4, _tests),
    Part("loss", "Loss: all logits, chunks, Liger's kernel", 1, _script("loss_head.py", "h200_7b")),
    Part("optimizer", "AdamW: fused, foreach", 1, _script("optimizer_step.py", "h200_7b")),
    Part("lora_layer", "One layer with LoRA", 2, _script("lora_layer.py", "h200_7b")),
    Part("step_7b", "A step of LoRA, 7B: attention, compiling, recomputation", 16, _step("h200_7b", 6)),
    Part("step_qlora", "A step of QLoRA, 7B", 8, _step("qlora_24gb", 6)),
    Part("planned", "Runs of the program, planned and measured", 10, lambda call: call.script("planned.py")),
    Part("step_full", "A step of full fine-tuning, 7B", 6, _step("h200_7b_full", 6)),
    Part("step_13b", "A step of LoRA, 13B", 8, _step("h200_13b", 4)),
)


def run_part(part: Part, seconds: float, *, dry_run: bool) -> dict[str, Any]:
    """Run a part, and return what it gave: its files, how long it took, how it ended and the end of what it said."""
    with tempfile.TemporaryDirectory() as temporary:
        call = Call(Path(temporary) / "results", seconds, dry_run)
        command = list(part.command(call))
        begin = time.monotonic()
        status, said = run_within(command, seconds, Path(temporary) / "said", is_dry=dry_run)
        files = sorted(call.output.glob("*")) if call.output.is_dir() else []
        return {
            "command": " ".join([Path(command[0]).name, *command[1:]]),
            "status": status,
            "seconds": round(time.monotonic() - begin, 1),
            "limit": round(seconds, 1),
            "said": said[-6000:],
            "pages": {file.name: file.read_text() for file in files if file.suffix == ".md"},
            "data": {file.name: json.loads(file.read_text()) for file in files if file.suffix == ".json"},
        }


def run_within(command: Sequence[str], seconds: float, said: Path, *, is_dry: bool = False) -> tuple[str, str]:
    """Run a command, and end it with all that it started when its time is up.

    Returns:
        `done`, `failed (status N)` or `not done within N s`; and what it wrote.
    """
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if is_dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # transformers' trainer would divide a batch among several
    with said.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else f"failed (status {code})"
        except subprocess.TimeoutExpired:
            status = f"not done within {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, said.read_text(errors="replace")


def run_parts(parts: Sequence[Part], options: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    """Run parts one after the other within the budget, and write the page after each."""
    end = time.monotonic() + options.budget_seconds
    results: dict[str, Any] = read_results(options.output)
    for number, part in enumerate(parts):
        seconds = (end - time.monotonic()) * part.weight / sum(each.weight for each in parts[number:])
        if seconds < LAST_SECONDS:
            result: dict[str, Any] = {"status": "not run: no time was left", "seconds": 0.0, "pages": {}, "data": {}}
        else:
            print(f"{part.name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
            result = run_part(part, seconds, dry_run=options.dry_run)
        print(f"{part.name}: {result['status']}, {result['seconds']} s", file=sys.stderr, flush=True)
        if "command" not in result and "command" in results.get(part.name, {}):
            continue  # an earlier call had time for it
        results[part.name] = {"title": part.title, "where": about} | result
        if options.output:
            write_results(options.output, results)
    return results


def read_results(folder: Path | None) -> dict[str, Any]:
    """What earlier calls have measured."""
    path = None if folder is None else folder / "gpu.json"
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write gpu.json and gpu.md, each at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("gpu.json", json.dumps(results, indent=1) + "\n"), ("gpu.md", page(results))):
        staged = folder / f".{name}"
        staged.write_text(text)
        staged.replace(folder / name)


def page(results: dict[str, Any]) -> str:
    """All results as Markdown: a table of the parts, then their own pages."""
    known = {part.name: part for part in PARTS}
    rows = [
        [name, part.title, results[name]["status"], f"{results[name]['seconds']:.0f}"]
        if name in results
        else [name, part.title, "not yet measured", ""]
        for name, part in known.items()
    ]
    lines = ["# On a GPU", "", "`python benchmarks/gpu.py`", ""]
    lines += [markdown_table(["part", "", "status", "seconds"], rows), ""]
    for name, result in results.items():
        lines += [f"## {result['title']}", ""]
        if "command" in result:
            lines += [f"`{result['command']}`; {described(result['where'])}.", ""]
        for text in result["pages"].values():
            lines += [text.replace("\n# ", "\n### ").removeprefix("# ").rstrip(), ""]
        if result["status"] != "done" or not result["pages"]:
            tail = "\n".join(result.get("said", "").splitlines()[-40:])
            lines += [f"{name}: {result['status']}.", "", "```", tail.replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for gpu.json and gpu.md; needed except in a dry run")
    parser.add_argument("--budget-seconds", type=float, default=3600.0, help="for all parts together; default 3600")
    parser.add_argument("--parts", nargs="*", metavar="NAME", help="parts, in their order; all when absent")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--dry-run", action="store_true", help="the smallest models, on a CPU")
    options = parser.parse_args(argv)
    known = [part.name for part in PARTS]
    if unknown := sorted(set(options.parts or ()) - set(known)):
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(known)}")
    if not options.dry_run and not options.list and options.output is None:
        parser.error("--output is missing: name the folder for gpu.json and gpu.md")
    if options.dry_run and options.output:
        parser.error("a dry run has no results: leave --output or --dry-run out")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for."""
    options = parse(argv)
    parts = [part for part in PARTS if not options.parts or part.name in options.parts]
    if options.list:
        print("\n".join(f"{part.name:12}{part.title}" for part in parts))
        return 0
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("torch sees no GPU here: nothing is measured. --dry-run needs none.", file=sys.stderr)
        return 2
    results = run_parts(parts, options, where())
    ran = [results[part.name] for part in parts if part.name in results]
    return 0 if all(result["status"] == "done" for result in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
