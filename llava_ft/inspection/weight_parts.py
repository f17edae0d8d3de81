"""Many tensors in few lines: those that differ in the number of their layer, or have the same shape, become one."""

import os.path
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from llava_ft.inspection.weight_headers import TensorHeader

PARTS: Final = (
    "embeddings", "layers", "norm", "head", "projector", "image newline", "vision tower", "LoRA A", "LoRA B",
    "DoRA magnitudes", "LoRA biases", "rows of added tokens", "CLIP text half", "derived", "other",
)  # fmt: skip
"""What `part_of_tensor` returns, in the order in which parts are shown."""

_INDEX: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_MOST_CHARACTERS: Final = 60
"""Of the names in braces."""


@dataclass(frozen=True)
class Fold:
    """Tensors of one shape and type.

    Attributes:
        names: Their names as one pattern, such as `model.layers.0-31.self_attn.{k,o,q,v}_proj.weight`.
        shape: The shape of each.
        dtype: The type of each.
        num_tensors: How many there are.
    """

    names: str
    shape: tuple[int, ...]
    dtype: str
    num_tensors: int


@dataclass
class PartSummary:
    """The tensors of one part.

    Attributes:
        part: One of `PARTS`.
        num_tensors: How many there are.
        num_values: How many values they have.
        num_bytes: Their size on disk.
        names: Their names, folded.
    """

    part: str
    num_tensors: int
    num_values: int
    num_bytes: int
    names: list[Fold]


def summarise(tensors: Iterable[TensorHeader]) -> list[PartSummary]:
    """Group tensors by part, in the order of `PARTS`."""
    by_part: dict[str, list[TensorHeader]] = {part: [] for part in PARTS}
    for tensor in tensors:
        by_part[tensor.part].append(tensor)
    return [
        PartSummary(part, len(members), sum(t.num_values for t in members), num_bytes_of(members), fold(members))
        for part, members in by_part.items()
        if members
    ]


def num_bytes_of(tensors: Iterable[TensorHeader]) -> int:
    """Size of tensors on disk in bytes."""
    return sum(tensor.num_bytes for tensor in tensors)


def fold(tensors: Iterable[TensorHeader]) -> list[Fold]:
    """Fold tensors, by their keys on disk."""
    # First layers: names that differ in their first number. Then names whose shape, type and layers are the same.
    numbered: defaultdict[tuple[str, tuple[int, ...], str], list[str]] = defaultdict(list)
    for tensor in tensors:
        pattern = _INDEX.sub("*", tensor.key, count=1)
        numbered[pattern, tensor.shape, tensor.dtype] += _INDEX.findall(tensor.key)[:1] or [""]
    alike: defaultdict[tuple[str, tuple[int, ...], str], list[tuple[str, int]]] = defaultdict(list)
    for (pattern, shape, dtype), found in numbered.items():
        numbers = ranges(int(number) for number in found if number)
        names = pattern.replace("*", numbers, 1) if numbers else pattern
        alike[numbers, shape, dtype].append((names, len(found)))
    return [
        Fold(braced([names for names, _ in members]), shape, dtype, sum(count for _, count in members))
        for (_, shape, dtype), members in alike.items()
    ]


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
    common = os.path.commonprefix(names)  # noqa: RUF071 - of characters, as it is meant
    start = common[: common.rfind(".") + 1]
    rests = [name.removeprefix(start) for name in names]
    backwards = os.path.commonprefix([rest[::-1] for rest in rests])  # noqa: RUF071
    end = backwards[: max(backwards.rfind("."), backwards.rfind("_")) + 1][::-1]
    middles = sorted(rest.removesuffix(end) for rest in rests)
    if not all(middles):
        end, middles = "", sorted(rests)
    num_shown = sum(length <= _MOST_CHARACTERS + 1 for length in accumulate(len(middle) + 1 for middle in middles))
    more = [f"and {len(middles) - num_shown} more"] if num_shown < len(middles) else []
    return f"{start}{{{','.join([*middles[:num_shown], *more])}}}{end}"
