"""What every source of records can do: name its state, be prepared once, and give records and images by number.

A source yields raw records, as they are written; `llava_ft.data.records.parse_record` checks them. It is small when
pickled, so that processes which read different parts of it each get their own copy.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np

from llava_ft.data.preparation.build_once import NotUsableError, open_or_build
from llava_ft.data.records import DataUri, EmbeddedImage, decode_content, embedded_name, image_values
from llava_ft.errors import UserError

logger = logging.getLogger(__name__)

_BYTES_WORTH_A_NOTE: Final = 1 << 28

Array = np.ndarray[Any, np.dtype[Any]]


class RecordSource(ABC):
    """Records in a fixed order, with the images that are stored beside them.

    Attributes:
        name: Path or name of the data set, for messages.
        image_folder: Folder of the images that the records name by path; None means the run's.
    """

    name: str
    image_folder: str | None

    def __init__(self, name: str, image_folder: str | None = None):
        self.name = name
        self.image_folder = image_folder

    @abstractmethod
    def fingerprint(self) -> str:
        """Give a short text that changes whenever a record or an image in the source may have changed.

        Raises:
            UserError: The source is missing or cannot be read.
        """

    @abstractmethod
    def prepare(self, cache_dir: Path) -> None:
        """Build what reading by number needs, once, and keep it in `cache_dir` under the fingerprint.

        Raises:
            UserError: The source is missing, damaged or empty.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of records. Only known after `prepare`."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[object]:
        """Give the raw records `start` to `stop - 1` in order, with only a few of them in memory at a time.

        Raises:
            UserError: The source changed since it was prepared.
        """

    def image_bytes(self, index: int, position: int) -> bytes:
        """Give the file content of an image that the source holds itself; both numbers are those of `embedded_name`.

        Raises:
            ImageError: The image is damaged or not there any more.
            UserError: The source changed since it was prepared.
        """
        (record,) = self.read(index, index + 1)
        value = image_values(record, index)[position]
        assert not isinstance(value, str), "an image given by path is not in the source"
        name = f"{embedded_name(index, position)} of {self.name}"
        return self._image_content(index, value, name)

    def _image_content(self, index: int, value: EmbeddedImage | bytes | DataUri, name: str) -> bytes:
        """Give the content of a record's image. A source whose `read` leaves images where they are reads those here."""
        assert not isinstance(value, EmbeddedImage), "this source gives its images with the records"
        return decode_content(value, name)


class ChainSource(RecordSource):
    """The records of several sources, each in turn, numbered through."""

    def __init__(self, name: str, sources: Sequence[RecordSource], image_folder: str | None = None):
        super().__init__(name, image_folder)
        self.sources = list(sources)
        self._starts: list[int] = []

    def fingerprint(self) -> str:
        """Give a hash of the sources' fingerprints, in order."""
        parts = "\n".join(source.fingerprint() for source in self.sources)
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def prepare(self, cache_dir: Path) -> None:
        """Prepare each source."""
        for source in self.sources:
            source.prepare(cache_dir)
        self._starts = list(accumulate(map(len, self.sources), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Iterator[object]:
        """Read a range across sources."""
        while start < stop:
            source, first = self._find(start)
            last = min(len(source), first + stop - start)
            yield from source.read(first, last)
            start += last - first

    def image_bytes(self, index: int, position: int) -> bytes:
        """Read an image from the source that holds it."""
        source, number = self._find(index)
        return source.image_bytes(number, position)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        place = bisect_right(self._starts, index) - 1
        return self.sources[place], index - self._starts[place]


class IndexedSource(RecordSource):
    """A source whose files are searched once for their records.

    Where these are is kept in arrays on disk, which any number of processes map into memory.
    """

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


def fingerprint_files(files: Sequence[Path]) -> str:
    """Give a hash of the names, sizes and times of files, whose content is too much to be read for it.

    Raises:
        UserError: One of them is not there.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"Data file {file} cannot be read: {error.strerror}. Check --data_path.") from None
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
