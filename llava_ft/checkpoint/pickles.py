"""Reading pickles: nothing in them is run, and nothing is allocated that the file does not hold.

PyTorch's `weights_only=True` calls nothing outside its own list. That leaves memory: a name on the list can make a
short file take any amount (`bytearray(10**12)`), and so can an entry that is compressed, or a tensor that repeats one
value with a stride of 0. So the names in a file and its table of contents are read first and compared with what weights
need; values are mapped and not copied; and a tensor that is larger than what the file holds of it is refused before
anyone copies it.
"""

import io
import mmap
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch.serialization import safe_globals

from llava_ft.errors import CheckpointError

_TENSORS: Final = re.compile(
    r"torch(\.cuda|\.storage)?\.\w+Storage"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(Tensor|Size|device|serialization\._get_layout|bool|(b?float|u?int|complex)\w+)"
    r"|collections\.OrderedDict|(builtins|__builtin__)\.set"
)
"""What tensors and plain values are made of."""

_NUMPY: Final = re.compile(
    r"numpy\.(_core|core)\.multiarray\._reconstruct|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+DType|_codecs\.encode"
)
"""What arrays of NumPy are made of."""

_ZIP: Final = b"PK\x03\x04"
_OLD_PICKLES: Final = ("magic number", "version", "system", "content", "keys of the storages")
"""Pickles before the values in a file of PyTorch before 1.6."""


def load_pickle(path: Path, *, stand_ins: Mapping[str, Any] | None = None) -> Any:
    """Read a file of tensors and plain values that `torch.save` wrote. Tensors are views of the mapped file.

    Files of PyTorch before 1.6 cannot be mapped and are read whole. `stand_ins` are further names that it may hold,
    each with the class that is put in its place.

    Raises:
        CheckpointError: It is missing or damaged, names anything else, or claims to hold more than it does.
    """
    stand_ins = stand_ins or {}
    check_pickle(path, further=frozenset(stand_ins))
    try:
        with warnings.catch_warnings(), safe_globals([(stand_in, name) for name, stand_in in stand_ins.items()]):
            warnings.simplefilter("ignore")  # about pickle's protocol, in a file that is refused in the next line
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # as in `check_pickle`
        raise CheckpointError(damaged_file_message(path, error)) from None
    _check_sizes(path, content)
    return content


def dict_or_empty(value: Any) -> dict[str, Any]:
    """Return a dictionary that was read from a file, or an empty one for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def check_pickle(path: Path, *, further: frozenset[str] = frozenset(), with_numpy: bool = False) -> None:
    """Check that a file names nothing but what tensors and plain values are made of, and that nothing is compressed.

    Nothing is unpickled: this comes before `torch.load(weights_only=True)`, here or in a library. It may also name what
    is in `further`, and `with_numpy` what arrays are made of, which the state of random numbers holds.

    Raises:
        CheckpointError: It is missing or damaged, or names anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Copy it from the machine that wrote it.")
    try:
        names = set(_names(path))
    except Exception as error:  # what a damaged pickle raises has no bounds
        raise CheckpointError(damaged_file_message(path, error)) from None
    strange = sorted(
        name for name in names - further if not _TENSORS.fullmatch(name) and not (with_numpy and _NUMPY.fullmatch(name))
    )
    if strange:
        raise CheckpointError(
            f"{path} names {', '.join(strange[:4])}. Nothing but tensors and plain values is read from it, since a "
            "pickle can run any program. Get the file from its origin again, or save its tensors as .safetensors."
        )


def _names(path: Path) -> Iterator[str]:
    """Yield the modules and classes that a file names."""
    if _is_zip(path):
        yield from _names_in_pickle(io.BytesIO(_content_of_archive(path)))
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for part in _OLD_PICKLES:
            # These files say themselves how much memory is to be reserved.
            yield from _names_in_pickle(mapped, largest=len(mapped) if part == "content" else None)
            if mapped.tell() == len(mapped):
                return


def _names_in_pickle(stream: Any, largest: int | None = None) -> Iterator[str]:
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings = [*strings[-1:], argument]
        elif largest is not None and isinstance(argument, int) and abs(argument) > largest:
            raise ValueError(f"it claims to hold {argument:,} of something")


def _content_of_archive(path: Path) -> bytes:
    """Return the pickle in an archive, after a look at all entries: they are stored as they are, once each."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename.lower() for entry in entries]
        if archive.comment or len(set(names)) < len(names):
            raise ValueError("its table of contents is ambiguous")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed, which PyTorch does not do")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        (content,) = (entry for entry in entries if entry.filename.endswith("/data.pkl"))
        return archive.read(content)


def _check_sizes(path: Path, content: object) -> None:
    """Refuse tensors that are more than a view of the file's own bytes."""
    num_bytes = path.stat().st_size
    seen: set[int] = set()
    waiting: list[object] = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
            if not is_plain or value.is_quantized or value.device.type != "cpu":
                raise CheckpointError(
                    f"{path} holds a {value.layout} tensor of type {type(value).__name__} on {value.device}; only "
                    "plain tensors are read. Save it with dense tensors on the CPU."
                )
            held, needed = value.untyped_storage().nbytes(), value.numel() * value.itemsize
            if needed > held or held > num_bytes:
                raise CheckpointError(
                    f"{path} holds a tensor of {' x '.join(map(str, value.shape))} values, {needed:,} bytes, but only "
                    f"{min(held, num_bytes):,} bytes of it. It is damaged, or made to exhaust memory. Get it from its "
                    "origin."
                )
        elif isinstance(value, dict):
            waiting += cast("dict[object, object]", value).values()
        elif isinstance(value, list | tuple | set):
            waiting += cast("list[object]", value)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def damaged_file_message(path: Path, error: Exception) -> str:
    """Say that a weight file cannot be read, with the first line of what a library says of it."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{path} cannot be read: it is damaged or incomplete ({path.stat().st_size} bytes; {reason}). "
        "Copy or download it again."
    )
