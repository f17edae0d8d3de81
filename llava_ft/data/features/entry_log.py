"""Append-only files of fixed-size entries, each with a checksum of its own.

They are the indexes of the vision cache. A process that writes makes a file of its own and only ever appends to it, so
any number of processes can write into one directory without waiting for each other. Whatever moment a process dies at,
an entry is either whole, with a checksum that is right, or does not count.
"""

import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from llava_ft.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

VERSION: Final = 1
"""Version of the files; a program reads no other."""

CHECKSUM: Final = "checksum"
"""Last field of every entry: the CRC-32 of the bytes before it."""

DIGEST: Final = np.dtype("V16")
"""A BLAKE2b digest of 16 bytes, sorted and searched byte by byte."""

_MAGIC: Final = b"llava_ft"
_HEADER: Final = struct.Struct("<8sII32s12xI")
_FILE_MODE: Final = 0o644


class EntryWriter:
    """Appends entries to a new file.

    Args:
        path: The file; it must not exist.
        dtype: Of an entry, `CHECKSUM` being its last field.
        owner: Up to 32 bytes that say what the entries belong to.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], owner: bytes):
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE)
        self._length = 0
        self._write(_header(dtype, owner))

    def append(self, entries: Array) -> None:
        """Put entries on disk; their checksums are filled in.

        Raises:
            OSError: They could not be written. None of them counts then.
        """
        data = memoryview(entries.tobytes())
        size = entries.dtype.itemsize
        end = size - 4
        entries[CHECKSUM] = [zlib.crc32(data[start : start + end]) for start in range(0, len(data), size)]
        self._write(entries.tobytes())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._file, memoryview(data), self._length)
            os.fsync(self._file)
        except OSError:
            cut_back(self._file, self._length)
            raise
        self._length += len(data)


class EntryReader:
    """Reads the entries of a file that another process may be appending to.

    Attributes:
        num_damaged: Entries read so far whose checksum is wrong; they are left out.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], owner: bytes):
        self.path = path
        self.num_damaged = 0
        self._dtype = dtype
        self._expected = _header(dtype, owner)
        self._position = 0

    def read_new(self) -> Array:
        """Read what has been appended since the last call; a last entry that is not whole waits for the next one.

        Raises:
            UserError: The file is of another kind or version, or cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                header = file.read(len(self._expected))
                if len(header) == len(self._expected):
                    self._check(header)
                file.seek(max(self._position, len(self._expected)))
                data = file.read()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}. Delete it to have it made anew.") from None
        size = self._dtype.itemsize
        data = memoryview(data)[: len(data) // size * size]
        self._position = max(self._position, len(self._expected)) + len(data)
        entries = np.frombuffer(data, dtype=self._dtype)
        right = [zlib.crc32(data[start : start + size - 4]) for start in range(0, len(data), size)]
        is_right = entries[CHECKSUM] == np.array(right, dtype=np.uint32)
        self.num_damaged += len(entries) - int(is_right.sum())
        return entries[is_right]

    def _check(self, header: bytes) -> None:
        if header == self._expected:
            return
        advice = "Delete it, or name another directory."
        magic, version = _HEADER.unpack(header)[:2]
        if magic != _MAGIC:
            raise UserError(f"{self.path} was not written by this program, or its beginning is damaged. {advice}")
        if version != VERSION:
            raise UserError(f"{self.path} has version {version}; this program reads version {VERSION}. {advice}")
        raise UserError(f"{self.path} belongs to other settings than those of its directory, or is damaged. {advice}")


def new_name() -> str:
    """Return a name for a file that no other process will choose."""
    return secrets.token_hex(8)


def write_all(file: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at a position of an open file."""
    while len(data):
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def cut_back(file: int, length: int) -> None:
    """Give back what a write that failed has taken, if the system still lets us."""
    try:
        os.ftruncate(file, length)
    except OSError:
        return  # what is left there does not count


def find_digests(digests: Array, wanted: Array) -> Array:
    """Find digests among others.

    Args:
        digests: `(N,)`, in ascending order.
        wanted: `(W,)`.

    Returns:
        `(W,)` int64: a position in `digests`, or -1.
    """
    if not len(digests):
        return np.full(len(wanted), -1, dtype=np.int64)
    places = np.minimum(np.searchsorted(digests, wanted), len(digests) - 1)
    return np.where(digests[places] == wanted, places, -1)


def _header(dtype: np.dtype[Any], owner: bytes) -> bytes:
    assert dtype.names is not None
    assert dtype.names[-1] == CHECKSUM
    assert len(owner) <= 32
    content = _HEADER.pack(_MAGIC, VERSION, dtype.itemsize, owner, 0)[:-4]
    return content + struct.pack("<I", zlib.crc32(content))
