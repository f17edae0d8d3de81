"""Records in tables: parquet and Arrow files, saved Hugging Face data sets, and data sets of the Hugging Face hub.

All become a memory-mapped `datasets.Dataset`. Arrow files are mapped where they are; parquet files are converted once.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import datasets  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.types  # pyright: ignore[reportMissingTypeStubs]
from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingTypeStubs]

from llava_ft.data.records import MEDIA_KEYS, DataUri, EmbeddedImage
from llava_ft.data.sources.base import DEFAULT_SPLIT, RecordSource, choose_split, fingerprint_files
from llava_ft.errors import UserError

_COLUMNS: Final = ("id", "image", "images", "conversations", "messages", "texts", *MEDIA_KEYS)
_ROWS_AT_ONCE: Final = 64
_PARQUET_BATCH: Final = 128
"""Rows converted at once; a row group may hold thousands of images."""
_IPC_FILE_MAGIC: Final = b"ARROW1"

_Dataset: TypeAlias = "Any"
"""A `datasets.Dataset`; neither its methods nor pyarrow are typed."""
_hf: Any = datasets
_types: Any = pyarrow.types


class TableSource(RecordSource):
    """A data set of the `datasets` library."""

    _dataset: Any = None

    @abstractmethod
    def _load(self, cache_dir: Path) -> _Dataset:
        """Open the table, memory-mapped."""

    def prepare(self, cache_dir: Path) -> None:
        """Open the table, after converting it where that has to be."""
        if self._dataset is not None:
            return
        try:
            dataset = self._load(Path(cache_dir))
        # pyarrow's errors are ValueErrors and OSErrors.
        except (OSError, ValueError, KeyError, TypeError, DatasetsError) as error:
            if isinstance(error, UserError):
                raise
            cause = error.__cause__ or error
            raise UserError(
                f"Data set {self.name} cannot be read: {cause}. Check that its files are complete and of one schema, "
                "and that there is room in the cache directory (--data_cache_dir)."
            ) from error
        if not len(dataset):
            raise UserError(f"Data set {self.name} holds no record. It needs at least one.")
        known = [name for name in dataset.column_names if name in _COLUMNS]
        self._dataset = (dataset.select_columns(known) if known else dataset).with_format("arrow")

    def __len__(self) -> int:
        return len(self._prepared())

    def read(self, start: int, stop: int) -> Iterator[object]:
        """Decode a range of rows, without their images."""
        dataset = self._prepared()
        for first in range(start, stop, _ROWS_AT_ONCE):
            yield from records_of(dataset[first : min(first + _ROWS_AT_ONCE, stop)])

    def _image_content(self, index: int, value: EmbeddedImage | bytes | DataUri, name: str) -> bytes:
        if isinstance(value, EmbeddedImage):
            return binary_at(self._prepared()[index : index + 1], value.address)
        return super()._image_content(index, value, name)

    def _prepared(self) -> _Dataset:
        assert self._dataset is not None, "the source is not prepared"
        return self._dataset


class ShardsSource(TableSource):
    """Parquet or Arrow files, one after the other: all end in `.parquet`, or none does."""

    def __init__(self, name: str, files: Sequence[Path], image_folder: str | None = None):
        super().__init__(name, image_folder)
        self.files = list(files)

    def fingerprint(self) -> str:
        """Give a hash of the names, sizes and times of the files."""
        return fingerprint_files(self.files)

    def _load(self, cache_dir: Path) -> _Dataset:
        paths = [str(file) for file in self.files]
        kind = "parquet" if self.files[0].suffix == ".parquet" else "arrow"

        def has_footer(file: Path) -> bool:  # such an Arrow file `datasets` does not map as it is
            with file.open("rb") as opened:
                return opened.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC

        if kind == "arrow" and not any(map(has_footer, self.files)):
            return _hf.concatenate_datasets([_hf.Dataset.from_file(path) for path in paths])
        options = {"batch_size": _PARQUET_BATCH} if kind == "parquet" else {}
        return _hf.load_dataset(kind, data_files=paths, split="train", cache_dir=str(cache_dir / "tables"), **options)


class SavedSource(TableSource):
    """A directory that `save_to_disk` wrote."""

    def __init__(self, folder: Path, split: str | None = None, image_folder: str | None = None):
        super().__init__(str(folder) + (f":{split}" if split else ""), image_folder)
        self.folder = folder
        self.split = split

    def fingerprint(self) -> str:
        """Give a hash of the names, sizes and times of the files of this split."""
        folder = self._split_folder()
        return fingerprint_files(sorted(file for file in folder.iterdir() if file.is_file()))

    def _split_folder(self) -> Path:
        if not (self.folder / "dataset_dict.json").is_file():
            if self.split:
                raise UserError(f"Data set {self.folder} has no splits, but {self.split!r} is asked for. Leave it out.")
            return self.folder
        splits = sorted(each.name for each in self.folder.iterdir() if (each / "dataset_info.json").is_file())
        return self.folder / choose_split(splits, self.split, str(self.folder))

    def _load(self, cache_dir: Path) -> _Dataset:
        return _hf.load_from_disk(str(self._split_folder()))


class HubSource(TableSource):
    """A data set of the Hugging Face hub, in the cache that all programs share."""

    def __init__(self, path: str, config: str | None, split: str | None, image_folder: str | None = None):
        super().__init__(":".join(filter(None, (path, config, split))), image_folder)
        self.path = path
        self.config = config
        self.split = split or DEFAULT_SPLIT

    def fingerprint(self) -> str:
        """Give a hash of the names, sizes and times of the files in the cache."""
        self.prepare(Path())
        files = [Path(file["filename"]) for file in self._prepared().cache_files]
        return fingerprint_files(files)

    def _load(self, cache_dir: Path) -> _Dataset:
        try:
            return _hf.load_dataset(self.path, self.config, split=self.split)
        except (OSError, ValueError, DatasetsError) as error:
            raise UserError(
                f"Data set {self.path!r} is neither a file or folder here nor a data set that could be loaded from the "
                f"Hugging Face hub: {error}. Check --data_path; without a connection the data set has to be in the "
                "cache already, or be given as a folder."
            ) from error


def records_of(table: Any) -> Iterator[dict[str, object]]:
    """Give the rows of a table as objects, column by name, without reading the images in them.

    Whatever is binary becomes an `EmbeddedImage` with its address in the row. Only the validity of binary values is
    looked at, so that the pages of a memory-mapped file which hold images stay on disk.
    """
    columns = {name: _values(table.column(name), name) for name in table.column_names}
    for row in range(table.num_rows):
        yield {name: values[row] for name, values in columns.items()}


def binary_at(table: Any, address: tuple[str | int, ...]) -> bytes:
    """Read the binary value at the address of an `EmbeddedImage` (column, fields and items) in a table of one row."""
    array = next(chunk for chunk in table.column(str(address[0])).chunks if len(chunk))
    for step in address[1:]:
        array = array.field(step) if isinstance(step, str) else array.flatten().slice(step, 1)
    return bytes(array[0].as_py())


def _values(column: Any, name: str) -> list[object]:
    if not _holds_binary(column.type):
        return column.to_pylist()
    return [_value(chunk, row, (name,)) for chunk in column.chunks for row in range(len(chunk))]


def _value(array: Any, row: int, address: tuple[str | int, ...]) -> object:
    one = array.slice(row, 1)
    if one.null_count:
        return None
    kind = array.type
    if _is_binary(kind):
        return EmbeddedImage(address)
    if not _holds_binary(kind):
        return one[0].as_py()
    if _types.is_struct(kind):
        return {field.name: _value(one.field(field.name), 0, (*address, field.name)) for field in kind}
    items = one.flatten()
    return [_value(items, place, (*address, place)) for place in range(len(items))]


def _is_binary(kind: Any) -> bool:
    return _types.is_binary(kind) or _types.is_large_binary(kind)


def _holds_binary(kind: Any) -> bool:
    if _types.is_struct(kind):
        return any(_holds_binary(field.type) for field in kind)
    if _types.is_list(kind) or _types.is_large_list(kind) or _types.is_fixed_size_list(kind):
        return _holds_binary(kind.value_type)
    return _is_binary(kind)
