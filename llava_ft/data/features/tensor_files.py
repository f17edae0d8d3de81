"""Folders of safetensors files that are written whole and never changed: what the vision cache consists of.

A file is written under a hidden name, forced to disk and renamed: it is complete or not there, whenever a process or a
machine stops, and any number of processes and machines can write into one folder without locks. Each tensor's checksum
is in the file's metadata, with the `owner` of the folder, and is compared when the tensor is read.

Embedded stores were tried. LMDB maps its file without checksums: on a truncated file, and on one with a flipped byte in
a page of its tree, a read ends the process with SIGBUS. SQLite needs file locks that work on every machine of a run.
"""

import os
import secrets
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

SUFFIX: Final = ".safetensors"
_OWNER: Final = "owner"


class DamagedShardError(Exception):
    """A file is not as it was written, or was not written by this program."""


def write_shard(folder: Path, prefix: str, tensors: Mapping[str, torch.Tensor], owner: str) -> Path:
    """Write tensors, contiguous and on the CPU, into a new file of a folder, which is made if it is not there.

    The file's name begins with `prefix`; `owner` says what the folder's tensors belong to. An `OSError` leaves nothing.
    """
    checksums = {name: _checksum(name, tensor) for name, tensor in tensors.items()}
    path = folder / f"{prefix}-{secrets.token_hex(8)}{SUFFIX}"
    staged = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged.open("xb") as file:
            file.write(save(dict(tensors), {**checksums, _OWNER: owner}))
            file.flush()
            os.fsync(file.fileno())
        staged.rename(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    return path


def list_shards(folder: Path, prefix: str) -> list[Path]:
    """Return the complete files of a folder, in the order of their names; none if there is no folder."""
    return sorted(folder.glob(f"{prefix}-*{SUFFIX}"))


def shard_names(path: Path, owner: str) -> list[str]:
    """Return the names of a file's tensors.

    Raises:
        DamagedShardError: The file is truncated, damaged or belongs to something else.
    """
    with _open(path, owner) as (file, checksums):
        return [name for name in file.keys() if name in checksums]  # noqa: SIM118


def read_shard(path: Path, owner: str, names: Sequence[str]) -> list[torch.Tensor]:
    """Read tensors of a file, each as it was written. They are mapped from the file: copy them to keep them.

    Raises:
        DamagedShardError: The file was truncated, damaged or removed, or belongs to something else.
    """
    with _open(path, owner) as (file, checksums):
        tensors = {name: file.get_tensor(name) for name in names}
        for name, tensor in tensors.items():
            if checksums.get(name) != _checksum(name, tensor):
                raise DamagedShardError(f"{path} is damaged: the checksum of {name} is wrong")
        return [*tensors.values()]


@contextmanager
def _open(path: Path, owner: str) -> Generator[tuple[Any, dict[str, str]]]:
    try:
        with cast("Any", safe_open)(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get(_OWNER) != owner:
                raise DamagedShardError(f"{path} does not belong to its folder, or is damaged")
            yield file, metadata
    except (SafetensorError, OSError) as error:
        raise DamagedShardError(f"{path} cannot be read: {error}") from None


def _checksum(name: str, tensor: torch.Tensor) -> str:
    """Return the CRC-32 of a tensor with its name, type and shape, which safetensors would read damaged as well."""
    described = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, described):08x}"
