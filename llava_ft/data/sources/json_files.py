"""Records of a `.json` file (one list) or a `.jsonl` file (one record a line), in bounded memory.

A first pass over the file checks that all of it is JSON and notes at which byte each record starts. After it any
process can read any part of the file alone. No pass holds more than a few megabytes, or the longest record.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.index_files import Array, map_array, note_long_search, prepare_arrays
from llava_ft.data.sources.json_scan import decode_value, scan_lines, scan_list
from llava_ft.errors import UserError

_LINES_SUFFIXES: Final = (".jsonl", ".ndjson")
_BLOCK_BYTES: Final = 1 << 22
_INDEX_VERSION: Final = 1


class JsonSource(RecordSource):
    """One file of records. A suffix other than `.jsonl` and `.ndjson` means one JSON list."""

    def __init__(self, path: str | Path, image_folder: str | None = None):
        super().__init__(str(path), image_folder)
        self.path = Path(path)
        self.has_lines = self.path.suffix.lower() in _LINES_SUFFIXES
        self._fingerprint: str | None = None
        self._state: tuple[int, ...] = ()
        self._index: Path | None = None
        self._offsets: Array | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the mapped offsets: a copy in another process maps them itself."""
        return self.__dict__ | {"_offsets": None}

    def fingerprint(self) -> str:
        """Give the hash of the file's content."""
        if self._fingerprint is None:
            with self._open() as file:
                self._state = _state_of(file)
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def prepare(self, cache_dir: Path) -> None:
        """Check that the whole file is JSON and note where its records start."""
        kind = "lines" if self.has_lines else "list"
        self._index = Path(cache_dir) / "records" / f"json-{kind}-{_INDEX_VERSION}-{self.fingerprint()}"
        prepare_arrays(self._index, lambda: {"offsets": self._scan()})

    def __len__(self) -> int:
        return len(self._mapped_offsets()) - 1

    def read(self, start: int, stop: int) -> Iterator[object]:
        """Decode a range of records."""
        offsets = self._mapped_offsets()
        with self._open_unchanged() as file:
            while start < stop:
                first = int(offsets[start])
                end = int(np.searchsorted(offsets, first + _BLOCK_BYTES, side="right")) - 1
                end = min(max(end, start + 1), stop)
                file.seek(first)
                block = file.read(int(offsets[end]) - first)
                bounds = (offsets[start : end + 1] - first).tolist()
                for left, right in pairwise(bounds):
                    yield decode_value(block[left:right])
                start = end

    def _scan(self) -> Array:
        with self._open_unchanged() as file:
            note_long_search(self.name, self._state[0])
            offsets = scan_lines(file, self.path) if self.has_lines else scan_list(file, self.path)
            self._refuse_changes(file)
        if len(offsets) == 1:
            raise UserError(f"Data file {self.path} holds no record. It needs at least one.")
        return np.asarray(offsets, dtype=np.int64)

    def _mapped_offsets(self) -> Array:
        if self._offsets is None:
            assert self._index is not None, "the source is not prepared"
            self._offsets = map_array(self._index, "offsets")
        return self._offsets

    def _open(self) -> BufferedReader:
        try:
            if self.path.is_dir():
                raise UserError(
                    f"Data file {self.path} is a folder. Give the .json or .jsonl file itself (--data_path)."
                )
            if self.path.exists() and not self.path.is_file():
                raise UserError(
                    f"Data file {self.path} is a pipe or a device, which can be read only once. "
                    "Write the records to a file."
                )
            return self.path.open("rb")
        except FileNotFoundError:
            raise UserError(f"Data file {self.path} does not exist. Check --data_path.") from None
        except OSError as error:
            raise UserError(f"Data file {self.path} cannot be read: {error.strerror}.") from None

    def _open_unchanged(self) -> BufferedReader:
        file = self._open()
        try:
            self._refuse_changes(file)
        except UserError:
            file.close()
            raise
        return file

    def _refuse_changes(self, file: BufferedReader) -> None:
        if _state_of(file) != self._state:
            raise UserError(
                f"Data file {self.path} changed after it was first read. Leave it as it is during a run, "
                "and start again."
            )


def _state_of(file: BufferedReader) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    assert stat.S_ISREG(status.st_mode)
    return status.st_size, status.st_mtime_ns
