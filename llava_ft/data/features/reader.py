"""Reads the features of images where an `ImageReader` would decode them."""

from collections.abc import Sequence
from typing import Any

import torch

from llava_ft.data.features.contents import RunImage, as_array
from llava_ft.data.features.store import Array, FeatureStore, find_digests
from llava_ft.data.features.tensor_files import DamagedShardError
from llava_ft.data.image_reader import ImageReader, ImageRef, size_entries
from llava_ft.errors import ImageError


class FeatureReader:
    """Gives `image_features` instead of `pixel_values`.

    Args:
        images: Finds the images, and knows how many tiles they have.
        store: The features.
        names: `(I,)` `RunImage.name_digest` of each image, ascending.
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
        place = find_digests(self._names, as_array([RunImage(self.images, image).name_digest()]))[0]
        position = int(self._positions[place]) if place >= 0 else -1
        name = self.images.locate(image)
        if position < 0:
            self.images.read([image])  # says what is wrong with it
            raise ImageError(name, "image-not-cached", "has no features in the vision cache; it could not be read then")
        try:
            return self.store.read(position)
        except DamagedShardError as error:
            raise ImageError(
                name,
                "image-features-damaged",
                f"has no usable features: {error}. Delete that file to have what is in it computed anew",
            ) from None
