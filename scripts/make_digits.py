#!/usr/bin/env python3
"""Writes scikit-learn's handwritten digits as pictures with questions, in LLaVA's format.

    python scripts/make_digits.py --output outputs/quickstart/digits

The folder gets `images/*.png`, `train.json` and, of other pictures, `test.json`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

QUESTION = "Which digit is this?"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 56


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=1400, help="pictures to learn from")
    parser.add_argument("--test", type=int, default=100, help="held-out pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    digits = load_digits()
    order = np.random.default_rng(options.seed).permutation(len(digits.target))
    images = options.output / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for index in order[: options.train + options.test].tolist():
        grey = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
        name = f"images/{index:04d}.png"
        picture = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        picture.save(options.output / name)
        talk = [
            {"from": "human", "value": f"<image>\n{QUESTION}"},
            {"from": "gpt", "value": f"This is the digit {WORDS[digits.target[index]]}."},
        ]
        records.append({"id": f"digit-{index:04d}", "image": name, "conversations": talk})
    for name, part in (("train", records[: options.train]), ("test", records[options.train :])):
        (options.output / f"{name}.json").write_text(json.dumps(part, indent=1) + "\n")
        print(f"{len(part)} records in {options.output / name}.json")


if __name__ == "__main__":
    main()
