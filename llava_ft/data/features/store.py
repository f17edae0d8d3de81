"""The features of a frozen vision tower on disk, found by the content of an image.

A directory holds one folder for each way to compute features (tower, preprocessing, dtype). In it are safetensors files
with the features of some images each, named by the digests of their contents, and a `settings.json` for people.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from llava_ft.data.features.tensor_files import DamagedShardError, list_shards, read_shard, shard_names, write_shard
from llava_ft.errors import RunError
from llava_ft.geometry import ImageGeometry

Array = np.ndarray[Any, np.dtype[Any]]

VERSION: Final = 2
"""Version of the files, which is part of the key: a cache of another version is computed anew beside it."""

DIGEST: Final = np.dtype("V16")
"""A BLAKE2b digest of 16 bytes, sorted and searched byte by byte."""

_FOUND: Final = np.dtype([("digest", DIGEST), ("file", "<u4")])
_PREFIX: Final = "features"
_SCALE_BYTES: Final = 4
_LARGEST: Final = 127


@dataclass(frozen=True, slots=True)
class FeatureFormat:
    """How the features of a tile are kept.

    Attributes:
        num_tokens: Tokens of a tile, N.
        width: Width of a token, C.
        dtype: What the model is given: float32, bfloat16 or float16.
        is_8bit: Whether values are kept as 8-bit integers, each token with its own scale: the largest absolute value of
            its C values becomes 127. Every value then is right to 1/254 of that largest one.
    """

    num_tokens: int
    width: int
    dtype: torch.dtype
    is_8bit: bool = False

    @classmethod
    def of_tower(
        cls, geometry: ImageGeometry, width: int, dtype: torch.dtype, kept_as: Literal["compute", "int8"]
    ) -> "FeatureFormat":
        """Return how the features of a run are kept.

        Args:
            geometry: How the model takes images.
            width: Width of the tower's features.
            dtype: The run's compute dtype.
            kept_as: Value of `vision_cache_dtype`.
        """
        return cls(geometry.tokens_per_tile, width, dtype, is_8bit=kept_as == "int8")

    @property
    def bytes_per_tile(self) -> int:
        """Bytes that a tile takes on disk."""
        return self.num_tokens * (self.width + _SCALE_BYTES if self.is_8bit else self.width * self.dtype.itemsize)

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Return features as they are kept.

        Args:
            features: `(T, N, C)` finite values of any floating dtype.

        Returns:
            `(T, N, C)` in `dtype`; with 8 bits `(T, N, C + 4)` int8, the last 4 being the bytes of a float32 scale.
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


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """What features depend on besides the image: all of it decides which folder they are in.

    Attributes:
        key: JSON values.
        tiles: How a tile is kept.
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
    def owner(self) -> str:
        """A digest of all of it, which every file has."""
        return hashlib.blake2b(self.text().encode(), digest_size=32).hexdigest()

    def folder(self, directory: Path) -> Path:
        """Return the folder of these settings in a cache directory."""
        return directory / f"{_PREFIX}-{self.owner[:16]}"


class FeatureStore:
    """The features in one folder, by content of the image. It can be used in other processes, forked or not.

    Args:
        folder: The folder; it need not exist.
        settings: What it holds.

    Attributes:
        num_damaged: Files that cannot be used: truncated, damaged, or of other settings.
    """

    def __init__(self, folder: Path, settings: FeatureSettings):
        self.folder = folder
        self.settings = settings
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
                names = shard_names(path, self.settings.owner)
            except DamagedShardError:
                self.num_damaged += 1
                continue
            fresh += [(bytes.fromhex(name), len(self._files)) for name in names]
            self._files.append(path)
        every = np.concatenate([self._found, np.array(fresh, dtype=_FOUND)])
        self._found = every[np.unique(every["digest"], return_index=True)[1]]

    def find(self, digests: Array) -> Array:
        """Find images by digest: `(D,)` to int64 positions for `read`, -1 where there are no features.

        Positions hold until the next `refresh`.
        """
        return find_digests(self._found["digest"], digests)

    def read(self, position: int) -> torch.Tensor:
        """Read the features of an image.

        Returns:
            `(T, N, C)` in the dtype of the format; it may be mapped from the file, so copy it to keep it.

        Raises:
            DamagedShardError: The file was truncated, damaged or removed.
        """
        found = self._found[position]
        (kept,) = read_shard(self._files[int(found["file"])], self.settings.owner, [bytes(found["digest"]).hex()])
        return self.settings.tiles.decode(kept)

    def add(self, digests: Sequence[bytes], features: Sequence[torch.Tensor]) -> None:
        """Put the features of some images on disk, all or none. They are found after the next `refresh`.

        Args:
            digests: Of the images' content, 16 bytes each.
            features: `(T, N, C)` of each image.

        Raises:
            RunError: They could not be written.
        """
        kept = map(self.settings.tiles.encode, features)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for_people = self.folder / "settings.json"
            if not for_people.exists():
                for_people.write_text(self.settings.text(), encoding="utf-8")
            tensors = {digest.hex(): tiles for digest, tiles in zip(digests, kept, strict=True)}
            write_shard(self.folder, _PREFIX, tensors, self.settings.owner)
        except OSError as error:
            raise RunError(
                f"Features could not be written into {self.folder}: {error.strerror or error}. What was written before "
                "stays usable. Free some space and start the same command again: what is there is not computed again. "
                "Or name another directory with --vision_cache; --vision_cache_dtype int8 takes less."
            ) from error


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
