"""What every source of records can do: name its state, be prepared once, and give records and images by number.

A source yields raw records, as they are written; `llava_ft.data.records.parse_record` checks them. It is small when
pickled, so that processes which read different parts of it each get their own copy.
"""

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from llava_ft.data.preparation.build_once import NotUsableError, open_or_build
from llava_ft.data.records import DataUri, EmbeddedImage, decode_content, embedded_name, image_values
from llava_ft.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_SPLIT: Final = "train"
_BYTES_WORTH_A_NOTE: Final = 1 << 28

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows that are taken of each source, in the order of the sources."""

    train: list[Array]  # ascending; a row that is taken several times stands there several times
    held_out: list[Array]  # ascending; none of them is in `train`


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
        """Give a short text that changes whenever a record or an image in the source may have changed."""

    @abstractmethod
    def prepare(self, cache_dir: Path) -> None:
        """Build what reading by number needs, once, and keep it in `cache_dir` under the fingerprint.

        Raises:
            UserError: The source is missing, damaged or empty, as `read` and `image_bytes` find it changed since.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of records. Only known after `prepare`."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[object]:
        """Give the raw records `start` to `stop - 1` in order, with only a few of them in memory at a time."""

    def image_bytes(self, index: int, position: int) -> bytes:
        """Give the file content of an image that the source holds itself; both numbers are those of `embedded_name`.

        Raises:
            ImageError: The image is damaged or not there any more.
        """
        (record,) = self.read(index, index + 1)
        value = image_values(record, index)[position]
        assert not isinstance(value, str), "an image given by path is not in the source"
        return self._image_content(index, value, f"{embedded_name(index, position)} of {self.name}")

    def _image_content(self, index: int, value: EmbeddedImage | bytes | DataUri, name: str) -> bytes:
        """Give the content of a record's image. A source whose `read` leaves images where they are reads those here."""
        assert not isinstance(value, EmbeddedImage), "this source gives its images with the records"
        return decode_content(value, name)


class IndexedSource(RecordSource):
    """Files that are searched once for their records; where these are is kept in arrays on disk, mapped into memory."""

    index_kind: str  # begins the name of the index; to be changed with its content

    def __init__(self, name: str, files: Sequence[Path], image_folder: str | None = None):
        super().__init__(name, image_folder)
        self.files = list(files)
        self._states: dict[int, tuple[int, int]] = {}  # of each file when it was first looked at
        self._index: Path | None = None
        self._arrays: dict[str, Array] = {}

    def __getstate__(self) -> dict[str, object]:
        # A copy in another process maps the arrays itself.
        return self.__dict__ | {"_arrays": {}}

    @abstractmethod
    def _find_records(self) -> Mapping[str, Array]:
        """Search the files; give arrays by name, none of them empty.

        One is `file_ends`, `(F + 1,)` int64: the records of each file start and end there.
        """

    @abstractmethod
    def _read_file(self, place: int, file: BinaryIO, records: range) -> Iterator[object]:
        """Give some of the records of the file at a place among the files."""

    def prepare(self, cache_dir: Path) -> None:
        """Find the records, unless that was done before. One process does it, others wait."""
        for place, path in enumerate(self.files):
            self._states.setdefault(place, _state_of(path))
        self._index = Path(cache_dir) / "records" / f"{self.index_kind}-{self.fingerprint()}"

        def write(unfinished: Path) -> None:
            num_bytes = sum(size for size, _ in self._states.values())
            if num_bytes >= _BYTES_WORTH_A_NOTE:
                logger.info("Finding the records of %s (%.1f GB), once.", self.name, num_bytes / 1e9)
            for name, array in self._find_records().items():
                np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
            for place in range(len(self.files)):
                self._open(place).close()  # It may have changed meanwhile.

        def map_all(index: Path) -> int:
            try:
                return len([_map(file) for file in index.glob("*.npy")])
            except (OSError, ValueError) as error:
                raise NotUsableError(str(error)) from error

        open_or_build(self._index, map_all, write)

    def __len__(self) -> int:
        return int(self._array("file_ends")[-1])

    def read(self, start: int, stop: int) -> Iterator[object]:
        """Read a range of records across files."""
        while start < stop:
            place = self._file_of(start)
            last = min(stop, int(self._array("file_ends")[place + 1]))
            with self._open(place) as file:
                yield from self._read_file(place, file, range(start, last))
            start = last

    def _file_of(self, index: int) -> int:
        return int(np.searchsorted(self._array("file_ends"), index, side="right")) - 1

    def _open(self, place: int) -> BufferedReader:
        """Open a file, and refuse it if it is not as it was when it was first looked at."""
        path = self.files[place]
        try:
            if path.exists() and not path.is_file():
                raise UserError(
                    f"Data file {path} is a pipe or a device, which can be read only once. Write the records to a file."
                )
            file = path.open("rb")
        except OSError as error:
            raise UserError(f"Data file {path} cannot be read: {error.strerror}. Check --data_path.") from None
        status = os.fstat(file.fileno())
        state = (status.st_size, status.st_mtime_ns)
        if self._states.setdefault(place, state) != state:
            file.close()
            raise UserError(
                f"Data file {path} changed after it was first read. Leave it as it is during a run, and start again."
            )
        return file

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


def _map(file: Path) -> Array:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _state_of(file: Path) -> tuple[int, int]:
    """Give size and time of change of a file."""
    try:
        status = file.stat()
    except OSError as error:
        raise UserError(f"Data file {file} cannot be read: {error.strerror}. Check --data_path.") from None
    return status.st_size, status.st_mtime_ns


def choose_split(splits: Sequence[str], wanted: str | None, name: str) -> str:
    """Choose the split to be read: the wanted one; when none is asked for, the only one, else `train`.

    Raises:
        UserError: It is not there; none is asked for, and of several none is called `train`.
    """
    split = wanted or (splits[0] if len(splits) == 1 else DEFAULT_SPLIT)
    if split in splits:
        return split
    if wanted:
        raise UserError(f"Data set {name} has no split {split!r}. There is: {', '.join(splits)}.")
    raise UserError(f"Data set {name} has the splits {', '.join(splits)}. Name one, as in {name}:{splits[0]}.")


def fingerprint_files(files: Sequence[Path]) -> str:
    """Give a hash of the names, sizes and times of files, whose content is too much to be read for it.

    Raises:
        UserError: One of them is not there.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        num_bytes, mtime_ns = _state_of(file)
        digest.update(f"{file.resolve()}\0{num_bytes}\0{mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
