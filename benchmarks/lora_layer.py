#!/usr/bin/env python3
"""Compares one decoder layer with LoRA in the program's own arithmetic, in PEFT's, and without adapters.

    python benchmarks/lora_layer.py [--preset cpu_small] [--output benchmarks/results]

Forward and backward pass of a layer of the preset's language model on 763 positions, the three taking turns; the
median of the passes. On a CPU times are CPU seconds of one thread.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from machine import where
from measure import Meter
from workload import PRESETS, Preset

from llava_ft.tuning.lora import add_lora

POSITIONS, PASSES = 763, 15
KINDS = {"no adapters": None, "PEFT": False, "own arithmetic": True}


def build_layer(preset: Preset, rank: int, fast: bool | None, dtype: torch.dtype) -> tuple[torch.nn.Module, tuple]:
    """A layer, and the angles that rotate its queries and keys."""
    from llava_ft.models.config import LlavaLlamaConfig
    from llava_ft.models.llava import LlavaLlamaForCausalLM

    torch.manual_seed(0)
    fields = preset.language | {"num_hidden_layers": 1, "vocab_size": 8}
    model = LlavaLlamaForCausalLM(LlavaLlamaConfig(**fields, mm_vision_config=None, attn_implementation="sdpa"))
    model.requires_grad_(False).to(preset.device, dtype)
    if fast is not None:
        add_lora(model, r=rank, alpha=2 * rank, dropout=0.0, fast=fast)
    hidden = torch.empty(1, POSITIONS, preset.language["hidden_size"], device=preset.device, dtype=dtype)
    angles = model.model.rotary_emb(hidden, torch.arange(POSITIONS, device=preset.device)[None])
    return model.model.layers[0].train(), angles


def kept_bytes(layer: torch.nn.Module, run) -> int:
    """Bytes that autograd keeps of a forward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def measure(preset: Preset, rank: int, dtype: torch.dtype) -> list[str]:
    """Lines of the table for a rank and a dtype."""
    device, meters, runs, kept = torch.device(preset.device), {}, {}, {}
    for kind, fast in KINDS.items():
        layer, angles = build_layer(preset, rank, fast, dtype)
        hidden = torch.randn(
            1, POSITIONS, preset.language["hidden_size"], device=device, dtype=dtype, requires_grad=True
        )

        def run(layer=layer, angles=angles, hidden=hidden) -> torch.Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return layer(hidden, position_embeddings=angles, attention_mask=None)

        kept[kind] = kept_bytes(layer, run)
        meters[kind], runs[kind] = Meter(device), run
    grad = torch.randn(1, POSITIONS, preset.language["hidden_size"], device=device, dtype=dtype)
    for _ in range(PASSES):
        for kind, run in runs.items():
            meters[kind].start()
            run().backward(grad)
            meters[kind].stop()
    lines, plain = [], statistics.median(meters["no adapters"].seconds)
    for kind, meter in meters.items():
        seconds = statistics.median(meter.seconds)
        name = str(dtype).removeprefix("torch.")
        lines.append(
            f"| {rank} | {name} | {kind} | {1000 * seconds:.1f} | {seconds / plain - 1:+.0%} | {kept[kind] / 1e6:.1f} |"
        )
    return lines


def main() -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu_small")
    parser.add_argument("--output", type=Path, help="folder for lora_layer_PRESET.md")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"{preset.name} is for a GPU, and torch sees none here: not measured.", file=sys.stderr)
        return 2
    if preset.device == "cpu":
        torch.set_num_threads(1)
    about = ", ".join(f"{key} {value}" for key, value in where().items() if value is not None)
    lines = ["| rank | dtype | adapters | ms | to no adapters | MB kept |", "| --- " * 6 + "|"]
    for rank in (16, 128):
        for dtype in (torch.float32, torch.bfloat16):
            lines += measure(preset, rank, dtype)
            print(*lines[-3:], sep="\n", file=sys.stderr)
    text = (
        f"# A decoder layer with LoRA: {preset.name}\n\n`python benchmarks/lora_layer.py --preset {preset.name}`; "
        f"{about}.\n\nForward and backward pass of one layer on {POSITIONS} positions; bfloat16 under autocast with "
        f"float32 adapters. MB kept are what autograd keeps between the two, weights not counted.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"lora_layer_{preset.name}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
