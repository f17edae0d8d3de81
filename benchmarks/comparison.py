"""From the runs of the benchmark of a step to its figures: speed, share of the rate of products, memory, losses."""

import statistics
from pathlib import Path
from typing import Any

import torch
from measure import model_flops
from variants import ORIGINAL, PLAIN, TRANSFORMERS, all_variants
from workload import Preset, make_batches

BASELINES = {ORIGINAL: "(a)", TRANSFORMERS: "(b)"}
Runs = dict[str, list[dict[str, Any]]]


def summarise(runs: Runs, preset: Preset, num_steps: int, folder: Path) -> dict[str, Any]:
    """The rate of products, a row for each variant, and the runs that they come from.

    Args:
        runs: What `step.py` printed, by variant.
        preset: What was trained.
        num_steps: Steps of each run.
        folder: Where the runs have put their gradients.
    """
    samples = [sample for batch in make_batches(preset, num_steps) for sample in batch]
    tokens = sum(len(sample.input_ids) for sample in samples)
    good = {name: each for name, each in runs.items() if each and all("seconds" in run for run in each)}
    rates = [run["product_rate"] for each in good.values() for run in each]
    rate = statistics.median(rates) if rates else None
    needed = {cached: model_flops(preset, samples, with_tower=not cached) for cached in (False, True)}
    rows: list[dict[str, Any]] = []
    for variant in all_variants(preset):
        if variant.name not in runs:
            continue
        row: dict[str, Any] = {"name": variant.name, "label": variant.label}
        rows.append(row)
        if variant.name not in good:
            row |= {key: run[key] for run in runs[variant.name] for key in ("error", "missing") if key in run}
            continue
        each = good[variant.name]
        seconds = sum(statistics.median(times) for times in zip(*(run["seconds"] for run in each), strict=True))
        flops = needed[variant.cached]
        row |= {
            "samples_per_second": len(samples) / seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops / seconds,
            "share_of_product_rate": flops / seconds / rate,
            "peak_bytes": statistics.median(run["peak"] for run in each),
        }
        if PLAIN in good:
            row |= differences(good, variant.name, folder)
    _add_ratios(rows)
    return {"product_rate": rate, "rows": rows, "runs": runs}


def _add_ratios(rows: list[dict[str, Any]]) -> None:
    measured = [row for row in rows if "peak_bytes" in row]
    for baseline in (row for row in measured if row["name"] in BASELINES):
        key = BASELINES[baseline["name"]]
        for row in measured:
            row[f"speed_to_{key}"] = row["samples_per_second"] / baseline["samples_per_second"]
            row[f"memory_to_{key}"] = row["peak_bytes"] / baseline["peak_bytes"]


def differences(runs: Runs, name: str, folder: Path) -> dict[str, float]:
    """Largest differences of a variant from the plain path: before the first step, and in the loss of any step.

    Raises:
        ValueError: It trains other parameters.
    """
    plain, other = (torch.load(folder / f"{each}.pt", weights_only=True) for each in (PLAIN, name))
    losses = zip(runs[PLAIN][0]["losses"], runs[name][0]["losses"], strict=True)
    shares = []
    for a, b in zip(plain, other, strict=True):
        if a["gradients"].keys() != b["gradients"].keys():
            odd = sorted(a["gradients"].keys() ^ b["gradients"].keys())
            raise ValueError(f"{name} trains other parameters than {PLAIN}: {odd[:5]}")
        for key, value in a["gradients"].items():
            if value.norm() > 0:
                shares.append(((b["gradients"][key] - value).norm() / value.norm()).item())
    return {
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(plain, other, strict=True)),
        "largest_loss_difference_of_a_step": max(abs(a - b) for a, b in losses),
        "gradient_difference": max(shares),
    }
