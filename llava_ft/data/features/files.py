"""The features of a frozen vision tower on disk, found by the content of an image.

A directory holds one folder for each way to compute features (tower, preprocessing, dtype), with a `settings.json` that
says which. In it each process that computes writes two files of its own, to which it only appends:

    features-NAME.bin   the tiles of one image after the other, as `FeatureFormat` lays them out, and nothing else
    features-NAME.idx   an entry for each image: digest of its content, first tile, number of tiles, checksums

An image's tiles are forced to disk before its entry is written, so an entry speaks of data that is there. A process
that is killed leaves at most tiles without an entry, which nobody reads. The checksum of the tiles is compared at every
read: a damaged file gives an error and never a wrong feature.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch

from llava_ft.data.features.entry_log import (
    CHECKSUM,
    DIGEST,
    VERSION,
    Array,
    EntryReader,
    EntryWriter,
    cut_back,
    find_digests,
    new_name,
    write_all,
)
from llava_ft.data.features.format import FeatureFormat
from llava_ft.errors import RunError, UserError

SETTINGS: Final = "settings.json"

_ENTRY: Final = np.dtype(
    [("digest", DIGEST), ("first", "<u8"), ("num_tiles", "<u4"), ("data_checksum", "<u4"), (CHECKSUM, "<u4")]
)
_FOUND: Final = np.dtype(
    [("digest", DIGEST), ("file", "<u4"), ("first", "<u8"), ("num_tiles", "<u4"), ("data_checksum", "<u4")]
)
_PREFIX: Final = "features-"
_INDEX: Final = ".idx"
_DATA: Final = ".bin"
_ADVICE: Final = "Delete it, with the .idx file beside it, to have these features computed anew at the next start."


class FeatureFileError(UserError):
    """The features of an image are not on disk as they were written."""


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """What features depend on besides the image: all of it decides which folder they are in.

    Attributes:
        key: JSON values.
        tiles: How a tile lies on disk.
    """

    key: Mapping[str, Any]
    tiles: FeatureFormat

    def text(self) -> str:
        """Return the content of `settings.json`."""
        tiles = {
            "num_tokens": self.tiles.num_tokens,
            "width": self.tiles.width,
            "dtype": str(self.tiles.dtype).removeprefix("torch."),
            "is_8bit": self.tiles.is_8bit,
        }
        content = {"kind": "vision features", "version": VERSION, "tile": tiles, **self.key}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @property
    def owner(self) -> bytes:
        """A digest of all of it, which every index begins with."""
        return hashlib.blake2b(self.text().encode(), digest_size=32).digest()

    def folder(self, directory: Path) -> Path:
        """Return the folder of these settings in a cache directory."""
        return directory / f"features-{self.owner.hex()[:16]}"


class FeatureStore:
    """The features in one folder, by content of the image. Files are mapped when they are first read.

    It can be sent to another process, which maps them itself.

    Args:
        folder: The folder; it need not exist.
        settings: What it holds.

    Attributes:
        num_damaged: Entries found that do not count: their checksum is wrong, or their features are missing.

    Raises:
        UserError: It holds something else.
    """

    def __init__(self, folder: Path, settings: FeatureSettings):
        self.folder = folder
        self.settings = settings
        self.num_damaged = 0
        _check_settings(folder, settings)
        self._indexes: list[EntryReader] = []
        self._found: Array = np.empty(0, dtype=_FOUND)
        self._maps: dict[int, mmap.mmap] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def __len__(self) -> int:
        return len(self._found)

    def refresh(self) -> None:
        """Look for what has been written since.

        Raises:
            UserError: An index is of another kind or version.
        """
        known = {index.path for index in self._indexes}
        for path in sorted(self.folder.glob(f"{_PREFIX}*{_INDEX}")):
            if path not in known:
                self._indexes.append(EntryReader(path, _ENTRY, self.settings.owner))
        fresh = [self._read_new(number) for number in range(len(self._indexes))]
        if any(len(entries) for entries in fresh):
            every = np.concatenate([self._found, *fresh])
            self._found = every[np.unique(every["digest"], return_index=True)[1]]

    def find(self, digests: Array) -> Array:
        """Find images by digest: `(D,)` to int64 positions for `read`, -1 where there are no features.

        Positions hold until the next `refresh`.
        """
        return find_digests(self._found["digest"], digests)

    def num_tiles(self, position: int) -> int:
        """Return how many tiles an image has."""
        return int(self._found["num_tiles"][position])

    def read(self, position: int) -> torch.Tensor:
        """Read the features of an image.

        Returns:
            `(T, N, C)` in the dtype of the format, memory of its own.

        Raises:
            FeatureFileError: The file was cut, damaged or removed.
        """
        entry, size = self._found[position], self.settings.tiles.bytes_per_tile
        start, length = int(entry["first"]) * size, int(entry["num_tiles"]) * size
        path = _data_path(self._indexes[int(entry["file"])].path)
        try:
            mapped = self._map(int(entry["file"]), path, start + length)
        except (OSError, ValueError) as error:
            raise FeatureFileError(f"{path} cannot be read: {error}. {_ADVICE}") from None
        data = np.frombuffer(mapped, dtype=np.uint8, count=length, offset=start).copy()
        if zlib.crc32(data.data) != int(entry["data_checksum"]):
            raise FeatureFileError(f"{path} is damaged: the checksum of an image's features is wrong. {_ADVICE}")
        return self.settings.tiles.decode(data)

    def writer(self) -> "FeatureWriter":
        """Begin new files in the folder.

        Raises:
            RunError: They cannot be made.
        """
        return FeatureWriter(self.folder, self.settings)

    def _read_new(self, number: int) -> Array:
        """Read the new entries of an index, without those whose features are not there."""
        index = self._indexes[number]
        damaged_before = index.num_damaged
        entries = index.read_new()
        try:
            num_tiles = _data_path(index.path).stat().st_size // self.settings.tiles.bytes_per_tile
        except OSError:
            num_tiles = 0
        is_there = entries["first"] + entries["num_tiles"] <= num_tiles
        self.num_damaged += index.num_damaged - damaged_before + len(entries) - int(is_there.sum())
        found = np.empty(int(is_there.sum()), dtype=_FOUND)
        found["file"] = number
        for name in ("digest", "first", "num_tiles", "data_checksum"):
            found[name] = entries[name][is_there]
        return found

    def _map(self, number: int, path: Path, length: int) -> mmap.mmap:
        """Map a file of features, again if it has grown; what lies behind its present end is never touched."""
        mapped = self._maps.get(number)
        if mapped is None or len(mapped) < length:
            with path.open("rb") as file:
                mapped = self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if min(len(mapped), mapped.size()) < length:
            raise ValueError(f"it ends after {mapped.size()} bytes, {length} are needed")
        return mapped


class FeatureWriter:
    """Writes features into two new files of a folder; use it as a context manager.

    Raises:
        RunError: They cannot be written. What was added before stays usable.
    """

    def __init__(self, folder: Path, settings: FeatureSettings):
        self._tiles = settings.tiles
        self._path = folder / f"{_PREFIX}{new_name()}{_DATA}"
        self._num_tiles = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_settings(folder, settings)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._index = EntryWriter(self._path.with_suffix(_INDEX), _ENTRY, settings.owner)
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, digests: Sequence[bytes], features: Sequence[torch.Tensor]) -> None:
        """Put the features of some images on disk, then their entries.

        Args:
            digests: Of the images' content, 16 bytes each.
            features: `(T, N, C)` of each image.

        Raises:
            RunError: They could not be written.
        """
        entries = np.zeros(len(digests), dtype=_ENTRY)
        encoded = [self._tiles.encode(tiles).reshape(-1) for tiles in features]
        first, size = self._num_tiles, self._tiles.bytes_per_tile
        for row, (digest, data) in enumerate(zip(digests, encoded, strict=True)):
            num_tiles = len(data) // size
            entries[row] = (np.void(digest), first, num_tiles, zlib.crc32(data.data), 0)
            first += num_tiles
        try:
            write_all(self._file, np.concatenate(encoded).data, self._num_tiles * size)
            os.fsync(self._file)
            self._index.append(entries)
        except OSError as error:
            cut_back(self._file, self._num_tiles * size)
            raise self._failed(error) from error
        self._num_tiles = first

    def close(self) -> None:
        """Close the files; if nothing was added they are removed."""
        os.close(self._file)
        self._index.close()
        if not self._num_tiles:
            self._index.path.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> RunError:
        return RunError(
            f"Features could not be written to {self._path}: {error.strerror or error}. The {self._num_tiles} tiles "
            "before them stay usable. Free some space and start the same command again: what is there is not computed "
            "again. Or name another directory with --vision_cache; --vision_cache_dtype int8 takes less."
        )


def _data_path(index: Path) -> Path:
    return index.with_suffix(_DATA)


def _check_settings(folder: Path, settings: FeatureSettings) -> None:
    path = folder / SETTINGS
    try:
        found = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Delete {folder} to have the features computed anew."
        ) from None
    if found != settings.text():
        raise UserError(
            f"{path} is not what was written there, so it is not known what the features beside it are. Delete "
            f"{folder} to have them computed anew."
        )


def _write_settings(folder: Path, settings: FeatureSettings) -> None:
    """Say what the folder holds; if several processes do so at once, all say the same."""
    path = folder / SETTINGS
    if path.exists():
        return
    staged = folder / f".{SETTINGS}.{new_name()}"
    staged.write_text(settings.text(), encoding="utf-8")
    os.replace(staged, path)
