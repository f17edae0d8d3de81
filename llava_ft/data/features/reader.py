"""Reads the features of images where an `ImageReader` would decode them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llava_ft.data.features.entry_log import DIGEST, Array, find_digests
from llava_ft.data.features.files import FeatureFileError, FeatureStore
from llava_ft.data.features.image_contents import digest_of
from llava_ft.data.image_reader import ImageReader, ImageRef, size_entries
from llava_ft.errors import ImageError


def name_digest(name: str) -> bytes:
    """Return the digest of an image's name, under which it is looked up during a run; see `ImageReader.locate`."""
    return digest_of(name.encode(errors="surrogateescape"))


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
            `image_features` `(num_tiles, N, C)`, the tiles of all images in reading order; where sizes matter
            `image_sizes` `(M, 2)` int64, width and height of each image in pixels.

        Raises:
            ImageError: An image cannot be read, its features are not there ("image-not-cached") or damaged
                ("image-features-damaged").
        """
        return {"image_features": torch.cat([self._read_one(image) for image in images]), **size_entries(images)}

    def blank(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Give zeros in the shapes of `read`."""
        entries = self.images.blank(images)
        tiles, num_tiles = self.store.settings.tiles, len(entries.pop("pixel_values"))
        features = torch.zeros(num_tiles, tiles.num_tokens, tiles.width, dtype=tiles.dtype)
        return {"image_features": features, **entries}

    def _read_one(self, image: ImageRef) -> torch.Tensor:
        name = self.images.locate(image)
        place = find_digests(self._names, np.frombuffer(name_digest(name), dtype=DIGEST))[0]
        position = int(self._positions[place]) if place >= 0 else -1
        if position < 0:
            self.images.read([image])  # says what is wrong with it
            raise ImageError(name, "image-not-cached", "has no features in the vision cache; it could not be read then")
        try:
            return self.store.read(position)
        except FeatureFileError as error:
            raise ImageError(name, "image-features-damaged", f"has no usable features: {error}") from None
