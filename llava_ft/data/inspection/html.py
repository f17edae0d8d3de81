"""Small parts of self-contained HTML pages: the frame, escaped text, thumbnails and bar charts.

A page loads nothing: styles, charts and pictures are in it, and a content policy forbids the browser anything else.
Colours follow the reader's choice of light or dark.
"""

import base64
import html
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from llava_ft.data.image_files import load_image
from llava_ft.data.inspection.terminal import visible
from llava_ft.errors import ImageError, UserError

THUMBNAIL_SIDE: Final = 160
"""Pixels of the longer side of a thumbnail."""

_JPEG_QUALITY: Final = 75
_CHART_WIDTH: Final = 860
_BAR_HEIGHT: Final = 20
_LABEL_WIDTH: Final = 150
_COUNT_WIDTH: Final = 230

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1c1c1e; --dim: #63636b; --back: #ffffff; --box: #f3f3f6; --line: #d5d5dc;
  --learnt: #d3f0d8; --cut: #b3261e; --error: #b3261e; --warning: #8a5a00; --note: #1f5fa8; --bar: #4a78b5; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6ea; --dim: #a0a0aa; --back: #17171a; --box: #232328;
  --line: #3a3a42; --learnt: #1d4a28; --cut: #ff8a80; --error: #ff8a80; --warning: #ffc766; --note: #8ab8f5;
  --bar: #7fa8dc; } }
body { color: var(--text); background: var(--back); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.dim { color: var(--dim); } .error { color: var(--error); } .warning { color: var(--warning); }
.note { color: var(--note); } h1, h2, h3, p, td, pre { overflow-wrap: anywhere; }
article { border-top: 1px solid var(--line); padding: 0.5rem 0; }
pre { white-space: pre-wrap; background: var(--box); padding: 0.7rem; border-radius: 4px; font-size: 13px; }
mark { background: var(--learnt); color: inherit; } del { color: var(--cut); }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: 0.15rem 0.9rem 0.15rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: 0.3rem 0.6rem 0.3rem 0; max-width: 160px; vertical-align: top; }
figure img { max-width: 160px; border: 1px solid var(--line); } figcaption { font-size: 12px; color: var(--dim);
  overflow-wrap: anywhere; }
svg text { fill: var(--text); font: 12px system-ui, sans-serif; } svg rect { fill: var(--bar); }
svg line { stroke: var(--cut); stroke-dasharray: 4 3; } svg .limit { fill: var(--cut); }
"""
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

PAGE_END: Final = "</body></html>\n"


def page_start(title: str) -> str:
    """Give the beginning of a page, up to its heading."""
    name = text(title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title><style>{_STYLE}</style></head>\n<body>\n<h1>{name}</h1>\n"
    )


def text(value: object) -> str:
    """Escape text for HTML; control characters are shown as escapes."""
    return html.escape(visible(str(value)))


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Give names and values as a table."""
    return (
        "<table>"
        + "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
        + ("</table>\n")
    )


def thumbnail(content: str | bytes, caption: str) -> str:
    """Show an image small, or say why that cannot be done.

    Args:
        content: Path or content of the image's file.
        caption: Stands below it.
    """
    try:
        picture = load_image(content)
    except (ImageError, MemoryError) as error:
        return missing(str(error) or "too large for the memory")
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(written.getvalue()).decode("ascii")
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}"><figcaption>{text(caption)}</figcaption></figure>'


def missing(reason: str) -> str:
    """Stand in for an image that cannot be shown."""
    return f'<figure><figcaption class="error">{text(reason)}</figcaption></figure>'


def bar_chart(labels: Sequence[str], counts: Sequence[int], *, limit: tuple[int, str] | None = None) -> str:
    """Draw horizontal bars, one for each label.

    Args:
        labels: What is counted.
        counts: How often; not negative.
        limit: A bar below which a line is drawn, and what the line means.
    """
    longest = max([1, *counts])
    room = _CHART_WIDTH - _LABEL_WIDTH - _COUNT_WIDTH
    height = _BAR_HEIGHT * len(counts) + _BAR_HEIGHT
    parts = [f'<svg role="img" viewBox="0 0 {_CHART_WIDTH} {height}" width="100%">']
    for position, (label, count) in enumerate(zip(labels, counts, strict=True)):
        top = position * _BAR_HEIGHT
        width = max(room * count / longest, 1.0 if count else 0.0)
        parts.append(
            f'<text x="{_LABEL_WIDTH - 8}" y="{top + 14}" text-anchor="end">{text(label)}</text>'
            f'<rect x="{_LABEL_WIDTH}" y="{top + 3}" width="{width:.1f}" height="{_BAR_HEIGHT - 6}"></rect>'
            f'<text x="{_LABEL_WIDTH + width + 6:.1f}" y="{top + 14}">{count:,}</text>'
        )
    if limit is not None:
        top = (limit[0] + 1) * _BAR_HEIGHT
        parts.append(
            f'<line x1="{_LABEL_WIDTH}" x2="{_CHART_WIDTH}" y1="{top}" y2="{top}"></line>'
            f'<text class="limit" x="{_CHART_WIDTH}" y="{top + 14}" text-anchor="end">{text(limit[1])}</text>'
        )
    return "".join(parts) + "</svg>\n"


def write_page(path: str | os.PathLike[str], parts: Iterable[str]) -> None:
    """Write a page piece by piece; it appears under its name when it is whole.

    Raises:
        UserError: The file cannot be written.
    """
    target = Path(path)
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            staged = Path(file.name)
            try:
                file.writelines(parts)
                file.close()
                staged.chmod(0o666 & ~_umask())
                staged.replace(target)
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise UserError(f"The page {target} cannot be written: {error.strerror}. Name another file.") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
