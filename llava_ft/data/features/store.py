"""The features of a frozen vision tower on disk, found by the content of an image.

A directory holds one folder for each way to compute features (tower, preprocessing, dtype). In it are safetensors files
with the features of some images each, named by the digests of their contents, and a `settings.json` for people.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from llava_ft.data.features.tensor_files import DamagedShardError, list_shards, read_shard, shard_names, write_shard
from llava_ft.data.image_reader import ImageReader, ImageRef, size_entries
from llava_ft.errors import ImageError, RunError

Array = np.ndarray[Any, np.dtype[Any]]

VERSION: Final = 2
"""Version of the files, which is part of the key: a cache of another version is computed anew beside it."""

DIGEST: Final = np.dtype("V16")
"""A BLAKE2b digest of 16 bytes, sorted and searched byte by byte."""

_FOUND: Final = np.dtype([("digest", DIGEST), ("file", "<u4")])
_PREFIX: Final = "features"
_SCALE_BYTES: Final = 4
_LARGEST: Final = 127


def digest_of(data: bytes) -> bytes:
    """Return a digest of 16 bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST.itemsize).digest()


def as_array(digests: Sequence[bytes]) -> Array:
    """Return digests as an array that can be searched: a hundredth of what a dict takes in each worker."""
    return np.frombuffer(b"".join(digests), dtype=DIGEST)


def find_digests(digests: Array, wanted: Array) -> Array:
    """Find digests in `(N,)` others, which ascend: `(W,)` to `(W,)` int64 positions, -1 where there is none."""
    if not len(digests):
        return np.full(len(wanted), -1, dtype=np.int64)
    places = np.minimum(np.searchsorted(digests, wanted), len(digests) - 1)
    return np.where(digests[places] == wanted, places, -1)


@dataclass(frozen=True, slots=True)
class FeatureFormat:
    """How the features of a tile are kept.

    With `is_8bit` values are 8-bit integers, and each token has its own scale: the largest absolute value of its C
    values becomes 127. Every value then is right to 1/254 of that largest one.
    """

    num_tokens: int  # of a tile, N
    width: int  # of a token, C
    dtype: torch.dtype  # what the model is given: float32, bfloat16 or float16
    is_8bit: bool = False

    @property
    def bytes_per_tile(self) -> int:
        """Bytes that a tile takes on disk."""
        return self.num_tokens * (self.width + _SCALE_BYTES if self.is_8bit else self.width * self.dtype.itemsize)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Return `(T, N, C)` finite values of any floating dtype as they are kept.

        That is `(T, N, C)` in `dtype`; with 8 bits `(T, N, C + 4)` int8, the last 4 being the bytes of a float32 scale.
        """
        assert features.shape[1:] == (self.num_tokens, self.width), tuple(features.shape)
        tiles = features.detach().to("cpu", self.dtype).contiguous()
        if not self.is_8bit:
            return tiles
        values = tiles.float()
        scale_TN1 = values.abs().amax(dim=2, keepdim=True) / _LARGEST  # noqa: N806
        steps = torch.where(scale_TN1 > 0, values / scale_TN1, 0.0).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        return torch.cat([steps, scale_TN1.view(torch.int8)], dim=2)

    def decode(self, kept: torch.Tensor) -> torch.Tensor:
        """Return `(T, N, C)` features in `dtype` from what `encode` gave."""
        if not self.is_8bit:
            return kept
        scale_TN1 = kept[..., self.width :].contiguous().view(torch.float32)  # noqa: N806
        return (kept[..., : self.width] * scale_TN1).to(self.dtype)


class FeatureStore:
    """The features of one kind, by content of the image. It can be used in other processes, forked or not.

    Args:
        directory: Holds the folder of these features, which need not exist.
        key: What features depend on besides the image, as JSON values: all of it decides which folder they are in.
        tiles: How a tile is kept; part of the key.

    Attributes:
        num_damaged: Files that cannot be used: truncated, damaged, or of other settings.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any], tiles: FeatureFormat):
        tile = {
            "num_tokens": tiles.num_tokens,
            "width": tiles.width,
            "dtype": str(tiles.dtype).removeprefix("torch."),
            "is_8bit": tiles.is_8bit,
        }
        content = {"kind": "vision features", "version": VERSION, "tile": tile, **key}
        self._settings = json.dumps(content, indent=1, sort_keys=True) + "\n"
        self._owner = hashlib.blake2b(self._settings.encode(), digest_size=32).hexdigest()  # every file has it
        self.folder = directory / f"{_PREFIX}-{self._owner[:16]}"
        self.tiles = tiles
        self.num_damaged = 0
        self._files: list[Path] = []
        self._found: Array = np.empty(0, dtype=_FOUND)
        self.refresh()

    def __len__(self) -> int:
        return len(self._found)

    def refresh(self) -> None:
        """Look for what has been written since."""
        fresh: list[tuple[bytes, int]] = []
        self.num_damaged = 0
        for path in sorted(set(list_shards(self.folder, _PREFIX)) - set(self._files)):
            try:
                names = shard_names(path, self._owner)
            except DamagedShardError:
                self.num_damaged += 1
                continue
            fresh += [(bytes.fromhex(name), len(self._files)) for name in names]
            self._files.append(path)
        every = np.concatenate([self._found, np.array(fresh, dtype=_FOUND)])
        self._found = every[np.unique(every["digest"], return_index=True)[1]]

    def has(self, digests: Array) -> Array:
        """Say of each of `(D,)` digests whether there are features."""
        return find_digests(self._found["digest"], digests) >= 0

    def read(self, digest: bytes) -> torch.Tensor | None:
        """Read the features of an image, `(T, N, C)` in the dtype of the format; None if there are none.

        They may be mapped from the file: copy them to keep them.

        Raises:
            DamagedShardError: The file was truncated, damaged or removed.
        """
        position = find_digests(self._found["digest"], as_array([digest]))[0]
        if position < 0:
            return None
        (kept,) = read_shard(self._files[int(self._found[position]["file"])], self._owner, [digest.hex()])
        return self.tiles.decode(kept)

    def add(self, features: Mapping[bytes, torch.Tensor]) -> None:
        """Put the features of some images, by digest, on disk, all or none. They are found after the next `refresh`.

        Raises:
            RunError: They could not be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for_people = self.folder / "settings.json"
            if not for_people.exists():
                for_people.write_text(self._settings, encoding="utf-8")
            tensors = {digest.hex(): self.tiles.encode(tiles) for digest, tiles in features.items()}
            write_shard(self.folder, _PREFIX, tensors, self._owner)
        except OSError as error:
            raise RunError(
                f"Features could not be written into {self.folder}: {error.strerror or error}. What was written before "
                "stays usable. Free some space and start the same command again: what is there is not computed again. "
                "Or name another directory with --vision_cache; --vision_cache_dtype int8 takes less."
            ) from error


class FeatureReader:
    """Stands in for an `ImageReader` and gives `image_features` instead of `pixel_values`.

    Args:
        images: Finds the images, and knows how many tiles they have.
        store: The features.
        names: `(I,)` `name_digest` of each image, ascending.
        contents: `(I,)` digest of what each holds.
    """

    def __init__(self, images: ImageReader, store: FeatureStore, names: Array, contents: Array):
        self.images = images
        self.store = store
        self._names = names
        self._contents = contents

    def read(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Read the features of one sample's images: `image_features` `(num_tiles, N, C)`, and sizes as `ImageReader`.

        Raises:
            ImageError: An image cannot be read, its features are not there ("image-not-cached") or damaged
                ("image-features-damaged").
        """
        return {"image_features": torch.cat([self._read_one(image) for image in images]), **size_entries(images)}

    def blank(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Give zeros in the shapes of `read`."""
        entries = self.images.blank(images)
        tiles, num_tiles = self.store.tiles, len(entries.pop("pixel_values"))
        features = torch.zeros(num_tiles, tiles.num_tokens, tiles.width, dtype=tiles.dtype)
        return {"image_features": features, **entries}

    def _read_one(self, image: ImageRef) -> torch.Tensor:
        name = self.images.locate(image)
        place = find_digests(self._names, as_array([name_digest(self.images, image)]))[0]
        try:
            features = self.store.read(bytes(self._contents[place])) if place >= 0 else None
        except DamagedShardError as error:
            raise ImageError(
                name,
                "image-features-damaged",
                f"has no usable features: {error}. Delete that file to have what is in it computed anew",
            ) from None
        if features is None:
            self.images.read([image])  # says what is wrong with it
            raise ImageError(name, "image-not-cached", "has no features in the vision cache; it could not be read then")
        return features


def name_digest(reader: ImageReader, image: ImageRef) -> bytes:
    """Return the digest of the name that no other image has."""
    return digest_of(reader.locate(image).encode(errors="surrogateescape"))
