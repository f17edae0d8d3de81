#!/usr/bin/env python3
"""Draws the result of the quick start: answers before and after, accuracy, loss against step.

    python scripts/quickstart_picture.py outputs/quickstart docs/start/quick-start.png

The first folder is that of `./scripts/quickstart.sh`. Pillow draws, with the font that comes with it.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from quickstart_report import is_right

from llava_ft.data.image_files import load_image

WIDTH, HEIGHT = 1600, 760
INK, SOFT, LINE = "#1f2328", "#59636e", "#d1d9e0"
GOOD, BAD, CURVE = "#1a7f37", "#cf222e", "#0969da"
NUM_ROWS = 5


def draw(result: Path) -> Image.Image:
    """Draw the picture.

    Args:
        result: Folder with `report.json`, `before.json`, `after.json` and `digits/`.
    """
    report, before, after, records = (
        json.loads((result / name).read_text())
        for name in ("report.json", "before.json", "after.json", "digits/test.json")
    )
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    canvas = ImageDraw.Draw(picture)
    draw_answers(picture, canvas, records[:NUM_ROWS], before, after, result / "digits")
    left = 990
    canvas.text((left, 40), f"Right of {report['num_test']} held-out pictures", SOFT, font(24))
    for row, (label, key, colour) in enumerate((("before", "accuracy_before", BAD), ("after", "accuracy_after", GOOD))):
        y = 88 + 56 * row
        canvas.text((left, y + 4), label, INK, font(24))
        canvas.rectangle((left + 100, y, WIDTH - 150, y + 36), fill="#eff2f5")
        canvas.rectangle((left + 100, y, left + 100 + (WIDTH - 250 - left) * report[key], y + 36), fill=colour)
        canvas.text((WIDTH - 130, y + 2), f"{report[key]:.0%}", colour, font(30))
    draw_losses(canvas, report["losses"], (left + 60, 290, WIDTH - 50, HEIGHT - 90))
    return picture


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def draw_answers(
    picture: Image.Image, canvas: ImageDraw.ImageDraw, records: list[dict], before: dict, after: dict, data: Path
) -> None:
    """Draw question, picture and both answers of each record."""
    question = records[0]["conversations"][0]["value"].removeprefix("<image>\n")
    canvas.text((40, 40), f'"{question}"', INK, font(28))
    columns = ((190, "before training", before), (510, "after training and merging", after))
    for x, title, _ in columns:
        canvas.text((x, 92), title, SOFT, font(24))
    for row, record in enumerate(records):
        y = 138 + 118 * row
        canvas.line((40, y - 8, 900, y - 8), LINE, 2)
        digit = load_image(data / record["image"])
        picture.paste(digit.resize((102, 102), Image.Resampling.LANCZOS), (40, y))
        for x, _, answers in columns:
            given = answers[record["id"]]
            colour = GOOD if is_right(given, record["conversations"][1]["value"]) else BAD
            canvas.text((x, y + 34), given, colour, font(28))


def draw_losses(
    canvas: ImageDraw.ImageDraw, losses: list[tuple[int, float]], box: tuple[float, float, float, float]
) -> None:
    """Draw loss against step into a box of left, top, right, bottom."""
    left, top, right, bottom = box
    last, highest = losses[-1][0], max(loss for _, loss in losses) * 1.05
    canvas.text((left - 60, top - 60), "Loss by step", SOFT, font(24))
    for quarter in range(5):
        y = bottom - (bottom - top) * quarter / 4
        canvas.line((left, y, right, y), LINE, 2)
        canvas.text((left - 12, y), f"{highest * quarter / 4:.1f}", SOFT, font(20), anchor="rm")
        canvas.text((left + (right - left) * quarter / 4, bottom + 14), f"{last * quarter // 4}", SOFT, font(20), "mt")
    points = [(left + (right - left) * step / last, bottom - (bottom - top) * loss / highest) for step, loss in losses]
    canvas.line(points, CURVE, 5, joint="curve")
    canvas.text((right, points[-1][1] - 16), f"{losses[-1][1]:.3f}", CURVE, font(24), anchor="rb")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="folder that ./scripts/quickstart.sh wrote")
    parser.add_argument("output", type=Path, help="PNG file to write")
    options = parser.parse_args()
    # A palette of 64 colours holds it: white, greys, three colours and their edges.
    draw(options.result).quantize(64).save(options.output, optimize=True)
