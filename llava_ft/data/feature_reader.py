"""Reads the features of images where an `ImageReader` would decode them."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llava_ft.data.entry_log import DIGEST, Array, find_digests
from llava_ft.data.feature_files import FeatureFileError, FeatureStore
from llava_ft.data.image_contents import digest_of
from llava_ft.data.image_reader import ImageReader, ImageRef
from llava_ft.data.images import ImageError


def name_digest(path: str) -> bytes:
    """Return the digest under which an image is looked up during a run."""
    return digest_of(os.path.abspath(path).encode(errors="surrogateescape"))


class FeatureReader:
    """Gives `image_features` instead of `pixel_values`.

    Args:
        images: Finds the images, and knows how many tiles they have.
        store: The features.
        names: `(I,)` `name_digest` of each image, ascending.
        positions: `(I,)` where each image's features are in the store, -1 if they are not.
    """

    def __init__(self, images: ImageReader, store: FeatureStore, names: Array, positions: Array):
        self.images = images
        self.store = store
        self._names = names
        self._positions = positions

    def read(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Read the features of the images of one sample.

        Returns:
            `image_features` `(num_tiles, N, C)`, the tiles of all images in reading order.

        Raises:
            ImageError: Those of an image are not there ("image-not-cached") or damaged ("image-features-damaged").
        """
        return {"image_features": torch.cat([self._read_one(image) for image in images])}

    def blank(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Give zeros in the shapes of `read`."""
        tiles = self.store.settings.tiles
        num_tiles = len(self.images.blank(images)["pixel_values"])
        return {"image_features": torch.zeros(num_tiles, tiles.num_tokens, tiles.width, dtype=tiles.dtype)}

    def _read_one(self, image: ImageRef) -> torch.Tensor:
        path = self.images.locate(image)
        place = find_digests(self._names, _one(name_digest(path)))[0]
        position = int(self._positions[place]) if place >= 0 else -1
        if position < 0:
            raise ImageError(path, "image-not-cached", "has no features in the vision cache")
        try:
            return self.store.read(position)
        except FeatureFileError as error:
            raise ImageError(path, "image-features-damaged", f"has no usable features: {error}") from None


def _one(digest: bytes) -> Array:
    return np.frombuffer(digest, dtype=DIGEST)
