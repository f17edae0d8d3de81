#!/usr/bin/env python3
"""Computes how long a step takes on 8 to 1,024 GPUs, for the tables of docs/internals/scaling.md. None is measured.

    python benchmarks/scaling.py [--write] [--gpu H200] [--network GB/s] [--share 0.4]

prints the tables; `--write` puts those of H200s into the page. A step is its computation at an achievable share of the
GPU's peak, the wait for the rank with the most work, the communication that computation does not hide, and the
optimizer's step at the memory's bandwidth; docs/internals/scaling.md states the model and where its figures are from.
"""

import argparse
import functools
import itertools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from report import markdown_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava_ft.args import parse_args
from llava_ft.data.sampler import SORTED_BATCHES, balanced_order
from llava_ft.models.flops import Counts, Flops, model_flops, tower_layers_read
from llava_ft.planning.model import ParameterShape, build_model, parameter_shapes
from llava_ft.planning.placement import optimizer_kind
from llava_ft.planning.request import Machine, PlanRequest, plan_request
from llava_ft.resolve import RunModel, resolve_model

PAGE: Final = Path(__file__).resolve().parents[1] / "docs/internals/scaling.md"
SIZES: Final = (8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_PER_NODE: Final = 8
RECORDS: Final = 665_298
"""Records of llava_v1_5_mix665k."""

BASES: Final = {"7B": "lmsys/vicuna-7b-v1.5", "13B": "lmsys/vicuna-13b-v1.5"}
RUNS: Final = {
    "LoRA, ZeRO-2": ("lora.yaml", "zero2.json"),
    "LoRA, ZeRO-3": ("lora.yaml", "zero3.json"),
    "full, ZeRO-2": ("finetune.yaml", "zero2.json"),
    "full, ZeRO-3": ("finetune.yaml", "zero3.json"),
}
DRAWN_STEPS, DRAWN_SAMPLES = 24, 8192
LINK_EFFICIENCY = MEMORY_EFFICIENCY = HIDDEN_SHARE = 0.8
"""Assumed: shares of a link's and the memory's nominal rates, and of computation beside which communication runs."""

_MICRO: Final = 1e-6
_RING_START, _RING_LINK, _RING_NETWORK = 8.4 * _MICRO, 3.4 * _MICRO, 9.6 * _MICRO
_TREE_START, _TREE_LINK, _TREE_NETWORK = 4.4 * _MICRO, 1.2 * _MICRO, 8.5 * _MICRO
_TREE_RATE: Final = 0.9 * 0.92
"""Of a ring's: NCCL's factor for trees, and the flags among the data of its protocol LL128."""

_TOWER_LAYER: Final = re.compile(r"layers\.(\d+)\.")


class Gpu(NamedTuple):
    """A kind of GPU: dense bfloat16 FLOP/s, and bytes a second of its memory, of its link to the other GPUs of its
    machine and of its share of the machine's network, each way."""

    flops: float
    memory: float
    link: float
    network: float


GPUS: Final = {
    "H200": Gpu(989e12, 4.8e12, 450e9, 50e9),
    "H100": Gpu(989e12, 3.35e12, 450e9, 50e9),
    "A100-80GB": Gpu(312e12, 2.039e12, 300e9, 25e9),
    "RTX-4090": Gpu(165.2e12, 1.008e12, 32e9, 1.5625e9),
}


class Samples(NamedTuple):
    """Positions, supervised positions and tiles of each sample of a run."""

    lengths: Any
    supervised: Any
    tiles: Any

    def chosen(self, indices: Any) -> "Samples":
        """Those at these indices, in that order and shape."""
        return Samples(*(values[indices] for values in self))


class Balance(NamedTuple):
    """Counts of an average micro-batch without and with padding, and the slowest rank's work over the mean."""

    useful: Counts
    computed: Counts
    waiting: float


class Collective(NamedTuple):
    """What travels in a step, how, its bytes cut into calls, beside which pass, and whether that can hide it."""

    kind: str
    num_bytes: int
    calls: int
    phase: str
    is_hidden: bool


@dataclass(frozen=True)
class Fabric:
    """How the ranks of a run are connected; rates are bytes a second each way."""

    gpus_per_node: int
    num_nodes: int
    link: float
    network: float

    @property
    def bus_rate(self) -> float:
        """Bytes a second that every rank can send in a ring.

        As many rings as a machine has network adapters run side by side, so what leaves a machine has the sum of them.
        """
        outward = self.network * self.gpus_per_node if self.num_nodes > 1 else math.inf
        return LINK_EFFICIENCY * (outward if self.gpus_per_node == 1 else min(self.link, outward))

    def sent_bytes(self, kind: str, num_bytes: float) -> float:
        """Bytes that each rank sends in a ring: (N-1)/N of the whole buffer, twice that for an all-reduce."""
        ranks = self.gpus_per_node * self.num_nodes
        return (2 if kind == "all-reduce" else 1) * num_bytes * (ranks - 1) / ranks

    def seconds(self, kind: str, num_bytes: float, calls: int) -> float:
        """Time of a collective, cut into equal calls. An all-reduce takes the faster of ring and tree."""
        if self.gpus_per_node * self.num_nodes == 1 or num_bytes == 0:
            return 0.0
        rounds = 2 if kind == "all-reduce" else 1
        inside, between = self.num_nodes * (self.gpus_per_node - 1), self.num_nodes - 1
        transfer = self.sent_bytes(kind, num_bytes) / self.bus_rate
        ring = calls * (_RING_START + rounds * (inside * _RING_LINK + between * _RING_NETWORK)) + transfer
        if kind != "all-reduce":
            return ring
        hops = (self.gpus_per_node - 1) * _TREE_LINK + math.ceil(math.log2(self.num_nodes)) * _TREE_NETWORK
        return min(ring, calls * (_TREE_START + 2 * hops) + transfer / _TREE_RATE)


def collectives(outline: RunModel, shapes: Sequence[ParameterShape], request: PlanRequest) -> list[Collective]:
    """List what a step of one micro-batch sends under ZeRO 1 to 3, in buffers of whole size.

    ZeRO's paper (arXiv:1910.02054, section 7) has gradients reduced to the rank that needs them in stages 1 and 2;
    DeepSpeed all-reduces them in its default setting (`use_multi_rank_bucket_allreduce`), which is what is counted.
    Under ZeRO-3 frozen weights travel too; those that the backward pass does not need (a frozen tower, frozen
    embeddings) only once, and so do the last layers' as far as `stage3_max_reuse_distance` keeps them whole: between
    the two uses of a weight lie, there and back, twice the weights behind it.
    """
    zero, width = request.zero, request.compute_dtype.itemsize
    assert zero is not None
    assert zero.stage > 0
    trained = sum(shape.numel for shape in shapes if shape.is_trained)
    calls = max(1, math.ceil(trained / zero.reduce_bucket_size))
    if zero.stage < 3:
        is_beside = zero.stage == 2
        phase, is_hidden = "backward" if is_beside else "step", is_beside and zero.overlap_comm
        gradients = Collective("all-reduce", trained * width, calls, phase, is_hidden)
        return [gradients, Collective("all-gather", trained * width, 1, "step", False)]

    def is_used(shape: ParameterShape) -> bool:
        layer = _TOWER_LAYER.search(shape.name)
        if shape.part != "vision tower":
            return True
        return request.tower == "runs" and (layer is None or int(layer.group(1)) < tower_layers_read(outline.config))

    def gather(values: int, phase: str) -> Collective:
        calls = max(1, math.ceil(values / max(1, zero.prefetch_bucket_size)))
        return Collective("all-gather", values * width, calls, phase, True)

    divided = [shape for shape in shapes if shape.numel > zero.param_persistence_threshold]
    frozen_once = ("vision tower", "embeddings")
    backward = sum(shape.numel for shape in divided if shape.is_trained or shape.part not in frozen_once)
    return [
        gather(sum(shape.numel for shape in divided if is_used(shape)), "forward"),
        gather(backward - min(backward, zero.max_reuse_distance // 2), "backward"),
        Collective("reduce-scatter", trained * width, calls, "backward", zero.overlap_comm),
    ]


def draw_balance(samples: Samples, order: str, rows: str, batch_size: int, ranks: int, flops: Flops) -> Balance:
    """Draw steps as the run's sampler does, and compare the ranks, which wait for each other in each micro-batch.

    Args:
        samples: The run's samples, in any order.
        order: The sampler's strategy: `random`, `length` or `modality_length`.
        rows: `padded`, or `joined` without padding.
        batch_size: Samples of a rank's micro-batch.
        ranks: Number of ranks.
        flops: Work of a micro-batch.
    """
    kinds = [samples]
    if order == "modality_length":
        has_images = samples.tiles > 0
        kinds = [samples.chosen(np.flatnonzero(mask)) for mask in (has_images, ~has_images) if mask.any()]
    useful, computed = np.zeros(4), np.zeros(4)
    mean = slowest = 0.0
    for kind in kinds:
        share = len(kind.lengths) / len(samples.lengths)
        steps = kind.chosen(_draw_steps(kind.lengths, order, batch_size, ranks))  # (step, rank, sample)
        padded = _counts(steps, is_padded=rows == "padded")
        work = np.asarray(flops.of(padded))
        mean += share * float(work.mean())
        slowest += share * float(work.max(axis=1).mean())
        useful += share * _means(_counts(steps, is_padded=False))
        computed += share * _means(padded)
    return Balance(Counts(*useful.tolist()), Counts(*computed.tolist()), slowest / mean)


def _draw_steps(lengths: Any, order: str, batch_size: int, ranks: int) -> Any:
    """Draw whole steps: indices by step, rank and sample. Few samples are taken again and again."""
    size, seed = ranks * batch_size, 0
    num_steps = max(1, min(DRAWN_STEPS, DRAWN_SAMPLES // size))
    if order == "length":  # one of the groups that the sampler sorts
        num_steps = max(1, min(len(lengths) // (4 * size), SORTED_BATCHES))
    random = np.random.default_rng(seed)
    rounds = -(-num_steps * size // len(lengths))
    pool = np.concatenate([random.permutation(len(lengths)) for _ in range(rounds)])[: num_steps * size]
    if order == "length":
        pool = pool[np.argsort(-lengths[pool], kind="stable")]
    elif order == "modality_length":
        generator = torch.Generator().manual_seed(seed)
        pool = pool[balanced_order(lengths[pool].tolist(), batch_size, ranks, generator)]
    return pool.reshape(num_steps, ranks, batch_size)


def _counts(steps: Samples, *, is_padded: bool) -> Counts:
    lengths = steps.lengths
    if is_padded:
        lengths = np.broadcast_to(lengths.max(axis=-1, keepdims=True), lengths.shape)
    pairs = (lengths * (lengths + 1) / 2).sum(axis=-1)
    return Counts(lengths.sum(axis=-1), steps.supervised.sum(axis=-1), pairs, steps.tiles.sum(axis=-1))


def _means(counts: Counts) -> Any:
    return np.array([np.mean(values) for values in (counts.positions, counts.supervised, counts.pairs, counts.tiles)])


@dataclass(frozen=True)
class StepTime:
    """The computed time of a step, in seconds by what it goes to, with what it was worked out from."""

    computation: float
    waiting: float
    communication: float
    optimizer: float
    hidden: float
    sent_bytes: float
    samples: int
    model_flops: float
    slowest: float
    peak_flops: float

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return self.computation + self.waiting + self.communication + self.optimizer

    @property
    def rate(self) -> float:
        """Samples a second of all GPUs."""
        return self.samples / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs a second over the peak of all GPUs."""
        return self.model_flops / self.seconds / self.peak_flops


@functools.cache
def mixture() -> Samples:
    """Samples like those of LLaVA's mixture in outline: 6% text alone, log-normal text of 223 tokens on average."""
    random = np.random.default_rng(0)
    text = random.lognormal(np.log(223) - 0.32, 0.8, RECORDS).clip(60, 1471).astype(np.int64)
    tiles = (random.random(RECORDS) >= 0.06).astype(np.int64)
    return Samples(text + 576 * tiles, ((text - 35) // 2).clip(1), tiles)


@functools.cache
def run(size: str, name: str) -> tuple[RunModel, list[ParameterShape], PlanRequest]:
    """The model and the request of one of `RUNS`."""
    file, zero = RUNS[name]
    flags = {"config": file, "deepspeed": zero, "model_name_or_path": BASES[size], "gradient_checkpointing": "False"}
    args = parse_args([text for key, value in flags.items() for text in (f"--{key}", value)])
    outline = resolve_model(args, need="config")
    request = plan_request(outline, Machine())
    return outline, parameter_shapes(build_model(outline, request), request), request


@functools.cache
def step_time(gpu: Gpu, share: float, size: str, name: str, gpus: int, batch: int, order: str, rows: str) -> StepTime:
    """Compute the time of a step of one micro-batch, matrix products running at a share of the peak."""
    outline, shapes, request = run(size, name)
    assert request.zero is not None
    forward, backward = model_flops(outline.config, shapes)
    balance = draw_balance(mixture(), order, rows, batch, gpus, forward + backward)
    rate = gpu.flops * share
    passes = {
        phase: float(f.of(balance.computed)) / rate for phase, f in (("forward", forward), ("backward", backward))
    }
    products = sum(passes.values())
    fabric = Fabric(GPUS_PER_NODE, gpus // GPUS_PER_NODE, gpu.link, gpu.network)
    sent = collectives(outline, shapes, request)
    total = hidden = 0.0
    for phase in ("forward", "backward", "step"):
        seconds = [(c.is_hidden, fabric.seconds(c.kind, c.num_bytes, c.calls)) for c in sent if c.phase == phase]
        total += sum(taken for _, taken in seconds)
        can_hide = sum(taken for is_hidden, taken in seconds if is_hidden)
        hidden += min(can_hide, HIDDEN_SHARE * passes.get(phase, 0.0))
    # Gradients are read twice, once for their norm; weights and moments read and written; a 16-bit copy written.
    kind = optimizer_kind(request.optimizer)
    moved = 2 * 4 + 2 * 4 + 2 * kind.moments * kind.bits / 8 + request.compute_dtype.itemsize
    trained = sum(shape.numel for shape in shapes if shape.is_trained)
    return StepTime(
        computation=products,
        waiting=products * (balance.waiting - 1),
        communication=total - hidden,
        optimizer=trained / gpus * moved / (gpu.memory * MEMORY_EFFICIENCY),
        hidden=hidden,
        sent_bytes=sum(fabric.sent_bytes(c.kind, c.num_bytes) for c in sent),
        samples=gpus * batch,
        model_flops=gpus * float((forward + backward).of(balance.useful)),
        slowest=balance.waiting,
        peak_flops=gpu.flops * gpus,
    )


@dataclass(frozen=True)
class Tables:
    """The tables for one kind of GPU whose matrix products run at a share of its peak."""

    gpu: Gpu
    share: float

    def step(
        self, size: str, name: str, gpus: int, batch: int, order: str = "modality_length", rows: str = "joined"
    ) -> StepTime:
        """Compute the time of a step; see `step_time`."""
        return step_time(self.gpu, self.share, size, name, gpus, batch, order, rows)

    def tables(self) -> Iterator[tuple[str, str]]:
        """The tables by the name in the mark that stands above each of them on the page."""
        yield "flops", self.flops()
        yield "order", self.order()
        for size in BASES:
            yield f"fixed, {size}", self.scaling(size, {gpus: 128 // gpus for gpus in SIZES if gpus <= 128})
        for size in BASES:
            yield f"weak, {size}", self.scaling(size, dict.fromkeys(SIZES, 16))
        yield "parts", self.parts()

    def scaling(self, size: str, batches: dict[int, int]) -> str:
        """Samples a second, efficiency against 8 GPUs with 16 samples each, and GPU-hours of an epoch, for each run."""
        lines = []
        for gpus, batch in batches.items():
            cells = [f"{gpus:,}", f"{gpus * batch:,}"]
            for name in RUNS:
                time, reference = self.step(size, name, gpus, batch), self.step(size, name, 8, 16)
                share = time.rate / gpus / (reference.rate / 8)
                cells.append(f"{time.rate:,.0f}, {share:.0%}, {RECORDS / time.rate / 3600 * gpus:.0f} h")
            lines.append(cells)
        return markdown_table(["GPUs", "samples a step", *RUNS], lines)

    def parts(self) -> str:
        """Where the time of a step goes, 7B."""
        names = ("computation", "waiting for the slowest rank", "communication not hidden", "optimizer step", "hidden")
        lines = []
        for (gpus, batch), name in itertools.product(((8, 16), (64, 2), (128, 1), (128, 16), (1024, 16)), RUNS):
            time = self.step("7B", name, gpus, batch)
            parts = (time.seconds, time.computation, time.waiting, time.communication, time.optimizer, time.hidden)
            cells = [f"{gpus:,} x {batch}", name, *(f"{1000 * seconds:,.0f}" for seconds in parts)]
            lines.append([*cells, f"{time.sent_bytes / 1e9:.1f}"])
        heading = ["GPUs x samples of each", "run", "step, ms", *(f"{name}, ms" for name in names), "sent, GB"]
        return markdown_table(heading, lines)

    def order(self) -> str:
        """What rows, order and the batch of a GPU cost: 7B, LoRA, ZeRO-2, 128 GPUs."""
        orders, lines = ("random", "length", "modality_length"), []
        for batch, rows, order in itertools.product((1, 4, 16), ("padded", "joined"), orders):
            time = self.step("7B", "LoRA, ZeRO-2", 128, batch, order, rows)
            lines.append([str(batch), rows, order, f"{time.slowest:.2f}", f"{time.rate:,.0f}", f"{time.mfu:.0%}"])
        names = [
            "samples of a GPU",
            "rows",
            "order",
            "slowest GPU over the mean",
            "samples/s",
            "model FLOPs of the peak",
        ]
        return markdown_table(names, lines)

    def flops(self) -> str:
        """FLOPs of an average sample."""
        lines = []
        for size, name in itertools.product(BASES, ("LoRA, ZeRO-2", "full, ZeRO-2")):
            time, shapes = self.step(size, name, 8, 16), run(size, name)[1]
            values = sum(shape.numel for shape in shapes if shape.is_trained)
            tflop = f"{time.model_flops / time.samples / 1e12:.1f}"
            lines.append([f"{size}, {name.split(',')[0]}", f"{values:,}", tflop, f"{time.computation:.2f}"])
        return markdown_table(["", "trained values", "model TFLOP per sample", "computation of 16, s"], lines)


def put_into(page: str, name: str, table: str) -> str:
    """Replace the table under its mark."""
    mark = f"<!-- computed by benchmarks/scaling.py: {name} -->\n"
    before, after = page.split(mark)
    lines = after.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before + mark + table + "\n" + "".join(lines[first:])


def main(argv: list[str] | None = None) -> int:
    """Compute all tables; print them, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables of H200s into docs/internals/scaling.md")
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--network", type=float, help="GB/s of each GPU's share of the network, each way")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak at which matrix products run")
    options = parser.parse_args(argv)
    gpu = GPUS[options.gpu]
    if options.network is not None:
        gpu = gpu._replace(network=options.network * 1e9)
    tables = Tables(gpu, options.share).tables()
    if not options.write:
        for name, table in tables:
            print(f"{name}\n\n{table}\n", flush=True)
        return 0
    if Tables(gpu, options.share) != Tables(GPUS["H200"], 0.4):
        parser.error("--write is for the page's own GPU, network and share")
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables:
        page = put_into(page, name, table)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
