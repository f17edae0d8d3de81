#!/usr/bin/env python3
"""Measures the data path alone: from records and JPEG files to the batches that a training step is handed.

    python benchmarks/data_path.py [--quick] [--output benchmarks/results]

Pictures are drawn on the fly in two sizes, records are written for them, and a run is prepared as `train.py` does, with
a LLaVA whose language model is tiny and whose tower takes 336 x 336 pixels (576 tokens an image). Then the trainer's
own data loader is read to its end: decoding, resizing, tokens, collating, and handing over from the workers.

- Samples per second and core: samples divided by the processor time of this process and its workers together, which
  depends little on what else the machine does. The first row of each picture size is the baseline of the ratios: full
  decoding, no workers, pictures handed over as float32.
- Waiting: the loader is read by a loop that sleeps for a given time after each batch, as a processor waits for a GPU,
  and the time until the next batch is there is added up.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machine import where

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = {"640x480": (640, 480), "1920x1080": (1920, 1080)}
NUM_FILES = 32
BATCH = 8
STEP_SECONDS = 0.15
"""Time that a simulated step of 8 samples takes."""


def draw(size_wh: tuple[int, int], seed: int):
    """Draw a picture with the spectrum of a photograph: soft shapes, edges and a little noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    total = np.zeros((size_wh[1], size_wh[0], 3), dtype=np.float32)
    for cells, weight in ((4, 70), (16, 40), (64, 20), (160, 10)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight / 128 * (np.asarray(grid.resize(size_wh, Image.Resampling.BICUBIC), dtype=np.float32) - 128)
    total += rng.normal(0, 9, (*total.shape[:2], 1))
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def make_inputs(folder: Path, num_records: int) -> dict[str, float]:
    """Write the model, the pictures and a file of records for each size; return the mean KiB of a picture."""
    import random

    from plan_memory import make_model

    make_model(folder / "model", "tiny", image_size=336)
    rng = random.Random(1)
    words = ["red", "blue", "green", "circle", "square", "star", "letter", "three", "left", "of", "the", "a", "which"]
    kib = {}
    for name, size_wh in SIZES.items():
        (folder / name).mkdir()
        for number in range(NUM_FILES):
            draw(size_wh, number).save(folder / name / f"{number}.jpg", quality=90)
        kib[name] = sum(path.stat().st_size for path in (folder / name).iterdir()) / NUM_FILES / 1024
        records = []
        for number in range(num_records):
            turns = [
                {"from": "human", "value": "<image>\n" + " ".join(rng.choices(words, k=20))},
                {"from": "gpt", "value": " ".join(rng.choices(words, k=rng.randrange(5, 120)))},
            ]
            records.append({"id": number, "image": f"{number % NUM_FILES}.jpg", "conversations": turns})
        (folder / f"{name}.json").write_text(json.dumps(records))
    return kib


def prepare(folder: Path, size: str, **changes):
    """Prepare a run on the pictures of one size."""
    from llava_ft.args import parse_args
    from llava_ft.training.run import prepare_run

    values = {
        "model_name_or_path": folder / "model",
        "version": "v1",
        "data_path": folder / f"{size}.json",
        "image_folder": folder / size,
        "data_cache_dir": folder / "cache",
        "image_aspect_ratio": "pad",
        "model_max_length": 2048,
        "per_device_train_batch_size": BATCH,
        "output_dir": folder / "output",
        "use_cpu": True,
    } | changes
    run = prepare_run(parse_args([text for name, value in values.items() for text in (f"--{name}", str(value))]))
    run.stop.release()
    return run


class FloatPixels:
    """Collates as the run does and normalises in the worker, so that float32 is handed over.

    Args:
        collate: The run's own collator.
        normalizer: Turns bytes into what the vision tower reads.
    """

    def __init__(self, collate, normalizer):
        self.collate = collate
        self.normalizer = normalizer

    def __call__(self, items):
        """Collate a batch."""
        batch = self.collate(items)
        return {**batch, "pixel_values": self.normalizer(batch["pixel_values"])}


def processor_seconds() -> float:
    """Processor time of this process and of its workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def loader_of(run, workers: int, *, as_float: bool = False, prefetch: int | None = None) -> Iterator[object]:
    """Give the trainer's data loader under other settings."""
    trainer = run.trainer
    collate = trainer.data_collator
    trainer.args.dataloader_num_workers = workers
    trainer.args.dataloader_prefetch_factor = prefetch if workers else None
    if as_float:
        trainer.data_collator = FloatPixels(collate, run.datasets.train.image_reader.transform.normalizer)
    try:
        yield trainer.get_train_dataloader()
    finally:
        trainer.data_collator = collate


def read_all(run, workers: int, **settings) -> dict:
    """Read an epoch, twice; the better one counts."""
    best = None
    for _ in range(2):
        with loader_of(run, workers, **settings) as loader:
            wall, processor = time.perf_counter(), processor_seconds()
            num_samples = num_bytes = 0
            for batch in loader:
                num_samples += len(batch["sample_indices"])
                num_bytes += batch["pixel_values"].nbytes
            wall, processor = time.perf_counter() - wall, processor_seconds() - processor
        if best is None or processor < best["processor_seconds"]:
            best = {
                "workers": workers,
                "samples_per_second": round(num_samples / wall, 1),
                "samples_per_core_second": round(num_samples / processor, 1),
                "processor_seconds": processor,
                "kib_per_image": round(num_bytes / num_samples / 1024),
            }
    return best


def wait_for_batches(run, workers: int, prefetch: int | None = None) -> dict:
    """Read an epoch as a training loop does, with simulated steps."""
    with loader_of(run, workers, prefetch=prefetch) as loader:
        iterator = iter(loader)
        waits = []
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                break
            waits.append(time.perf_counter() - start)
            time.sleep(STEP_SECONDS)
    later = waits[1:]
    return {
        "workers": workers,
        "prefetch_factor": prefetch if workers else None,
        "first_batch_ms": round(1000 * waits[0]),
        "wait_ms_per_step": round(1000 * sum(later) / len(later), 1),
        "share_of_time": round(sum(later) / (sum(later) + STEP_SECONDS * len(later)), 3),
    }


def measure(folder: Path, size: str, most_workers: int) -> dict:
    """Measure everything for one size of pictures."""
    full, fast = prepare(folder, size), prepare(folder, size, image_fast_decode=True)
    cases = [("full", full, True), ("full", full, False), ("fast", fast, True), ("fast", fast, False)]
    rows = []
    for decoding, run, as_float in cases:
        for workers in range(most_workers + 1) if not as_float else (0, most_workers):
            row = read_all(run, workers, as_float=as_float)
            del row["processor_seconds"]
            row = {"decoding": decoding, "pixels": "float32" if as_float else "uint8", **row}
            row["ratio"] = round(row["samples_per_core_second"] / (rows or [row])[0]["samples_per_core_second"], 2)
            rows.append(row)
            print(size, row, file=sys.stderr)
    packed = prepare(folder, size, packing=True)
    row = read_all(packed, 0)
    del row["processor_seconds"]
    ratio = round(row["samples_per_core_second"] / rows[0]["samples_per_core_second"], 2)
    rows.append({"decoding": "full, packed rows", "pixels": "uint8", **row, "ratio": ratio})
    waits = []
    for decoding, run in (("full", full), ("fast", fast)):
        for workers, prefetch in [(0, None), *((n, 2) for n in range(1, most_workers + 1)), (most_workers, 4)]:
            waits.append({"decoding": decoding, **wait_for_batches(run, workers, prefetch)})
            print(size, waits[-1], file=sys.stderr)
    return {"reading": rows, "waiting": waits}


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "| --- " * len(names) + "|"]
    lines += ["| " + " | ".join("-" if row[name] is None else str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def report(result: dict) -> str:
    """The result as Markdown."""
    about = result["about"]
    is_disturbed = about["load_before"] > 1
    others = "Other programs were running: samples per second and waiting are worse than alone." if is_disturbed else ""
    parts = [
        "# The data path alone",
        f"`{about['command']}`; commit {about['commit']}, torch {about['torch']}, Pillow {about['pillow']}, python "
        f"{about['python']}, {about['processor']}, {about['cores']} cores, load {about['load_before']:.1f} before. "
        f"{about['records']} records an epoch over {NUM_FILES} files that are in the page cache, batches of {BATCH}. "
        + others,
    ]
    for size, found in result["sizes"].items():
        parts += [
            f"## {size} JPEG, {about['kib_per_file'][size]:.0f} KiB each",
            table(found["reading"]),
            f"Waiting for data beside simulated steps of {1000 * STEP_SECONDS:.0f} ms ({BATCH} samples):",
            table(found["waiting"]),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measure, print the report, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few records; for trying out")
    parser.add_argument("--workers", type=int, default=2, help="most workers")
    parser.add_argument("--output", type=Path, help="folder for data_path.json and data_path.md")
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    import PIL
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    num_records = 32 if options.quick else 128
    about = {
        "command": "python benchmarks/data_path.py" + " --quick" * options.quick,
        **where(),
        "pillow": PIL.__version__,
        "records": num_records,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about["kib_per_file"] = make_inputs(folder, num_records)
        result = {"about": about, "sizes": {size: measure(folder, size, options.workers) for size in SIZES}}
    text = report(result)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "data_path.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.output / "data_path.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
