#!/usr/bin/env python3
"""Compares what padding, first-fit decreasing and `llava_ft.data.packing` leave of the positions that are computed.

    python benchmarks/packing.py [--samples 665000] [--output benchmarks/results]

Lengths are drawn as tests/data/mixture_lengths.py describes; they are those of no real file. Efficiency is the share of
computed positions that hold a token of a sample.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from machine import where  # noqa: E402

from llava_ft.data.packing import pack  # noqa: E402 - the repository need not be installed
from llava_ft.data.sampler import modality_order, sorted_order  # noqa: E402
from tests.data.mixture_lengths import mixture_lengths  # noqa: E402

BATCH, RANKS = 16, 8
CASES = {
    "576 tokens an image": [(2048, 576), (4096, 576), (8192, 576)],
    "256 tokens an image": [(2048, 256), (4096, 256)],
    "144 tokens an image": [(2048, 144)],
}


def padded(lengths: np.ndarray, order: list[int]) -> float:
    """Efficiency of batches that are padded to their longest sample."""
    batches = [lengths[order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    return float(lengths.sum() / sum(len(batch) * batch.max() for batch in batches))


def first_fit_decreasing(lengths: np.ndarray, max_length: int, window: int = 4096) -> int:
    """Rows that first-fit decreasing needs, window by window; rows stay open.

    A tree holds in each node the most room of the rows below it.
    """
    shuffled = np.random.default_rng(0).permutation(lengths)
    leaves = 1 << int(2 * shuffled.sum() // max_length + 1).bit_length()
    room = [max_length] * (2 * leaves)
    last = 0
    for start in range(0, len(shuffled), window):
        for length in sorted(shuffled[start : start + window].tolist(), reverse=True):
            node = 1
            while node < leaves:
                node *= 2
                node += room[node] < length
            room[node] -= length
            last = max(last, node - leaves)
            while node > 1:
                node //= 2
                room[node] = max(room[2 * node], room[2 * node + 1])
    return last + 1


def measure(num_samples: int) -> str:
    """Compare all cases; a table in Markdown."""
    orders = ["random", "group_by_modality_length", "group_by_length"]
    names = ["lengths", "row", "mean", *orders, "first-fit decreasing", "packed", "seconds to pack"]
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for name, cases in CASES.items():
        for max_length, tokens_per_image in cases:
            signed = mixture_lengths(num_samples, max_length=max_length, tokens_per_image=tokens_per_image, signed=True)
            lengths = np.abs(signed)
            random = padded(lengths, np.random.default_rng(0).permutation(num_samples).tolist())
            modality = padded(lengths, modality_order(signed.tolist(), BATCH, RANKS))
            by_length = padded(lengths, sorted_order(lengths.tolist(), BATCH, RANKS))
            decreasing = lengths.sum() / (first_fit_decreasing(lengths, max_length) * max_length)
            start = time.process_time()
            rows = pack(lengths, max_length, 0)
            seconds = time.process_time() - start
            packed = lengths.sum() / (len(rows) * max_length)
            shares = " | ".join(f"{share:.1%}" for share in (random, modality, by_length, decreasing, packed))
            lines.append(f"| {name} | {max_length} | {lengths.mean():.0f} | {shares} | {seconds:.1f} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main() -> int:
    """Measure, print the report, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=665_000)
    parser.add_argument("--output", type=Path, help="folder for packing.md")
    options = parser.parse_args()
    about = where()
    text = (
        "# Positions that hold a token\n\n"
        f"`python benchmarks/packing.py --samples {options.samples}`; commit {about['commit']}, python "
        f"{about['python']}, {about['processor']}; seconds are processor time of one core. The first three "
        f"shares are those of batches of {BATCH} samples, padded to their longest, in the orders of an epoch for "
        f"{RANKS} ranks; the last two those of rows.\n\n"
        f"{measure(options.samples)}\n"
    )
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "packing.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
