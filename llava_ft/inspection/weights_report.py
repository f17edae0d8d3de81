"""`llava-ft inspect weights`: what weight files and directories hold, and how two of them differ."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from llava_ft.inspection.weight_facts import fold
from llava_ft.inspection.weights import Description, describe
from llava_ft.inspection.weights_difference import Difference, TensorDifference, compare
from llava_ft.terminal import columns, visible

_MOST_LINES = 8

Row = tuple[str, ...]


def run_inspect_weights(
    paths: Sequence[Path], output: TextIO, *, as_json: bool = False, all_keys: bool = False
) -> bool:
    """Describe a path, or compare two.

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
    lines = [f"{found.path}: {found.what}", *_lines_of_problems(found)]
    lines += [f"note: {text}" for text in found.notes]
    for one in found.inside:
        lines += [f"  {one.path.name}: {one.what}", *(f"    {text}" for text in _lines_of_problems(one))]
    if len(found.files) > 1 or (found.files and found.path.is_dir()):
        rows: list[Row] = []
        for file in found.files:
            parts = ", ".join(dict.fromkeys(tensor.part for tensor in file.tensors)) or "nothing that can be read"
            parts = parts if file.path.name in found.read else f"not read ({parts})"
            rows.append((file.path.name, _size(file.num_bytes), f"{len(file.tensors)} tensors", parts))
        lines += ["", *columns(rows, right=(1, 2))]
    if found.parts:
        rows = [("part", "tensors", "values", "size", "type", "shape", "names")]
        for part in found.parts:
            first = (part.part, f"{part.num_tensors}", f"{part.num_values:,}", _size(part.num_bytes))
            for number, one in enumerate(part.names):
                rows.append((*(("",) * 4 if number else first), one.dtype, _shape(one.shape), one.names))
        num_values, num_bytes = (sum(p.num_values for p in found.parts), sum(p.num_bytes for p in found.parts))
        rows.append(("all", f"{len(found.tensors)}", f"{num_values:,}", _size(num_bytes), "", "", ""))
        lines += ["", *columns(rows, right=(1, 2, 3))]
    if all_keys:
        rows = [(t.key, t.dtype, _shape(t.shape), _size(t.num_bytes), t.file) for t in found.tensors]
        lines += ["", *columns(rows, right=(3,))]
    return lines


def _lines_of_problems(found: Description) -> list[str]:
    lines: list[str] = []
    if (needs := found.needs) is not None:
        where = "" if needs.is_here else " (no directory here)"
        text = f"needs the base {needs.base}{where}" if needs.base else "needs a base that no file names"
        sizes = [f"{needs.hidden_size} wide"] if needs.hidden_size else []
        sizes += [f"{needs.num_layers} layers or more"] if needs.num_layers else []
        text += f", a language model {', '.join(sizes)}" if sizes else ""
        lines.append(text + (f", {needs.fingerprint}." if needs.fingerprint else "."))
    lines += [f"missing: {text}" for text in found.missing]
    return lines + [f"damaged: {text}" for text in found.damaged]


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
        if not tensors:
            continue
        lines.append(f"{label}: {len(tensors)} tensors, {_size(sum(t.num_bytes for t in tensors))}")
        if all_keys:
            lines += [f"  {tensor.name}" for tensor in tensors]
            continue
        folds = fold(tensors)
        lines += [f"  {one.names}  {_shape(one.shape)}" for one in folds[:_MOST_LINES]]
        lines += [f"  and {len(folds) - _MOST_LINES} more kinds"] if len(folds) > _MOST_LINES else []
    if any(part.num_equal < part.num_common for part in found.parts):
        rows: list[Row] = [("part", "both", "equal", "max |difference|", "relative", "largest in")]
        for part in found.parts:
            numbers = (_number(part.max_difference), _number(part.relative)) if part.worst else ("", "")
            rows.append((part.part, f"{part.num_common}", f"{part.num_equal}", *numbers, part.worst))
        lines += ["", *columns(rows, right=(1, 2))]
    # First those whose shape or type differs, and then those whose values differ most.
    by_size = sorted(
        found.different, key=lambda d: (len(set(d.shapes)) == 1, len(set(d.dtypes)) == 1, -(d.relative or 0))
    )
    shown = found.different if all_keys else by_size[:_MOST_LINES]
    if shown:
        lines += ["", *columns([_tensor_row(one) for one in shown])]
        if len(shown) < len(found.different):
            lines.append(f"and {len(found.different) - len(shown)} more, which --keys lists")
    return lines


def _tensor_row(one: TensorDifference) -> Row:
    shape = " / ".join(dict.fromkeys(_shape(shape) for shape in one.shapes))
    dtype = " / ".join(dict.fromkeys(one.dtypes))
    if one.max_difference is None or one.relative is None:
        values = "other shape"
    elif one.is_rounded:
        values = "the first's values, rounded"
    elif one.max_difference == 0.0:
        values = "same values"
    else:
        values = f"max |difference| {_number(one.max_difference)}, relative {_number(one.relative)}"
    return one.name, shape, dtype, values + (f" in the {one.num_rows:,} rows of both" if one.num_rows else "")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} B"


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.3g}"
