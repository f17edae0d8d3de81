"""Writing GGUF files tensor by tensor, and reading them back, with the `gguf` package of llama.cpp.

A GGUF file lists all names, shapes and types before the first value, so it is announced from shapes alone and each
tensor follows in its turn. Memory holds one tensor at a time, however large the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llava_ft.convert.gguf_tensors import DTYPES, GgufTensor, restore_rows, rotate_rows
from llava_ft.errors import CheckpointError, UserError


@dataclass(frozen=True)
class Field:
    """A value in a GGUF file's description.

    Attributes:
        kind: GGUF's name of its type: UINT32, INT32, FLOAT32, BOOL, STRING or ARRAY.
        value: The value.
        element: Type of the elements of an ARRAY.
    """

    kind: str
    value: Any
    element: str | None = None


Fields = dict[str, Field]


def number(value: int) -> Field:
    """A count or an id."""
    return Field("UINT32", int(value))


def real(value: float) -> Field:
    """A number in float32."""
    return Field("FLOAT32", float(value))


def flag(value: bool) -> Field:
    """A truth value."""
    return Field("BOOL", bool(value))


def text(value: str) -> Field:
    """A text, which must not be empty."""
    assert value
    return Field("STRING", value)


def array(element: str, values: Sequence[Any]) -> Field:
    """A list, which must not be empty."""
    assert len(values) > 0
    return Field("ARRAY", list(values), element)


def import_gguf() -> ModuleType:
    """Import the `gguf` package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"Exporting to GGUF needs the package gguf, which cannot be imported ({error}). Install it with "
            "pip install 'llava-ft[gguf]'."
        ) from None
    return gguf


def round_once(value: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
    """Round a value in float32 to the type that it has in a file.

    Raises:
        CheckpointError: The type cannot hold the value.
    """
    rounded = value.to(tensor.dtype)
    if tensor.dtype == torch.float16 and not torch.isfinite(rounded).all() and torch.isfinite(value).all():
        raise CheckpointError(
            f"{tensor.native} holds {value.abs().max().item():.6g}, and float16 ends at 65504. Export with --dtype "
            "bfloat16 or float32."
        )
    return rounded


def write_gguf(
    path: Path,
    architecture: str,
    fields: Fields,
    tensors: Sequence[GgufTensor],
    value_of: Callable[[GgufTensor], torch.Tensor],
) -> None:
    """Write a file. Memory holds one tensor at a time.

    Args:
        path: The file.
        architecture: `llama` or `clip`.
        fields: What describes the model.
        tensors: Every tensor of the file, in its order.
        value_of: Gives the value of each in turn, in the type that it has in the file, rows as in PyTorch.
    """
    gguf = import_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in fields.items():
        element = None if field.element is None else gguf.GGUFValueType[field.element]
        writer.add_key_value(key, field.value, gguf.GGUFValueType[field.kind], sub_type=element)
    for tensor in tensors:
        raw_dtype = gguf.GGMLQuantizationType[DTYPES[tensor.dtype]]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.num_bytes, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        # As bytes: numpy has no bfloat16.
        data = rotate_rows(value_of(tensor), tensor.num_heads).contiguous()
        writer.write_tensor_data(data.view(-1).view(torch.uint8).numpy())
    writer.close()


class GgufContent:
    """A GGUF file opened for reading; values are mapped, not loaded.

    Args:
        path: The file.

    Attributes:
        fields: Value of each key of its description.
        names: Names of its tensors.
    """

    def __init__(self, path: Path):
        self._reader = import_gguf().GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.fields: dict[str, Any] = {key: field.contents() for key, field in self._reader.fields.items()}
        self.names = list(self._tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the file."""
        kind = self._tensors[name].tensor_type.name
        return next(dtype for dtype, known in DTYPES.items() if known == kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as PyTorch has it."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str, num_heads: int = 0) -> torch.Tensor:
        """Read one tensor, its rows as PyTorch has them.

        Args:
            name: Its name in the file.
            num_heads: See `restore_rows`.
        """
        raw = torch.frombuffer(bytearray(self._tensors[name].data.tobytes()), dtype=torch.uint8)
        return restore_rows(raw.view(self.dtype(name)).view(self.shape(name)), num_heads)
