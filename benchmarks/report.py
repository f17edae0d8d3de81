"""Pages of results in Markdown."""

import argparse
from collections.abc import Sequence
from typing import Any

from comparison import BASELINES
from variants import all_variants
from workload import Preset


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; shorter rows leave the last cells empty."""
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    lines += ["| " + " | ".join([*row, *[""] * (len(names) - len(row))]) + " |" for row in rows]
    return "\n".join(lines)


def described(about: dict[str, Any]) -> str:
    """What something was measured on, in a line."""
    return ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `summarise`."""
    keys = [key for key in BASELINES.values() if any(f"speed_to_{key}" in row for row in rows)]
    names = ["", "samples/s", "tokens/s", "model TFLOP/s", "of products", "peak, MB"]
    names += [f"speed to {key}" for key in keys] + [f"memory to {key}" for key in keys]
    names += ["loss", "loss of a step", "gradients"]
    lines = []
    for row in rows:
        if "peak_bytes" not in row:
            reason = str(row.get("error") or row.get("missing") or "not run")
            lines.append([row["label"], f"not measured: {reason[:200].replace('|', '/')}"])
            continue
        compared = ("loss_difference", "largest_loss_difference_of_a_step", "gradient_difference")
        lines.append(
            [
                row["label"],
                f"{row['samples_per_second']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['model_flops_per_second'] / 1e12:.4g}",
                f"{row['share_of_product_rate']:.0%}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                *(f"{row[f'speed_to_{key}']:.2f}" for key in keys),
                *(f"{row[f'memory_to_{key}']:.0%}" for key in keys),
                *(f"{row[key]:.0e}" if key in row else "" for key in compared),
            ]
        )
    return markdown_table(names, lines)


def page(preset: Preset, options: argparse.Namespace, content: dict[str, Any]) -> str:
    """The page of a preset's results."""
    is_cpu = preset.device == "cpu"
    clock, memory = ("CPU seconds of one thread", "resident") if is_cpu else ("seconds", "on the device")
    dtype = str(preset.dtype).removeprefix("torch.")
    lora = f"LoRA r={preset.lora_r} on the language model"
    held = ", its weights in 4 bits," if preset.bits == 4 else ""
    trained = f"{lora}{held} and the projector" if preset.lora_r else "Language model and projector"
    rate = content["product_rate"]
    command = f"python benchmarks/run.py --preset {preset.name} --steps {options.steps} --rounds {options.rounds}"
    if len(options.variants) < len(all_variants(preset)):
        command += " --variants " + " ".join(options.variants)
    products = "were not measured" if rate is None else f"alone ran at {rate / 1e12:.3g} TFLOP/s"
    return (
        f"# A training step: {preset.name}\n\n"
        f"`{command}`; {described(content['where'])}.\n\n"
        f"{trained} trained, {dtype}, {preset.batch_size} samples a step, {options.steps * preset.batch_size} samples "
        f"of `benchmarks/workload.py`, random weights, gradient_checkpointing {preset.recomputed}. Times are {clock}, "
        f"the median of {options.rounds} rounds step by step. Model FLOPs are those that training needs, as `llava-ft "
        f"plan` counts them, the same for all rows but the cached one; matrix products {products}. Memory is "
        f"{memory}, weights included. The last columns are the largest differences from the padded row: of the loss of "
        "two batches before training, of the loss of any step, and of a gradient (norm of the difference to the "
        f"norm).\n\n{table(content['rows'])}\n"
    )
