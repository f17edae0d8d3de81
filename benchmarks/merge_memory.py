#!/usr/bin/env python3
"""Measures the host memory that a merge takes, as a share of its largest output shard.

    python benchmarks/merge_memory.py [--layers 6] [--rank 128] [--output benchmarks/results] [--folder /tmp]

A text-only LLaMA with the layers of the 13B one, but fewer of them, is written with random bfloat16 weights, as `.bin`
and as `.safetensors` files of 2 GB, with a LoRA adapter on all linear layers of its decoder. It is then merged in a
process of its own, which also compares every tensor that it wrote with the files it came from. The peak is that of the
process's resident memory (`VmHWM`), mapped pages of the files included, above what it had after the imports. The logits
are not compared: that loads the model, and takes the memory of a model.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import REPOSITORY, where
from random_model import TINY

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 5120, 13824, 40, 32000
SHAPES = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"} | {
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
SOURCE_SHARD = 2 * 10**9
CASES = [
    ("bin", "safetensors", "5GB"),
    ("safetensors", "safetensors", "5GB"),
    ("safetensors", "bin", "5GB"),
    ("bin", "safetensors", "1GB"),
    ("safetensors", "safetensors", "1GB"),
]
CHILD = """
import sys
from llava_ft.cli import main
import llava_ft.convert.merge

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

before = memory("VmRSS")
status = main(sys.argv[1:])
print(status, memory("VmHWM") - before)
"""


def write_base(directory: Path, layers: int, weights_format: str) -> None:
    """Write a language model of random weights, shard by shard."""
    import torch

    from llava_ft.checkpoint.save import ShardWriter

    directory.mkdir()
    fields = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    for file in TINY.glob("tokenizer*"):
        shutil.copyfile(file, directory / file.name)
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    layout = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    writer = ShardWriter(directory, layout, max_shard_bytes=SOURCE_SHARD, weights_format=weights_format)
    for name, shape in shapes.items():
        values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
        writer.add(name, values.mul_(0.02) if len(shape) > 1 else values.fill_(1.0))
    writer.finish()


def write_adapter(directory: Path, layers: int, rank: int) -> None:
    """Write an adapter as PEFT does, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            for matrix, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator).mul_(0.01)
                tensors[f"base_model.model.model.layers.{layer}.{name}.lora_{matrix}.weight"] = values
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(SHAPES)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def measure(base: Path, adapter: Path, weights_format: str, shard_size: str, target: Path) -> dict[str, object]:
    """Merge in a process of its own; sizes in bytes."""
    argv = ["merge", "--model-path", adapter, "--model-base", base, "--save-model-path", target, "--no-verify"]
    argv += ["--max-shard-size", shard_size, "--format", weights_format]
    started = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, argv)], capture_output=True, text=True, cwd=REPOSITORY
    )
    seconds = time.monotonic() - started
    if child.returncode or not child.stdout.startswith("0 "):
        raise SystemExit(child.stderr)
    peak = int(child.stdout.split()[1])
    shards = [file.stat().st_size for file in target.iterdir() if file.suffix in (".safetensors", ".bin")]
    size = (adapter / "adapter_model.safetensors").stat().st_size
    return {
        "model": sum(shards),
        "shards": len(shards),
        "largest_shard": max(shards),
        "adapter": size,
        "peak": peak,
        "ratio": round((peak - size) / max(shards), 3),
        "seconds": round(seconds),
    }


def table(results: list[dict[str, object]]) -> str:
    """Format the results as Markdown."""
    lines = [
        "| source | result | model, GB | shards | largest, GB | adapter, GB | peak, GB "
        "| (peak - adapter) / largest shard | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        sizes = [f"{int(str(row[key])) / 1e9:.2f}" for key in ("model", "largest_shard", "adapter", "peak")]
        lines.append(
            f"| {row['source']} | {row['result']}, {row['shard_size']} | {sizes[0]} | {row['shards']} | {sizes[1]} "
            f"| {sizes[2]} | {sizes[3]} | {row['ratio']} | {row['seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all cases and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help="where the models are written; about 10 GB are needed")
    options = parser.parse_args()
    head = where()
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        adapter = Path(folder, "adapter")
        write_adapter(adapter, options.layers, options.rank)
        for source in dict.fromkeys(case[0] for case in CASES):
            base = Path(folder, source)
            write_base(base, options.layers, source)
            for _, weights_format, shard_size in (case for case in CASES if case[0] == source):
                target = Path(folder, "merged")
                measured = measure(base, adapter, weights_format, shard_size, target)
                results.append({"source": source, "result": weights_format, "shard_size": shard_size, **measured})
                print(table(results[-1:]).splitlines()[-1], flush=True)
                shutil.rmtree(target)
            shutil.rmtree(base)
    print(table(results))
    if options.output:
        command = f"python benchmarks/merge_memory.py --layers {options.layers} --rank {options.rank}"
        content = {"command": command, **head, "results": results}
        (options.output / "merge_memory.json").write_text(json.dumps(content, indent=1) + "\n")
        text = (
            f"# Memory of a merge\n\n`{command}`; commit {head['commit']}, torch {head['torch']}, python "
            f"{head['python']}, processor {head['processor']}, {head['cores']} cores.\nLayers of the 13B LLaMA "
            f"({HIDDEN} wide, {INTERMEDIATE} in between), {options.layers} of its 40, random bfloat16 weights; LoRA of "
            f"rank {options.rank} on all linear layers. Peak: resident memory above that after the imports.\n\n"
        )
        (options.output / "merge_memory.md").write_text(text + table(results) + "\n")


if __name__ == "__main__":
    main()
