"""Sources whose files are searched once for their records: where these are is kept in arrays on disk.

The arrays are mapped into memory afterwards, by any number of processes.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from llava_ft.data.preparation.build_once import NotUsableError, open_or_build
from llava_ft.data.sources.base import RecordSource
from llava_ft.errors import UserError

logger = logging.getLogger(__name__)

_BYTES_WORTH_A_NOTE: Final = 1 << 28

Array = np.ndarray[Any, np.dtype[Any]]


class IndexedSource(RecordSource):
    """A source that knows where its records are."""

    index_kind: str
    """Begins the name of the index; to be changed with its content."""

    def __init__(self, name: str, image_folder: str | None = None):
        super().__init__(name, image_folder)
        self._index: Path | None = None
        self._arrays: dict[str, Array] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave out the mapped arrays: a copy in another process maps them itself."""
        return self.__dict__ | {"_arrays": {}}

    @abstractmethod
    def _find_records(self) -> Mapping[str, Array]:
        """Search the files; give arrays by name, none of them empty. Errors leave nothing behind."""

    def prepare(self, cache_dir: Path) -> None:
        """Find the records, unless that was done before. One process does it, others wait."""
        self._index = Path(cache_dir) / "records" / f"{self.index_kind}-{self.fingerprint()}"

        def write(unfinished: Path) -> None:
            for name, array in self._find_records().items():
                np.save(unfinished / f"{name}.npy", array, allow_pickle=False)

        def map_all(index: Path) -> int:
            try:
                return len([_map(file) for file in index.glob("*.npy")])
            except (OSError, ValueError) as error:
                raise NotUsableError(str(error)) from error

        open_or_build(self._index, map_all, write)

    def _array(self, name: str) -> Array:
        if name not in self._arrays:
            assert self._index is not None, "the source is not prepared"
            try:
                self._arrays[name] = _map(self._index / f"{name}.npy")
            except (OSError, ValueError) as error:
                raise UserError(
                    f"The index of the records in {self._index} is missing or damaged ({error}). Start again: it is "
                    "made anew."
                ) from None
        return self._arrays[name]

    def _note_long_search(self, num_bytes: int) -> None:
        """Say that the records are being looked for, where this takes more than a moment."""
        if num_bytes >= _BYTES_WORTH_A_NOTE:
            logger.info("Finding the records of %s (%.1f GB), once.", self.name, num_bytes / 1e9)


def _map(file: Path) -> Array:
    return np.load(file, mmap_mode="r", allow_pickle=False)
