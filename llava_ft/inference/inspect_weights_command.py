"""`llava-ft inspect weights`: what weight files and directories hold, and how two of them differ."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from llava_ft.checkpoint.describe.description import Description, describe
from llava_ft.checkpoint.describe.difference import Difference, TensorDifference, compare
from llava_ft.checkpoint.describe.files import TensorHeader
from llava_ft.checkpoint.describe.parts import fold
from llava_ft.checkpoint.describe.words import Needs
from llava_ft.data.inspection.terminal import visible

_MOST_LINES = 8


def run_inspect_weights(
    paths: Sequence[Path], output: TextIO, *, as_json: bool = False, all_keys: bool = False
) -> bool:
    """Describe a path, or compare two.

    Args:
        paths: One path, or two.
        output: Gets the result.
        as_json: Whether the result is written as JSON.
        all_keys: Whether every tensor is listed.

    Returns:
        Whether the path is whole, or the two are equal.

    Raises:
        CheckpointError: A path does not exist, or holds nothing that can be compared.
    """
    if len(paths) == 2:
        difference = compare(paths[0], paths[1])
        result, lines, is_good = difference.to_json(), _difference_lines(difference, all_keys), difference.is_equal
    else:
        found = describe(paths[0])
        result, lines, is_good = found.to_json(), _lines(found, all_keys), found.is_whole
    output.write(json.dumps(result, indent=1) + "\n" if as_json else "".join(f"{visible(line)}\n" for line in lines))
    return is_good


def _lines(found: Description, all_keys: bool) -> list[str]:
    lines = [f"{found.path}: {found.what}"]
    lines += _needs_lines(found.needs)
    lines += [f"missing: {text}" for text in found.missing]
    lines += [f"damaged: {text}" for text in found.damaged]
    lines += [f"note: {text}" for text in found.notes]
    for one in found.inside:
        lines.append(f"  {one.path.name}: {one.what}")
        lines += [f"    {text}" for text in _needs_lines(one.needs)]
        lines += [f"    missing: {text}" for text in one.missing]
        lines += [f"    damaged: {text}" for text in one.damaged]
    if len(found.files) > 1 or (found.files and found.path.is_dir()):
        lines += ["", *_file_lines(found)]
    if found.parts:
        lines += ["", *_part_lines(found)]
    if all_keys:
        lines += ["", *_key_lines(found)]
    return lines


def _needs_lines(needs: Needs | None) -> list[str]:
    if needs is None:
        return []
    where = "" if needs.is_here else " (no directory here)"
    text = f"needs the base {needs.base}{where}" if needs.base else "needs a base that no file names"
    sizes = [f"{needs.hidden_size} wide"] if needs.hidden_size else []
    sizes += [f"{needs.num_layers} layers or more"] if needs.num_layers else []
    if sizes:
        text += ", a language model " + ", ".join(sizes)
    if needs.fingerprint:
        text += f", {needs.fingerprint}"
    return [text + "."]


def _file_lines(found: Description) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for scan in found.files:
        parts = ", ".join(dict.fromkeys(tensor.part for tensor in scan.tensors)) or "nothing that can be read"
        is_read = scan.path.name in found.read
        rows.append(
            (
                scan.path.name,
                _size(scan.num_bytes),
                f"{len(scan.tensors)} tensors",
                parts if is_read else f"not read ({parts})",
            )
        )
    return _table(rows, right=(1, 2))


def _part_lines(found: Description) -> list[str]:
    rows: list[tuple[str, ...]] = []
    for part in found.parts:
        for number, one in enumerate(part.folds):
            first = (part.part, f"{part.num_tensors}", f"{part.num_values:,}", _size(part.num_bytes))
            rows.append((*(first if number == 0 else ("", "", "", "")), one.dtype, _shape(one.shape), one.names))
    total = (
        "all",
        f"{sum(part.num_tensors for part in found.parts)}",
        f"{sum(part.num_values for part in found.parts):,}",
        _size(sum(part.num_bytes for part in found.parts)),
    )
    heading = ("part", "tensors", "values", "size", "type", "shape", "names")
    return _table([heading, *rows, (*total, "", "", "")], right=(1, 2, 3))


def _key_lines(found: Description) -> list[str]:
    rows = [
        (tensor.key, tensor.dtype, _shape(tensor.shape), _size(tensor.num_bytes), tensor.file)
        for tensor in found.tensors
    ]
    return _table(rows, right=(3,))


def _difference_lines(found: Difference, all_keys: bool) -> list[str]:
    num_common = sum(part.num_common for part in found.parts)
    num_equal = sum(part.num_equal for part in found.parts)
    lines = [f"first:  {found.first.path}: {found.first.what}", f"second: {found.second.path}: {found.second.what}"]
    lines += [f"not compared: {text}" for text in found.unreadable]
    if found.is_equal:
        return [*lines, f"Equal: {num_equal} tensors, bit for bit."]
    lines.append(f"{num_equal} of {num_common} tensors that both have are equal bit for bit.")
    if not num_common:
        lines.append("They have no tensor in common. To compare an adapter with a model, merge it first.")
    for label, tensors in (("only in the first", found.only_first), ("only in the second", found.only_second)):
        lines += _only_lines(label, tensors, all_keys)
    if any(part.num_equal < part.num_common for part in found.parts):
        lines += ["", *_part_difference_lines(found)]
    shown = found.different if all_keys else _worst(found.different)
    if shown:
        lines += ["", *_table([_tensor_row(one) for one in shown])]
        if len(shown) < len(found.different):
            lines.append(f"and {len(found.different) - len(shown)} more, which --keys lists")
    return lines


def _only_lines(label: str, tensors: Sequence[TensorHeader], all_keys: bool) -> list[str]:
    if not tensors:
        return []
    lines = [f"{label}: {len(tensors)} tensors, {_size(sum(tensor.num_bytes for tensor in tensors))}"]
    if all_keys:
        return lines + [f"  {tensor.name}" for tensor in tensors]
    folds = fold(tensors)
    lines += [f"  {one.names}  {_shape(one.shape)}" for one in folds[:_MOST_LINES]]
    return lines + ([f"  and {len(folds) - _MOST_LINES} more kinds"] if len(folds) > _MOST_LINES else [])


def _part_difference_lines(found: Difference) -> list[str]:
    rows: list[tuple[str, ...]] = [("part", "both", "equal", "max |difference|", "relative", "largest in")]
    for part in found.parts:
        numbers = (_number(part.max_difference), _number(part.relative)) if part.worst else ("", "")
        rows.append((part.part, f"{part.num_common}", f"{part.num_equal}", *numbers, part.worst))
    return _table(rows, right=(1, 2))


def _worst(different: Sequence[TensorDifference]) -> list[TensorDifference]:
    """Choose those whose shape or type differs, and then those whose values differ most."""

    def order(one: TensorDifference) -> tuple[bool, bool, float]:
        return (one.shapes[0] == one.shapes[1], one.dtypes[0] == one.dtypes[1], -(one.relative or 0.0))

    return sorted(different, key=order)[:_MOST_LINES]


def _tensor_row(one: TensorDifference) -> tuple[str, ...]:
    shape = _shape(one.shapes[0]) if one.shapes[0] == one.shapes[1] else " / ".join(map(_shape, one.shapes))
    dtype = one.dtypes[0] if one.dtypes[0] == one.dtypes[1] else " / ".join(one.dtypes)
    if one.max_difference is None or one.relative is None:
        return one.name, shape, dtype, "other shape"
    where = f" in the {one.num_rows:,} rows of both" if one.num_rows is not None else ""
    if one.is_rounded:
        return one.name, shape, dtype, f"the first's values, rounded{where}"
    if one.max_difference == 0.0:
        return one.name, shape, dtype, f"same values{where}"
    values = f"max |difference| {_number(one.max_difference)}, relative {_number(one.relative)}"
    return one.name, shape, dtype, values + where


def _table(rows: Sequence[tuple[str, ...]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} B"


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.3g}"
