"""Text from data on a terminal: whether it may be coloured, and what must not reach it."""

import os
import re
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
