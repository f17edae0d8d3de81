"""The difference of two models, adapters or weight files, under native names, with bounded memory.

Tensors are read in groups: a few of the first, then their counterparts in the second one by one, so a file may be
divided into shards in any way. Values are compared in blocks, in float32 (float64 where a type needs it).
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Final

import torch

from llava_ft.checkpoint.names import EMBEDDINGS, HEAD
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import CheckpointError
from llava_ft.inspection.weight_headers import PARTS_OF_FILES, TensorHeader
from llava_ft.inspection.weights import Description, describe

_BYTES_PER_GROUP: Final = 256 * 2**20
_VALUES_PER_BLOCK: Final = 2**22
_WIDE: Final = (torch.float64, torch.int64, torch.int32)


@dataclass
class TensorDifference:
    """Two tensors of one native name that are not the same; pairs are of the first and of the second."""

    name: str
    part: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    max_difference: float | None = None
    """Largest |difference| of values; None where shapes cannot be compared. NaN against a number is infinite."""
    relative: float | None = None  # that divided by the largest |value| of the first
    num_rows: int | None = None  # rows compared, where only their number differs, as with added tokens
    is_rounded: bool = False  # whether the second holds the first's values, rounded to its own type


@dataclass
class PartDifference:
    """The difference of one part."""

    part: str
    num_common: int
    num_equal: int  # in shape, type and every bit
    max_difference: float  # the largest of its tensors
    relative: float
    worst: str  # name of the tensor with `max_difference`; "" if all are equal


@dataclass
class Difference:
    """The difference of two paths."""

    first: Description
    second: Description
    only_first: list[TensorHeader]
    only_second: list[TensorHeader]
    unreadable: list[str]  # what could not be compared, and why
    different: list[TensorDifference] = field(default_factory=list[TensorDifference])
    parts: list[PartDifference] = field(default_factory=list[PartDifference])

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.only_first or self.only_second or self.different or self.unreadable)

    def to_json(self) -> dict[str, Any]:
        """Return the difference for JSON; what is infinite becomes null."""

        def fields(of: TensorDifference | PartDifference) -> dict[str, Any]:
            items = asdict(of).items()
            return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in items}

        return {
            "first": str(self.first.path),
            "second": str(self.second.path),
            "equal": self.is_equal,
            "only_first": [tensor.name for tensor in self.only_first],
            "only_second": [tensor.name for tensor in self.only_second],
            "different": [fields(one) for one in self.different],
            "parts": [fields(part) for part in self.parts],
            "unreadable": self.unreadable,
        }


def compare(first: Path, second: Path) -> Difference:
    """Compare two files or directories.

    Raises:
        CheckpointError: One does not exist, or holds no tensors of its own.
    """
    descriptions = [describe(first), describe(second)]
    problems = [text for one in descriptions for text in one.damaged]
    problems += [text for one in descriptions for text in one.lost]
    (ours, our_files), (theirs, their_files) = (_open(one, problems) for one in descriptions)
    for description, tensors in zip(descriptions, (ours, theirs), strict=True):
        if not tensors and not description.damaged:
            raise CheckpointError(f"{description.path} holds no tensors to compare. {description.what}")
    found = Difference(
        *descriptions,
        only_first=[tensor for name, tensor in ours.items() if name not in theirs],
        only_second=[tensor for name, tensor in theirs.items() if name not in ours],
        unreadable=list(dict.fromkeys(problems)),
    )
    common = [tensor for name, tensor in ours.items() if name in theirs]
    # Headers lie file by file, so each file of the first is gone through once.
    ends = accumulate(tensor.num_bytes for tensor in common)
    for _, group in groupby(zip(common, ends, strict=True), key=lambda of: of[1] // _BYTES_PER_GROUP):
        names = [tensor.name for tensor, _ in group]
        our_keys, their_keys = ({headers[name].key: name for name in names} for headers in (ours, theirs))
        held = {our_keys[key]: value.clone() for key, value in our_files.stream(our_keys, may_be_nan=True)}
        for key, value in their_files.stream(their_keys, may_be_nan=True):
            name = their_keys[key]
            if (difference := _difference(ours[name], theirs[name], held.pop(name), value)) is not None:
                found.different.append(difference)
    num_common = Counter(tensor.part for tensor in common)
    for part in (part for part in PARTS_OF_FILES if part in num_common):
        different = [one for one in found.different if one.part == part]
        worst = max(different, key=lambda tensor: tensor.max_difference or 0.0, default=None)
        largest, name = (worst.max_difference or 0.0, worst.name) if worst is not None else (0.0, "")
        relative = max((tensor.relative or 0.0 for tensor in different), default=0.0)
        num_equal = num_common[part] - len(different)
        found.parts.append(PartDifference(part, num_common[part], num_equal, largest, relative, name))
    return found


def _open(description: Description, unreadable: list[str]) -> tuple[dict[str, TensorHeader], WeightFiles]:
    """Return the tensors of a path that count, by native name, and what reads them."""
    headers: dict[str, TensorHeader] = {}
    files = WeightFiles(description.path, {})
    for file in description.files:
        if file.path.name in description.read and file.tensors:
            try:
                files.tensors |= WeightFiles.open(file.path).tensors
            except CheckpointError as error:
                unreadable.append(str(error))
            else:
                headers |= {tensor.name: tensor for tensor in file.tensors if tensor.part != "derived"}
    return headers, files


def _difference(
    first: TensorHeader, second: TensorHeader, one: torch.Tensor, other: torch.Tensor
) -> TensorDifference | None:
    """Compare two tensors; None if they are equal bit for bit."""
    if first.shape == second.shape and one.dtype == other.dtype and _has_same_bits(one, other):
        return None
    found = TensorDifference(first.name, first.part, (first.shape, second.shape), (first.dtype, second.dtype))
    if first.shape != second.shape:
        if first.name not in (EMBEDDINGS, HEAD) or first.shape[1:] != second.shape[1:]:
            return found
        found.num_rows = min(first.shape[0], second.shape[0])
        one, other = one[: found.num_rows], other[: found.num_rows]
    difference, scale = _largest(one, other)
    found.max_difference, found.relative = difference, difference / scale if scale else math.inf if difference else 0.0
    found.is_rounded = one.dtype != other.dtype and difference > 0 and _has_same_bits(one.to(other.dtype), other)
    return found


def _has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not one.numel():
        return True
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _largest(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return the largest |difference| and the largest |value| of the first; both not a number counts as equal."""
    compute = torch.float64 if one.dtype in _WIDE or other.dtype in _WIDE else torch.float32
    largest, scale = 0.0, 0.0
    flat, counterpart = one.reshape(-1), other.reshape(-1)
    for start in range(0, flat.numel(), _VALUES_PER_BLOCK):
        a, b = (values[start : start + _VALUES_PER_BLOCK].to(compute) for values in (flat, counterpart))
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, difference.max().item())
        scale = max(scale, a.abs().nan_to_num(nan=0.0, posinf=0.0).max().item())
    return largest, scale
