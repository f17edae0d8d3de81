#!/usr/bin/env python3
"""Measures how long records take to be prepared, how much memory that takes, and how long a second start takes.

    python benchmarks/prepare_records.py [--records 665000] [--images 350000] [--workers 2]

A data file in the form of LLaVA-1.5's mixture is written (0.8 GB with 665,000 records), with made-up conversations of 1
to 8 exchanges and an image file of a few hundred bytes for each image that it names. Then the data sets of a run are
built three times, each time in a process of its own: from nothing; again, as a second start does; and again with
another `model_max_length` and truncated records. The tokenizer is the small one of the tests (512 entries), which makes
more tokens of a text than LLaMA's does.

Memory is VmHWM, the most that a process had resident at any time, mapped files included: of the process that starts
the others, and of the largest of these.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from machine import where

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENIZER = REPOSITORY / "tests" / "golden" / "tokenizers" / "tiny512"
TEXT = (
    "the a of in on to and with is are there that it this what which color image picture man woman people person "
    "sitting standing table street red white green blue car dog cat background visible can you describe scene various "
    "several small large near front providing overall suggests engaged"
)


def write_records(path: Path, num_records: int, num_images: int) -> None:
    """Write conversations of 1 to 8 exchanges; 6 % are text alone."""
    rng, words = random.Random(0), TEXT.split()
    texts = [" ".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(2_000)]

    def text(sentences: int) -> str:
        return ". ".join(rng.choices(texts, k=sentences))

    with path.open("w") as file:
        file.write("[")
        for number in range(num_records):
            has_image = rng.random() > 0.06
            turns = []
            for turn in range(rng.choice((1, 2, 3, 4, 5, 8))):
                question = text(1) + "?"
                if has_image and turn == 0:
                    question = "<image>\n" + question
                turns.append({"from": "human", "value": question})
                turns.append({"from": "gpt", "value": text(rng.choice((1, 1, 2, 4, 12)))})
            record = {"id": f"{number:09d}", "conversations": turns}
            if has_image:
                record["image"] = image_name(rng.randrange(num_images))
            file.write(("," if number else "") + json.dumps(record))
        file.write("]")


def image_name(number: int) -> str:
    return f"{number // 1000:04d}/{number:09d}.jpg"


def write_images(folder: Path, num_images: int) -> None:
    import io

    from PIL import Image

    contents = []
    for width, height in ((640, 480), (480, 640), (500, 375), (336, 336)):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, "JPEG", quality=10)
        contents.append(buffer.getvalue()[:700])  # Enough for the header, which is all that is read.
    for number in range(num_images):
        path = folder / image_name(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(contents[number % len(contents)])


def high_water(pid: int) -> int:
    """Give VmHWM in MiB, 0 for a process that is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) // 1024
    except OSError:
        pass
    return 0


def started_by(pid: int) -> list[int]:
    """List the processes below one: the server of the pool, and what that has started."""
    found = []
    with contextlib.suppress(OSError):  # one that has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *started_by(int(child))]
    return found


def start(folder: Path, workers: int, model_max_length: int) -> dict[str, object]:
    """Build the data sets once and say what that took."""
    from llava_ft.conversation import get_template
    from llava_ft.data.build import build_datasets
    from llava_ft.data.images import ImageTransform
    from llava_ft.data.preparation.image_facts import ImageChecks
    from llava_ft.data.preparation.prepare import PreparationSettings
    from llava_ft.data.preparation.samples import DataPlan
    from llava_ft.data.preparation.truncation import Limits
    from llava_ft.data.tokenize import SampleTokenizer
    from llava_ft.data.tokenizer import load_tokenizer
    from llava_ft.geometry import ImageGeometry

    geometry = ImageGeometry(
        image_size=56, tokens_per_side=4, tokens_per_tile=16, features_per_tile=16, aspect_ratio="pad"
    )
    tokenizer = load_tokenizer(TOKENIZER)
    transform = ImageTransform.from_pretrained(REPOSITORY / "tests" / "golden" / "ckpt" / "clip-tiny", "pad")
    imported = high_water(os.getpid())
    peaks: dict[int, int] = {}
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(0.2):
            for pid in started_by(os.getpid()):
                peaks[pid] = max(peaks.get(pid, 0), high_water(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.monotonic()
    datasets = build_datasets(
        folder / "records.json",
        DataPlan(
            SampleTokenizer(tokenizer, get_template("v1")),
            Limits(geometry, model_max_length),
            ImageChecks("header"),
            str(folder / "images"),
            PreparationSettings(folder / "cache", workers),
        ),
        image_transform=transform,
    )
    seconds = time.monotonic() - begin
    is_done.set()
    watcher.join()
    report = datasets.report
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
        "records_per_second": round(report.num_records / seconds),
        "main_process_mib": high_water(os.getpid()),
        "main_process_after_imports_mib": imported,
        "largest_worker_mib": max(peaks.values(), default=0),
        "num_usable": report.num_usable,
        "num_truncated": report.num_truncated,
        "num_tokens": report.num_tokens,
    }


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="prepare-records-", dir=arguments.work) as name:
        folder = Path(name)
        write_records(folder / "records.json", arguments.records, arguments.images)
        write_images(folder / "images", arguments.images)
        starts = {}
        for what, length in (("first start", 2048), ("second start", 2048), ("other model_max_length", 512)):
            command = [sys.executable, __file__, "--start", str(folder), "--length", str(length)]
            command += ["--workers", str(arguments.workers)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            starts[what] = json.loads(output)
            print(what, starts[what], file=sys.stderr)
        cache = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())
        size = (folder / "records.json").stat().st_size
    return {
        "command": f"python benchmarks/prepare_records.py --records {arguments.records} --images {arguments.images} "
        f"--workers {arguments.workers}",
        **arguments.about,
        "records": arguments.records,
        "images": arguments.images,
        "data_file_bytes": size,
        "cache_bytes": cache,
        "starts": starts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--images", type=int, default=350_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", help="directory for what is written meanwhile; some 5 GB")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start, arguments.workers, arguments.length)))
        return
    arguments.about = where()
    results = measure(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "prepare_records.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
