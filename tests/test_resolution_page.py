"""The counts in docs/how-to/resolution.md are those of the code.

    python -m tests.test_resolution_page

writes the table anew.
"""

from pathlib import Path

from llava_ft.geometry import ImageGeometry, parse_grid_pinpoints

PAGE = Path(__file__).parents[1] / "docs/how-to/resolution.md"
MARK = "<!-- computed by tests/test_resolution_page.py -->\n"
LLAVA_16 = parse_grid_pinpoints("(1x2),(2x1),(2x2),(3x1),(1x3)", 336)
SETTINGS = {
    "`pad`": ImageGeometry(336, 24, 576, 576, aspect_ratio="pad"),
    "`anyres`, `flat` or `spatial`": ImageGeometry(336, 24, 576, 576, aspect_ratio="anyres", grid_pinpoints=LLAVA_16),
    "`anyres`, `spatial_unpad`": ImageGeometry(
        336, 24, 576, 576, aspect_ratio="anyres", merge_type="spatial_unpad", grid_pinpoints=LLAVA_16
    ),
    "`anyres_max_4`": ImageGeometry(
        336,
        24,
        576,
        576,
        aspect_ratio="anyres_max_4",
        merge_type="spatial_unpad",
        grid_pinpoints=parse_grid_pinpoints("(1x1),...,(6x6)", 336),
    ),
}
SIZES = [(200, 200), (640, 480), (480, 640), (1000, 1000), (1920, 1080), (1080, 1920), (4000, 3000), (3000, 400)]


def table() -> str:
    """Write the table: tokens, and how many tiles they come from."""
    rows = [["image", *SETTINGS], ["---"] * (len(SETTINGS) + 1)]
    for size_wh in SIZES:
        cells = [f"{g.num_tokens(size_wh):,} ({g.num_tiles(size_wh)})" for g in SETTINGS.values()]
        rows.append([f"{size_wh[0]} x {size_wh[1]}", *cells])
    rows.append(["the most there are", *(f"{g.max_tokens:,} ({g.max_tiles})" for g in SETTINGS.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_counts_are_the_code_s():
    assert MARK + table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    before, after = PAGE.read_text(encoding="utf-8").split(MARK)
    kept = "".join(line for line in after.splitlines(keepends=True) if not line.startswith("|"))
    PAGE.write_text(before + MARK + table() + kept, encoding="utf-8")
