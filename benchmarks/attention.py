#!/usr/bin/env python3
"""Checks and times the attention kernels that run on this machine, on rows of joined samples and on padded rows.

    python benchmarks/attention.py [--check] [--time] [--output benchmarks/results] [--dry-run]

Every kernel is called as a decoder layer calls it. `--check` compares output and gradients with attention within
samples written out in float64: a kernel may be a few times as far from it as the same computation in the kernel's
dtype. `--time` measures forward and backward passes of one layer's attention at the shapes of a 7B model, the samples
joined and padded. Without either both are done. A kernel that does not run here has a line that says why. Exits 1 if a
kernel differs.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from machine import where

from llava_ft.args.attention import KERNELS, obstacle, this_machine
from llava_ft.models.attention.boundaries import SampleBoundaries
from llava_ft.models.attention.kernels import register

BY_SAMPLE = KERNELS[:-1]
"""Eager attention is not timed on joined rows: it needs a matrix of all their positions."""

MASKED = "sdpa with a mask"
"""torch's kernel on whole rows with a mask over samples and padding, for comparison."""

ALLOWED = 3.0
"""A kernel's error, in errors of the same computation in its dtype without a kernel."""


@dataclass(frozen=True)
class Shape:
    """One layer's attention.

    Attributes:
        lengths: Tokens of each sample.
        heads: Heads of queries.
        key_heads: Heads of keys and values.
        width: Width of a head.
    """

    lengths: tuple[int, ...]
    heads: int = 32
    key_heads: int = 32
    width: int = 128

    def padded(self) -> "Shape":
        """The same samples, each as long as the longest."""
        longest = max(self.lengths)
        return Shape((longest,) * len(self.lengths), self.heads, self.key_heads, self.width)

    def model_flops(self) -> int:
        """FLOPs that a forward and a backward pass need: causal pairs within samples."""
        pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        return 12 * pairs * self.heads * self.width


CHECKED = (
    Shape((200, 1, 129, 300, 17), 4, 4, 128),
    Shape((200, 1, 129, 300, 17), 8, 2, 64),
    Shape((257, 257), 4, 4, 128),
)
TIMED = {
    "16 samples of 600 to 1,000 tokens": Shape(tuple(600 + 27 * (7 * number % 16) for number in range(16))),
    "5 rows of 4,096 tokens, 18 samples": Shape(
        (900, 900, 900, 900, 496, *(700, 1200, 1500, 300, 396) * 2, 2048, 2048, 4096)
    ),
}


class _Layer(torch.nn.Module):
    """What kernels read of the layer that calls them."""

    is_causal = True

    def __init__(self, shape: Shape):
        super().__init__()
        self.num_key_value_groups = shape.heads // shape.key_heads


def make_tensors(shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values as the projections of a layer lay them out, `(B, heads, T, W)`."""
    generator = torch.Generator(device).manual_seed(3)
    length = sum(shape.lengths) // rows
    made = []
    for heads in (shape.heads, shape.key_heads, shape.key_heads):
        values = torch.randn(rows, length, heads, shape.width, generator=generator, device=device, dtype=torch.float32)
        made.append(values.to(dtype).transpose(1, 2))
    return made


def caller(kernel: str, shape: Shape, rows: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """The kernel as a layer calls it on that shape: `(B, heads, T, W)` to `(B, T, heads, W)`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layer = _Layer(shape).train()
    if kernel == MASKED:
        sample = torch.arange(len(shape.lengths)).repeat_interleave(torch.tensor(shape.lengths)).view(rows, -1)
        mask = (sample[:, :, None] == sample[:, None]).tril()[:, None].to(device)
        masked: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return lambda query, key, value: masked(layer, query, key, value, mask)[0]
    function: Any = ALL_ATTENTION_FUNCTIONS[register(kernel)]
    boundaries = SampleBoundaries(shape.lengths, rows, device)
    return lambda query, key, value: function(layer, query, key, value, None, boundaries=boundaries)[0]


def reference(tensors: Sequence[torch.Tensor], shape: Shape, rows: int) -> torch.Tensor:
    """Attention within samples, one sample at a time, in the dtype of the tensors: `(B, T, heads, W)`."""
    flat = [tensor.transpose(1, 2).flatten(0, 1).split(shape.lengths) for tensor in tensors]
    outputs = []
    for query, key, value in zip(*flat, strict=True):
        key, value = (t.repeat_interleave(shape.heads // shape.key_heads, dim=1) for t in (key, value))
        scores = torch.einsum("qhw,khw->hqk", query, key) * shape.width**-0.5
        is_seen = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).tril()
        weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khw->qhw", weights, value))
    return torch.cat(outputs).unflatten(0, (rows, -1))


def results_of(attend: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of queries, keys and values for an arbitrary gradient of it, in float64."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attend(*inputs)
    generator = torch.Generator(output.device).manual_seed(4)
    weights = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
    gradients = torch.autograd.grad(output, inputs, weights.to(output.dtype))
    return [tensor.detach().double() for tensor in (output, *gradients)]


def errors_of(kernel: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[float]:
    """A kernel's error in output and gradients, in errors of the same computation in its dtype without a kernel."""
    rows = len(shape.lengths) if len(set(shape.lengths)) == 1 else 1
    tensors = make_tensors(shape, rows, device, dtype)

    def plain(*inputs: torch.Tensor) -> torch.Tensor:
        return reference(inputs, shape, rows)

    exact = results_of(plain, [tensor.double() for tensor in tensors])
    rounded = results_of(plain, tensors)
    ours = results_of(caller(kernel, shape, rows, device), tensors)
    return [
        float((actual - wanted).norm() / max(float((near - wanted).norm()), 1e-12 * float(wanted.norm())))
        for actual, near, wanted in zip(ours, rounded, exact, strict=True)
    ]


def time_of(kernel: str, shape: Shape, rows: int, device: torch.device, dtype: torch.dtype, passes: int) -> float:
    """Seconds of a forward and backward pass, the median of some."""
    from measure import Meter

    tensors = [tensor.requires_grad_() for tensor in make_tensors(shape, rows, device, dtype)]
    attend, meter = caller(kernel, shape, rows, device), Meter(device)
    weights = torch.ones_like(tensors[0].transpose(1, 2))
    for _ in range(passes + 3):
        meter.start()
        torch.autograd.grad(attend(*tensors), tensors, weights)
        meter.stop()
    return statistics.median(meter.seconds[3:])


def check(kernels: Sequence[str], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Errors of each kernel at each shape, and whether they are small enough."""
    found: dict[str, Any] = {}
    for kernel in kernels:
        try:
            errors = [errors_of(kernel, shape, device, dtype) for shape in CHECKED]
        except Exception as error:  # whatever a kernel fails with, the others are still checked
            found[kernel] = {"failed": in_one_line(error), "passes": False}
            continue
        passes = max(max(row) for row in errors) <= ALLOWED
        found[kernel] = {"error_to_plain": [[round(e, 3) for e in row] for row in errors], "passes": passes}
    return found


def in_one_line(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".replace("|", "/")


def measure(
    kernels: Sequence[str], shapes: dict[str, Shape], device: torch.device, dtype: torch.dtype, passes: int
) -> list[dict[str, Any]]:
    """Milliseconds and useful TFLOP/s of each kernel, joined and padded."""
    lines = []
    for label, shape in shapes.items():
        for kernel in (*kernels, MASKED):
            for layout, timed, rows in (("joined", shape, 1), ("padded", shape.padded(), len(shape.lengths))):
                line = {"samples": label, "kernel": kernel, "rows": layout}
                try:
                    seconds = time_of(kernel, timed, rows, device, dtype, passes)
                except Exception as error:  # as in `check`
                    lines.append(line | {"failed": in_one_line(error)})
                    continue
                tflops = shape.model_flops() / seconds / 1e12
                lines.append(line | {"ms": round(1e3 * seconds, 3), "useful_tflops": round(tflops, 3)})
    return lines


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    place = result["where"]
    clock = "median time" if place["gpu"] else f"median CPU time of {torch.get_num_threads()} thread(s)"
    lines = [
        "# Attention kernels",
        "",
        f"{place['gpu'] or place['processor']}, torch {place['torch']}, {result['dtype']}, commit {place['commit']}.",
        f"Forward and backward pass of one layer's attention, {clock}; useful FLOPs are those of causal pairs within "
        "samples.",
        "",
    ]
    if result.get("times"):
        lines += ["| samples | kernel | rows | ms | useful TFLOP/s |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['samples']} | {row['kernel']} | {row['rows']} | "
            + (row.get("failed") or f"{row['ms']} | {row['useful_tflops']}")
            + " |"
            for row in result["times"]
        ]
        lines.append("")
    if result.get("check"):
        lines += ["| kernel | largest error, in errors of plain computation in this dtype | |", "| --- | --- | --- |"]
        for kernel, found in result["check"].items():
            worst = found.get("failed") or max(max(row) for row in found["error_to_plain"])
            lines.append(f"| {kernel} | {worst} | {'passes' if found['passes'] else 'DIFFERS'} |")
        lines.append("")
    lines += [f"- {kernel} was not run: {reason}." for kernel, reason in result["not_run"].items()]
    return "\n".join(lines) + "\n"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check and time what runs here."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = torch.bfloat16 if has_gpu else torch.float32
    machine = this_machine(has_gpu=has_gpu, is_half=has_gpu)
    reasons = {kernel: obstacle(kernel, machine) for kernel in BY_SAMPLE}
    kernels = [kernel for kernel, reason in reasons.items() if reason is None]
    shapes, passes = TIMED, 20
    if not has_gpu:
        shapes, passes = {"3 samples of 2,290 tokens": Shape((763, 850, 677), 8, 8, 64)}, 9
    if options.dry_run:
        shapes, passes = {"3 samples of 160 tokens": Shape((40, 90, 30), 4, 4, 32)}, 3
    do_all = not (options.check or options.time)
    return {
        "where": where(),
        "dtype": str(dtype).removeprefix("torch."),
        "not_run": {kernel: reason for kernel, reason in reasons.items() if reason is not None},
        "check": check(kernels, device, dtype) if options.check or do_all else {},
        "times": measure(kernels, shapes, device, dtype, passes) if options.time or do_all else [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with attention written out")
    parser.add_argument("--time", action="store_true", help="measure forward and backward passes")
    parser.add_argument("--dry-run", action="store_true", help="small shapes")
    parser.add_argument("--output", type=Path, help="folder for attention_gpu.json and .md, or attention_cpu")
    options = parser.parse_args()
    result = run(options)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        name = "attention_gpu" if result["where"]["gpu"] else "attention_cpu"
        (options.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.output / f"{name}.md").write_text(page(result))
    print(page(result))
    return 0 if all(found["passes"] for found in result["check"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
