"""From rows of an Arrow table to raw records, without reading the images in them.

Whatever is binary becomes an `EmbeddedImage` with its address in the row. Only the validity of binary values is looked
at, so that the pages of a memory-mapped file which hold images stay on disk.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import pyarrow.types  # pyright: ignore[reportMissingTypeStubs]

from llava_ft.data.records import EmbeddedImage

_Address = tuple[str | int, ...]
_Table: TypeAlias = "Any"
"""A `pyarrow.Table`; pyarrow has no types."""
_types: Any = pyarrow.types


def records_of(table: _Table) -> Iterator[dict[str, object]]:
    """Give the rows of a table as objects, column by name."""
    columns = {name: _values(table.column(name), name) for name in table.column_names}
    for row in range(table.num_rows):
        yield {name: values[row] for name, values in columns.items()}


def binary_at(table: _Table, address: _Address) -> bytes:
    """Read the binary value at the address of an `EmbeddedImage`.

    Args:
        table: One row.
        address: Column, then fields by name and items by number.
    """
    array = next(chunk for chunk in table.column(str(address[0])).chunks if len(chunk))
    for step in address[1:]:
        array = array.field(step) if isinstance(step, str) else array.flatten().slice(step, 1)
    return bytes(array[0].as_py())


def _values(column: Any, name: str) -> list[object]:
    if not _holds_binary(column.type):
        return column.to_pylist()
    return [_value(chunk, row, (name,)) for chunk in column.chunks for row in range(len(chunk))]


def _value(array: Any, row: int, address: _Address) -> object:
    one = array.slice(row, 1)
    if one.null_count:
        return None
    kind = array.type
    if _is_binary(kind):
        return EmbeddedImage(address)
    if not _holds_binary(kind):
        return one[0].as_py()
    if _types.is_struct(kind):
        return {field.name: _value(one.field(field.name), 0, (*address, field.name)) for field in kind}
    items = one.flatten()
    return [_value(items, place, (*address, place)) for place in range(len(items))]


def _is_binary(kind: Any) -> bool:
    return _types.is_binary(kind) or _types.is_large_binary(kind)


def _holds_binary(kind: Any) -> bool:
    if _types.is_struct(kind):
        return any(_holds_binary(field.type) for field in kind)
    if _types.is_list(kind) or _types.is_large_list(kind) or _types.is_fixed_size_list(kind):
        return _holds_binary(kind.value_type)
    return _is_binary(kind)
