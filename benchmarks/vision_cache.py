#!/usr/bin/env python3
"""Measures what `--vision_cache` saves, and what 8 bits cost.

    python benchmarks/vision_cache.py [NAME ...] [--output benchmarks/results]

For each tower a LLaVA of random weights is made on the fly and trained with LoRA on photographs of noise, without a
cache, with one, and with one in 8 bits, each in a process of its own. Times are seconds of CPU time of one thread, so
that other work on the machine does not count, the median of the steps after the second; pictures are decoded in the
same thread. The losses with and without the cache are compared bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import where
from random_model import WORDS, write_model

REPOSITORY = Path(__file__).resolve().parents[1]

TOWERS = {
    "ViT-B/32, 224": {"hidden": 768, "layers": 12, "heads": 12, "side": 224, "patch": 32},
    "ViT-B/16, 224": {"hidden": 768, "layers": 12, "heads": 12, "side": 224, "patch": 16},
    "ViT-L/14, 336, 6 of its 24 layers": {"hidden": 1024, "layers": 7, "heads": 16, "side": 336, "patch": 14},
}
"""The last layer is not run: features are those of the last but one."""

LANGUAGE_MODEL = {"hidden": 512, "intermediate": 1376, "layers": 8, "heads": 8, "vocabulary": 32000}
NUM_IMAGES, IMAGE_WH = 16, (640, 480)
BATCH, STEPS = 2, 8
FLAGS = {
    "version": "v1",
    "image_aspect_ratio": "pad",
    "model_max_length": 1024,
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-4,
    "lora_enable": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "seed": 1,
    "use_cpu": True,
    "bf16": True,
}
KINDS = {
    "without": {},
    "cache": {"vision_cache_dtype": "compute"},
    "cache, 8 bits": {"vision_cache_dtype": "int8"},
}


def make_model(directory: Path, tower: dict) -> None:
    """Write a LLaVA checkpoint with random weights, its tower inside."""
    language = {
        "hidden_size": LANGUAGE_MODEL["hidden"],
        "intermediate_size": LANGUAGE_MODEL["intermediate"],
        "num_hidden_layers": LANGUAGE_MODEL["layers"],
        "num_attention_heads": LANGUAGE_MODEL["heads"],
        "num_key_value_heads": LANGUAGE_MODEL["heads"],
        "vocab_size": LANGUAGE_MODEL["vocabulary"],
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    vision = {
        "hidden_size": tower["hidden"],
        "intermediate_size": 4 * tower["hidden"],
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower["heads"],
        "image_size": tower["side"],
        "patch_size": tower["patch"],
    }
    write_model(directory, language, vision)


def make_data(directory: Path) -> None:
    """Write smooth noise as photographs, and a question about each."""
    from PIL import Image

    directory.mkdir(parents=True)
    rng = random.Random(1)
    records = []
    for number in range(NUM_IMAGES):
        noise = Image.frombytes("RGB", (40, 30), rng.randbytes(40 * 30 * 3))
        noise.resize(IMAGE_WH, Image.Resampling.BICUBIC).save(directory / f"{number}.jpg", quality=90)
        question, answer = (" ".join(rng.choices(WORDS, k=20)) for _ in range(2))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (directory / "data.json").write_text(json.dumps(records))


def child(argv: list[str]) -> None:
    """Train in this process and print what it took."""
    from transformers import TrainerCallback

    from llava_ft.args import parse_args
    from llava_ft.training import vision_cache
    from llava_ft.training.run import prepare_run

    encoded, fill = [0.0], vision_cache.Encoder.__call__

    def timed_fill(self, pixels):
        start = time.process_time()
        features = fill(self, pixels)
        encoded[0] += time.process_time() - start
        return features

    vision_cache.Encoder.__call__ = timed_fill

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.process_time())

    clock = Clock()
    run = prepare_run(parse_args(argv))
    run.trainer.add_callback(clock)
    run.trainer.train()
    dataset = run.datasets.train
    start = time.process_time()
    for position in range(len(dataset)):
        dataset[position]
    reading = (time.process_time() - start) / len(dataset)
    steps = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)][1:]
    result = {
        "step": statistics.median(steps),
        "item": reading,
        "encoding": encoded[0] / NUM_IMAGES,
        "parameters": sum(parameter.numel() for parameter in run.trainer.model.parameters()),
        "losses": [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry],
    }
    print(json.dumps(result))


def measure(tower: str, kind: str, folder: Path) -> dict:
    """Run one case in a process of its own."""
    values = FLAGS | KINDS[kind]
    values |= {
        "model_name_or_path": folder / tower.replace("/", "-"),
        "data_path": folder / "data" / "data.json",
        "image_folder": folder / "data",
        "data_cache_dir": folder / "prepared",
        "output_dir": folder / "output",
    }
    cache = folder / "cache"
    if KINDS[kind]:
        values["vision_cache"] = cache
    argv = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{") and '"step"' in line]
    if done.returncode or not lines:
        raise SystemExit((done.stderr or done.stdout)[-3000:])
    row = json.loads(lines[-1]) | {"tower": tower, "kind": kind}
    row["disk"] = sum(path.stat().st_size for path in cache.glob("features-*/*.safetensors"))
    shutil.rmtree(cache, ignore_errors=True)
    return row


def feature_error(tower: str, folder: Path) -> dict:
    """What 8 bits change in the features of the pictures, in float32."""
    import torch

    from llava_ft.checkpoint.model import find_model, load_tower
    from llava_ft.data.features.store import FeatureFormat
    from llava_ft.data.image_files import load_image
    from llava_ft.data.images import ImageTransform

    base = find_model(str(folder / tower.replace("/", "-")))
    encoder = load_tower(base, dtype=torch.float32, device="cpu")
    transform = ImageTransform.from_pretrained(base.vision_directory, geometry=base.config.image_geometry)
    pictures = [transform.pixels(load_image(path)) for path in sorted((folder / "data").glob("*.jpg"))[:4]]
    with torch.no_grad():
        features = encoder(transform.normalizer(torch.cat(pictures)))
    tile = FeatureFormat(features.shape[1], features.shape[2], torch.float32, is_8bit=True)
    kept = tile.decode(tile.encode(features))
    rounded = features.to(torch.bfloat16).float()
    size = features.pow(2).mean().sqrt()
    return {
        "int8": ((kept - features).pow(2).mean().sqrt() / size).item(),
        "bfloat16": ((rounded - features).pow(2).mean().sqrt() / size).item(),
    }


def table(rows: list[dict], errors: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| tower | run | step, s | of the run without | an item, ms | encoding an image, s | disk per image, kB | "
        "parameters in memory, millions | losses |",
        "| --- " * 9 + "|",
    ]
    plain: dict = {}
    for row in rows:
        if row["kind"] == "without":
            plain = row
        largest = max(abs(a - b) for a, b in zip(row["losses"], plain["losses"], strict=True))
        losses = "" if row is plain else "equal bit for bit" if largest == 0 else f"differ by up to {largest:.1e}"
        encoding = f"{row['encoding']:.3f}" if row["encoding"] else ""
        disk = f"{row['disk'] / NUM_IMAGES / 1000:,.0f}" if row["disk"] else ""
        lines.append(
            f"| {row['tower']} | {row['kind']} | {row['step']:.3f} | {row['step'] / plain['step']:.2f} | "
            f"{1000 * row['item']:.1f} | {encoding} | {disk} | "
            f"{row['parameters'] / 1e6:.1f} | {losses} |"
        )
    lines += ["", "| tower | 8 bits, relative error | bfloat16, relative error |", "| --- | --- | --- |"]
    for tower, error in errors.items():
        lines.append(f"| {tower} | {error['int8']:.4f} | {error['bfloat16']:.4f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure the towers that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="towers; all when absent")
    parser.add_argument("--output", type=Path, help="folder for vision_cache.json and vision_cache.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    if options.child:
        child(json.loads(options.child))
        return 0

    rows, errors = [], {}
    about = where()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder / "data")
        for tower in options.names or TOWERS:
            make_model(folder / tower.replace("/", "-"), TOWERS[tower])
            for kind in KINDS:
                rows.append(measure(tower, kind, folder))
                print(f"{tower}, {kind}: {rows[-1]['step']:.3f} s a step", file=sys.stderr)
            errors[tower] = feature_error(tower, folder)
            shutil.rmtree(folder / tower.replace("/", "-"))
    print(table(rows, errors))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        content = {"where": about, "rows": rows, "feature_errors": errors}
        (options.output / "vision_cache.json").write_text(json.dumps(content, indent=1) + "\n")
        described = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
        what = (
            f"LoRA r=16 in bfloat16 on a language model of {LANGUAGE_MODEL['layers']} layers, "
            f"{LANGUAGE_MODEL['hidden']} wide; {BATCH} samples a step with a JPEG of {IMAGE_WH[0]} x {IMAGE_WH[1]} "
            "pixels each; random weights. Times are CPU seconds of one thread."
        )
        text = f"# With and without a vision cache\n\n`python benchmarks/vision_cache.py`; {described}.\n{what}\n\n"
        (options.output / "vision_cache.md").write_text(text + table(rows, errors) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
