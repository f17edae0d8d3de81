"""Text on a terminal: in columns, whether it may be coloured, and what of data must not reach it."""

import os
import re
from collections.abc import Sequence
from typing import Final, TextIO

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that could steer a terminal; tab and newline are not among them."""


def has_color(stream: TextIO) -> bool:
    """Whether text for `stream` may be coloured: it is a terminal, and NO_COLOR and TERM do not forbid it."""
    is_forbidden = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not is_forbidden


def visible(text: str) -> str:
    """Show control characters, which could steer a terminal, as escapes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align the cells of each column, of those named in `right` on the right.

    No line is cut or wrapped, as rich would do, so that names and flags can be searched for and copied.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
