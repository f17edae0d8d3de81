"""Writing GGUF files tensor by tensor, in any order, and reading them back.

A GGUF file lists all names, shapes and types before the first value, so a file can be laid out from shapes alone; each
tensor is then written to its place as it comes. Memory holds one tensor at a time, however large the model.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch

from llava_ft.convert.gguf_tensors import DTYPES, GgufTensor, restore_rows, rotate_rows
from llava_ft.errors import CheckpointError, RunError, UserError


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


class GgufWriter:
    """A GGUF file that is laid out and waits for its tensors.

    Args:
        file: The open file.
        offsets: Place of each tensor's data, in bytes from the beginning of the file.
    """

    def __init__(self, file: BinaryIO, offsets: Mapping[str, int]):
        self._file = file
        self._missing = dict(offsets)

    def put(self, tensor: GgufTensor, value: torch.Tensor) -> torch.Tensor:
        """Round a tensor once to the type it has in the file and write it to its place.

        Args:
            tensor: What it is there.
            value: Its value in float32, rows as in PyTorch.

        Returns:
            The rounded value.

        Raises:
            CheckpointError: The type cannot hold the value.
        """
        if tuple(value.shape) != tensor.shape:
            raise CheckpointError(
                f"{tensor.native} is {tuple(value.shape)}, but was announced as {tensor.shape}. Are the files of this "
                "model from different models?"
            )
        rounded = _round_once(value, tensor)
        self._file.seek(self._missing.pop(tensor.name))
        data = rotate_rows(rounded, tensor.num_heads).contiguous()
        self._file.write(data.view(-1).view(torch.uint8).numpy().data)
        return rounded

    def check_complete(self) -> None:
        """Check that every tensor was written.

        Raises:
            RunError: One was not.
        """
        if self._missing:
            raise RunError(
                f"{len(self._missing)} tensors were announced but never came, such as {next(iter(self._missing))}. "
                "Nothing was written; this is a defect of the program."
            )


def _round_once(value: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
    rounded = value.to(tensor.dtype)
    if tensor.dtype == torch.float16 and not torch.isfinite(rounded).all() and torch.isfinite(value).all():
        raise CheckpointError(
            f"{tensor.native} holds {value.abs().max().item():.6g}, and float16 ends at 65504. Export with --dtype "
            "bfloat16 or float32."
        )
    return rounded


@contextmanager
def create_gguf(path: Path, architecture: str, fields: Fields, tensors: Sequence[GgufTensor]) -> Generator[GgufWriter]:
    """Write a file's description and wait for its tensors; they may come in any order.

    Args:
        path: The file.
        architecture: `llama` or `clip`.
        fields: What describes the model.
        tensors: Every tensor of the file, in its order.

    Yields:
        The place to put tensors to. When the block ends all of them must have been put.
    """
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in fields.items():
        element = None if field.element is None else gguf.GGUFValueType[field.element]
        writer.add_key_value(key, field.value, gguf.GGUFValueType[field.kind], sub_type=element)
    for tensor in tensors:
        raw_dtype = types[DTYPES[tensor.dtype]]
        writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.num_bytes, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    position = _padded(path.stat().st_size, writer.data_alignment)
    offsets: dict[str, int] = {}
    for tensor in tensors:
        offsets[tensor.name] = position
        position = _padded(position + tensor.num_bytes, writer.data_alignment)
    with path.open("r+b") as file:
        file.truncate(position)
        waiting = GgufWriter(file, offsets)
        yield waiting
    waiting.check_complete()


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


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
