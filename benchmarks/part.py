"""What the benchmarks of a part of a step share: their flags, and where results go."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import where
from workload import PRESETS, Preset, find_preset

Rows = list[dict[str, Any]]


def run_part(
    stem: str,
    description: str | None,
    measure: Callable[[Preset], Rows],
    page: Callable[[Preset, Rows, dict[str, Any]], str],
    argv: list[str] | None = None,
) -> int:
    """Measure, print, and write if asked to.

    Args:
        stem: Results are `STEM_PRESET.json` and `.md`.
        description: For `--help`.
        measure: Gives the rows of a preset.
        page: Writes them as Markdown; its third argument is what they were measured on.
        argv: The command line.

    Returns:
        The exit status: 2 if the preset is for a GPU and there is none.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu_small")
    parser.add_argument("--output", type=Path, help=f"folder for {stem}_PRESET.json and .md")
    parser.add_argument("--dry-run", action="store_true", help="the smallest model in place of the preset's, on a CPU")
    options = parser.parse_args(argv)
    preset = find_preset(options.preset, dry_run=options.dry_run)
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"{preset.name} is for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    if preset.device == "cpu":
        torch.set_num_threads(1)
    about, rows = where(), measure(preset)
    text = page(preset, rows, about)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{stem}_{preset.name}"
        path.with_suffix(".json").write_text(json.dumps({"where": about, "rows": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
    return 0
