#!/usr/bin/env python3
"""Compares one decoder layer with LoRA in the program's own arithmetic, in PEFT's, and without adapters.

    python benchmarks/lora_layer.py [--preset cpu_small] [--bits 16 4] [--ranks 16 128] [--dtypes float32 bfloat16]
        [--device cpu] [--passes 15] [--output benchmarks/results] [--dry-run]

Forward and backward pass of a layer of the preset's language model on 763 positions, the ways taking turns; the median
of the passes. On a CPU times are CPU seconds of one thread. Frozen weights are the same tensors in all ways. With
--device the widths of a preset for GPUs can be measured on a CPU; with --dry-run they are the smallest model's.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from machine import where
from measure import Meter
from models import QUANTIZATION
from report import described, markdown_table
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from workload import PRESETS, Preset

from llava_ft.models.families.llama import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_ft.planning.tracker import MemoryTracker
from llava_ft.tuning.kernels.lora_layer import use_fast_layers
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.quant import quantize_linears, set_quantized_weight

POSITIONS = 763
KINDS = ("no adapters", "no adapters, own functions", "PEFT", "own functions")
HEAD = ("bits", "rank", "dtype", "adapters", "ms", "to no adapters", "FLOPs", "MB kept", "MB at most")


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        bits: Of frozen weights.
        rank: Of the adapters.
        dtype: Compute dtype.
    """

    bits: int
    rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """One way to compute a case.

    Attributes:
        bits: Of frozen weights.
        rank: Of the adapters.
        dtype: Compute dtype.
        adapters: Whose arithmetic.
        seconds: Median of a forward and a backward pass.
        flops: Those of matrix products, as a multiple of those without adapters.
        kept: Bytes that autograd keeps between the two passes, weights not counted.
        peak: Most bytes alive at once, weights not counted.
    """

    bits: int
    rank: int
    dtype: str
    adapters: str
    seconds: float
    flops: float
    kept: int
    peak: int


def build_base(preset: Preset, case: Case) -> LlavaLlamaForCausalLM:
    """A model of one layer without adapters, frozen."""
    torch.manual_seed(0)
    fields = preset.language | {"num_hidden_layers": 1, "vocab_size": 8}
    config = LlavaLlamaConfig(**fields, mm_vision_config=None, attn_implementation="sdpa")
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
    if case.bits == 4:
        quantize_linears(model, QUANTIZATION, lambda _: case.dtype)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            shape = (module.out_features, module.in_features)
            set_quantized_weight(module, 0.02 * torch.randn(shape, device=preset.device, dtype=case.dtype))
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = 0.02 * torch.randn(parameter.shape, device=preset.device, dtype=case.dtype)
                module._parameters[name] = nn.Parameter(values + 1.0 if parameter.dim() == 1 else values)
    with torch.device(preset.device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model.requires_grad_(False).train()


def build_layer(base: LlavaLlamaForCausalLM, case: Case, kind: str) -> nn.Module:
    """The layer as one of `KINDS`; its frozen weights are those of `base`."""
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    if not kind.startswith("no adapters"):
        add_lora(model, r=case.rank, alpha=2 * case.rank, dropout=0.0, fast=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    if kind.endswith("own functions"):
        use_fast_layers(model)
    return model.model.layers[0]


def bytes_of(layer: nn.Module, run: Callable[[], torch.Tensor], grad: torch.Tensor) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass, and most that are alive in both passes; neither with weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dtype != torch.uint8:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    with MemoryTracker() as tracker:
        tracker.ignore([*layer.parameters(), grad])
        run().backward(grad)
    return sum(sizes.values()), max(sum(peak.values()) for peak in tracker.peaks.values())


def flops(preset: Preset, rank: int) -> float:
    """FLOPs of matrix products with adapters of a rank (0 is none) for one position, weights frozen; causal attention.

    Frozen weights take part in two products, forward and for the input's gradient, adapters in three.
    """
    width, inner = preset.language["hidden_size"], preset.language["intermediate_size"]
    heads, kv_heads = preset.language["num_attention_heads"], preset.language["num_key_value_heads"]
    kv_width = width * kv_heads // heads
    sizes = [(width, width), (width, kv_width), (width, kv_width), (width, width)]
    sizes += [(width, inner), (width, inner), (inner, width)]
    products = sum(4 * inputs * outputs + 6 * rank * (inputs + outputs) for inputs, outputs in sizes)
    return products + 12 * width * (POSITIONS + 1) / 2


def measure(preset: Preset, case: Case, passes: int) -> list[Row]:
    """Compare the ways to compute a case."""
    device, base = torch.device(preset.device), build_base(preset, case)
    shape = (1, POSITIONS, preset.language["hidden_size"])
    angles = base.model.rotary_emb(
        torch.empty(shape, device=device, dtype=case.dtype), torch.arange(POSITIONS, device=device)[None]
    )
    grad = torch.randn(shape, device=device, dtype=case.dtype)
    meters: dict[str, Meter] = {}
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    memory: dict[str, tuple[int, int]] = {}
    for kind in KINDS:
        layer = build_layer(base, case, kind)
        hidden = torch.randn(shape, device=device, dtype=case.dtype, requires_grad=True)

        def run(layer=layer, hidden=hidden) -> torch.Tensor:
            with torch.autocast(device.type, case.dtype, enabled=case.dtype != torch.float32):
                return layer(hidden, position_embeddings=angles, attention_mask=None)

        memory[kind] = bytes_of(layer, run, grad)
        meters[kind], runs[kind] = Meter(device), run
    for _ in range(passes):
        for kind, run in runs.items():
            meters[kind].start()
            run().backward(grad)
            meters[kind].stop()
    about = (case.bits, case.rank, str(case.dtype).removeprefix("torch."))
    more = flops(preset, case.rank) / flops(preset, 0)
    return [
        Row(
            *about, kind, statistics.median(meters[kind].seconds), 1.0 if kind.startswith("no") else more, *memory[kind]
        )
        for kind in KINDS
    ]


def lines_of(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of the table for the rows of one case."""
    plain = rows[0].seconds
    return [
        [
            *(str(row.bits), str(row.rank), row.dtype, row.adapters),
            f"{1000 * row.seconds:.1f}",
            f"{row.seconds / plain - 1:+.0%}",
            f"{row.flops - 1:+.0%}",
            *(f"{size / 1e6:.1f}" for size in (row.kept, row.peak)),
        ]
        for row in rows
    ]


def chosen_preset(options: argparse.Namespace) -> Preset:
    """The preset as the options have it."""
    preset: Preset = PRESETS[options.preset]
    if options.dry_run:
        return preset.shrunk()
    return replace(preset, device=options.device or preset.device)


def main() -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu_small")
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 16), default=[16, 4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="another than the preset's")
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--output", type=Path, help="folder for lora_layer_PRESET.md and .json")
    parser.add_argument("--dry-run", action="store_true", help="the smallest model, on a CPU, two passes")
    options = parser.parse_args()
    preset = chosen_preset(options)
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"{preset.name} is for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    if preset.device == "cpu":
        torch.set_num_threads(1)
    about = where()
    rows: list[Row] = []
    lines: list[list[str]] = []
    for bits, rank, dtype in itertools.product(options.bits, options.ranks, options.dtypes):
        found = measure(preset, Case(bits, rank, getattr(torch, dtype)), 2 if options.dry_run else options.passes)
        rows += found
        lines += lines_of(found)
        print(*(" | ".join(line) for line in lines[-len(KINDS) :]), sep="\n", file=sys.stderr)
        if options.output:
            content = {"where": about, "rows": list(map(asdict, rows))}
            write(options, preset, page(preset, lines, about), content)
    print(page(preset, lines, about))
    return 0


def write(options: argparse.Namespace, preset: Preset, text: str, content: dict[str, object]) -> None:
    """Write the files of results, anew after each case, so that a run that is stopped has what it measured."""
    options.output.mkdir(parents=True, exist_ok=True)
    place = "" if preset.device == PRESETS[options.preset].device else f"_on_{preset.device}"
    file = options.output / f"lora_layer_{preset.name}{place}.md"
    file.write_text(text)
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def page(preset: Preset, lines: Sequence[Sequence[str]], about: dict[str, object]) -> str:
    """The page of results."""
    command = "python " + " ".join(["benchmarks/lora_layer.py", *sys.argv[1:]])
    return (
        f"# A decoder layer with LoRA: {preset.name}, on {preset.device}\n\n`{command}`; {described(about)}.\n\n"
        f"Forward and backward pass of one layer on {POSITIONS} positions; bfloat16 under autocast with float32 "
        "adapters; 4 bits are nf4, double-quantised. FLOPs are what adapters add to those of the layer's matrix "
        "products. MB kept are what autograd keeps between the two passes, MB at most what is alive at once in them, "
        "gradients of the adapters included, weights not.\n\n" + markdown_table(HEAD, lines) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
