"""Which content an image file has: a digest of all its bytes, remembered between runs.

A digest takes reading the file. It is remembered for the file's path, size and times of change, as Git does for a
working tree, so a second start only asks the file system for these. Renamed and copied files are read again and have
the digest they had.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from llava_ft.data.entry_log import CHECKSUM, DIGEST, Array, EntryReader, EntryWriter, find_digests, new_name
from llava_ft.errors import RunError

NO_CONTENT: Final = bytes(DIGEST.itemsize)
"""Stands for the digest of a file that cannot be read."""

_ENTRY: Final = np.dtype([("state", DIGEST), ("content", DIGEST), (CHECKSUM, "<u4")])
_OWNER: Final = b"image contents"
_PATTERN: Final = "contents-*.idx"
_SETTLED_SECONDS: Final = 2.0
"""A file changed more recently may be changed again within the same tick of the file system's clock."""
_NUM_THREADS: Final = 16
_TRIES: Final = 3


class ContentTable:
    """Digests of files by their state, kept in a folder that several processes may use at once.

    Args:
        folder: The folder; made when something is added.

    Raises:
        UserError: A file in it is of another kind or version.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._indexes: list[EntryReader] = []
        self._entries: Array = np.empty(0, dtype=_ENTRY)
        self._writer: EntryWriter | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look for what other processes have added."""
        known = {index.path for index in self._indexes}
        fresh = (path for path in sorted(self._folder.glob(_PATTERN)) if path not in known)
        self._indexes += [EntryReader(path, _ENTRY, _OWNER) for path in fresh]
        every = np.concatenate([self._entries, *(index.read_new() for index in self._indexes)])
        self._entries = every[np.unique(every["state"], return_index=True)[1]]

    def find(self, states: Array) -> Array:
        """Find digests by state: `(S,)` to `(S,)`, `NO_CONTENT` where none is known."""
        places = find_digests(self._entries["state"], states)
        contents = np.zeros(len(states), dtype=DIGEST)
        contents[places >= 0] = self._entries["content"][places[places >= 0]]
        return contents

    def add(self, states: Array, contents: Array) -> None:
        """Remember digests.

        Raises:
            RunError: They cannot be written.
        """
        entries = np.zeros(len(states), dtype=_ENTRY)
        entries["state"], entries["content"] = states, contents
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / _PATTERN.replace("*", new_name())
                self._writer = EntryWriter(path, _ENTRY, _OWNER)
            self._writer.append(entries)
        except OSError as error:
            raise RunError(
                f"The digests of images could not be written into {self._folder}: {error.strerror or error}. Free some "
                "space, or name another directory with --vision_cache."
            ) from error


def digest_of(data: bytes) -> bytes:
    """Return a digest of 16 bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST.itemsize).digest()


def file_state(path: str) -> bytes:
    """Return a digest of where a file is, its size and when it was changed; `NO_CONTENT` if it cannot be reached."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return NO_CONTENT
    values = (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return digest_of("\0".join(map(str, values)).encode(errors="surrogateescape"))


def file_content(path: str) -> tuple[bytes, bytes]:
    """Read a file.

    Returns:
        Its state and the digest of its content; both `NO_CONTENT` if it cannot be read or does not stop changing.
    """
    try:
        for _ in range(_TRIES):
            age = time.time() - os.stat(path).st_ctime
            if 0 <= age < _SETTLED_SECONDS:
                time.sleep(_SETTLED_SECONDS - age)
            state = file_state(path)
            content = digest_of(Path(path).read_bytes())
            if state == file_state(path):
                return state, content
    except (OSError, ValueError):
        pass
    return NO_CONTENT, NO_CONTENT


def file_states(paths: Sequence[str]) -> Array:
    """Ask for the states of many files at once, in threads: `(P,)`."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return _as_array(list(pool.map(file_state, paths, chunksize=256)))


def file_contents(paths: Sequence[str], *, group: int = 1024) -> Iterator[tuple[Array, Array]]:
    """Read many files in threads; yields states and digests of one group of files after the other."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(paths), group):
            pairs = list(pool.map(file_content, paths[start : start + group]))
            yield _as_array([state for state, _ in pairs]), _as_array([content for _, content in pairs])


def _as_array(digests: Sequence[bytes]) -> np.ndarray[Any, np.dtype[Any]]:
    return np.frombuffer(b"".join(digests), dtype=DIGEST)
