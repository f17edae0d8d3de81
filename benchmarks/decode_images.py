#!/usr/bin/env python3
"""Measures what `--image_fast_decode` saves on a large photograph, and how far its pixels are off.

    python benchmarks/decode_images.py

A JPEG of 4000 x 3000 pixels is drawn, and brought from the file's bytes to what the trainer hands to the device, for
each way of preparing images: decoded whole, and shrunk by the decoder. The table goes into docs/reference/images.md.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from data_path import draw  # noqa: E402

from llava_ft.data.image_files import load_image  # noqa: E402
from llava_ft.data.image_processor import ImageProcessorSettings  # noqa: E402 - the repository need not be installed
from llava_ft.data.images import ImageTransform  # noqa: E402
from llava_ft.geometry import DEFAULT_GRIDS, ImageGeometry  # noqa: E402

SIZE_WH = (4000, 3000)
SIDE = 336
PAGE = REPOSITORY / "docs/reference/images.md"
MARK = "<!-- written by benchmarks/decode_images.py -->\n"
GEOMETRIES = {
    "`square`": ImageGeometry(SIDE, 24, 576, 576),
    "`pad`": ImageGeometry(SIDE, 24, 576, 576, aspect_ratio="pad"),
    "`anyres`": ImageGeometry(
        SIDE, 24, 576, 576, aspect_ratio="anyres", grid_pinpoints=tuple((c * SIDE, r * SIDE) for c, r in DEFAULT_GRIDS)
    ),
    "`pad`, S2 to 1008": ImageGeometry(SIDE, 24, 576, 576, aspect_ratio="pad", s2_scales=(SIDE, 2 * SIDE, 3 * SIDE)),
}


def best_of(function: Callable[[], torch.Tensor], times: int = 7) -> tuple[float, torch.Tensor]:
    """Return the shortest time in milliseconds, and the result."""
    seconds: list[float] = []
    result = function()
    for _ in range(times):
        before = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - before)
    return 1000 * min(seconds), result


def row(name: str, geometry: ImageGeometry, content: bytes) -> str:
    """Measure one way."""
    settings = ImageProcessorSettings(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    transform = ImageTransform(settings, geometry=geometry)
    whole, exact = best_of(lambda: transform.pixels(load_image(content)))
    shrunk = load_image(content, fast_decode_to=transform.decode_size).size
    fast, near = best_of(
        lambda: transform.pixels(load_image(content, fast_decode_to=transform.decode_size), SIZE_WH),
    )
    off = np.abs(exact.numpy().astype(int) - near.numpy().astype(int))
    cells = [name, f"{shrunk[0]} x {shrunk[1]}", f"{whole:.0f} ms", f"{fast:.0f} ms", f"{whole / fast:.1f}"]
    cells += [f"{off.mean():.2f}", f"{np.percentile(off, 99):.0f}", f"{off.max()}"]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Write the table into the page."""
    torch.set_num_threads(1)
    file = io.BytesIO()
    draw(SIZE_WH, 0).save(file, "JPEG", quality=90)
    table = "| | decoded to | whole | shrunk | times faster | mean difference | 99% below | largest |\n"
    table += "| --- " * 8 + "|\n"
    for name, geometry in GEOMETRIES.items():
        table += row(name, geometry, file.getvalue())
    print(f"{len(file.getvalue()) / 1e6:.1f} MB, Pillow {Image.__version__}\n{table}", end="")
    before, after = PAGE.read_text(encoding="utf-8").split(MARK)
    kept = "".join(line for line in after.split("\n## ")[0].splitlines(keepends=True) if not line.startswith("|"))
    rest = after[len(after.split("\n## ")[0]) :]
    PAGE.write_text(before + MARK + table + kept + rest, encoding="utf-8")


if __name__ == "__main__":
    main()
