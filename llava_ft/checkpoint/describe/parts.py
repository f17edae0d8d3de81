"""Many tensors in few lines: those that differ in the number of their layer, or have the same shape, become one."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final

from llava_ft.checkpoint.describe.files import PARTS, TensorHeader

_INDEX: Final = re.compile(r"(?<=\.)(\d+)(?=\.)")
_MOST_CHARACTERS: Final = 60
"""Of the names in braces."""


@dataclass(frozen=True)
class Fold:
    """Tensors of one shape and type.

    Attributes:
        names: Their names as one pattern, such as `model.layers.0-31.self_attn.{k,o,q,v}_proj.weight`.
        shape: The shape of each.
        dtype: The type of each.
        count: How many there are.
    """

    names: str
    shape: tuple[int, ...]
    dtype: str
    count: int


@dataclass
class PartSummary:
    """The tensors of one part.

    Attributes:
        part: One of `PARTS`.
        num_tensors: How many there are.
        num_values: How many values they have.
        num_bytes: Their size on disk.
        folds: Their names, folded.
    """

    part: str
    num_tensors: int = 0
    num_values: int = 0
    num_bytes: int = 0
    folds: list[Fold] = field(default_factory=list[Fold])

    def to_json(self) -> dict[str, Any]:
        """Return the summary for JSON."""
        return {
            "part": self.part,
            "tensors": self.num_tensors,
            "values": self.num_values,
            "bytes": self.num_bytes,
            "names": [
                {"names": fold.names, "shape": list(fold.shape), "dtype": fold.dtype, "tensors": fold.count}
                for fold in self.folds
            ],
        }


def summarise(tensors: Iterable[TensorHeader]) -> list[PartSummary]:
    """Group tensors by part, in the order of `PARTS`."""
    by_part: dict[str, list[TensorHeader]] = {}
    for tensor in tensors:
        by_part.setdefault(tensor.part, []).append(tensor)
    return [
        PartSummary(
            part,
            len(members),
            sum(tensor.num_values for tensor in members),
            sum(tensor.num_bytes for tensor in members),
            fold(members),
        )
        for part in PARTS
        if (members := by_part.get(part))
    ]


def fold(tensors: Sequence[TensorHeader]) -> list[Fold]:
    """Fold tensors, by their keys on disk."""
    numbered: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for tensor in tensors:
        match = _INDEX.search(tensor.key)
        pattern = tensor.key if match is None else f"{tensor.key[: match.start()]}*{tensor.key[match.end() :]}"
        indexes = numbered.setdefault((pattern, tensor.shape, tensor.dtype), [])
        indexes.append(-1 if match is None else int(match[0]))
    alike: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    for (pattern, shape, dtype), indexes in numbered.items():
        numbers = "" if indexes == [-1] else ranges(indexes)
        group = (numbers, shape, dtype)
        alike.setdefault(group, []).append(pattern.replace("*", numbers, 1) if numbers else pattern)
        counts[group] = counts.get(group, 0) + len(indexes)
    return [Fold(braced(names), key[1], key[2], counts[key]) for key, names in alike.items()]


def ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges: 0, 1, 2 and 5 are `0-2,5`."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def braced(names: Sequence[str]) -> str:
    """Write names that begin and end alike as one, with what differs in braces."""
    if len(names) == 1:
        return names[0]
    start = _cut(_common_start(names), ".")
    rests = [name[len(start) :] for name in names]
    backwards = _common_start([rest[::-1] for rest in rests])
    end = max((_cut(backwards, mark) for mark in "._"), key=len)[::-1]
    middles = [rest[: len(rest) - len(end)] for rest in rests]
    if not all(middles):
        end, middles = "", rests
    middles.sort()
    shown: list[str] = []
    while len(shown) < len(middles) and len(",".join([*shown, middles[len(shown)]])) <= _MOST_CHARACTERS:
        shown.append(middles[len(shown)])
    more = [f"and {len(middles) - len(shown)} more"] if len(shown) < len(middles) else []
    return f"{start}{{{','.join([*shown, *more])}}}{end}"


def _common_start(texts: Sequence[str]) -> str:
    """Return what all texts begin with."""
    pairs = zip(min(texts), max(texts), strict=False)
    return "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _cut(text: str, mark: str) -> str:
    """Return a text up to and with the last `mark` in it; "" without one."""
    return text[: text.rfind(mark) + 1]
