"""One checked record, whatever form it was written in."""

import re
from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["human", "gpt"]

EMBEDDED: Final = "embedded:"
"""How the name of an image starts whose content is in the source of the record: `embedded:{index}/{position}`."""

_EMBEDDED_NAME: Final = re.compile(re.escape(EMBEDDED) + r"(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says once.

    Attributes:
        role: Which side.
        text: What it says.
        weight: 0 takes an assistant's turn out of what is learnt, 1 leaves it in.
    """

    role: Role
    text: str
    weight: Literal[0, 1] = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One checked record.

    Attributes:
        index: Position in the data set, counted from 0.
        id: The record's own `id` as text, "" when it has none.
        turns: At least one, the roles alternating; an assistant's turn may come first.
        images: In the order of their placeholders: paths as written in the record, and `embedded_name` for images
            whose content is in the source.
        system: Text of a leading system turn, None when the record has none.
    """

    index: int
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    system: str | None = None


def embedded_name(index: int, position: int) -> str:
    """Name an image whose content is in the source, by its record and its place among the record's images."""
    return f"{EMBEDDED}{index}/{position}"


def parse_embedded(image: str) -> tuple[int, int] | None:
    """Undo `embedded_name`; None for a path."""
    found = _EMBEDDED_NAME.fullmatch(image)
    return (int(found[1]), int(found[2])) if found else None
