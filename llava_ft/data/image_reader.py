"""From the images that a record names to what an item of the data set holds of them.

Everything that reads images during a run goes through one object with `read` and `blank`: `ImageReader` decodes and
prepares pictures, and whatever keeps prepared ones can stand in its place (`ReadsImages`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from llava_ft.data.image_files import ImagePlace, load_image
from llava_ft.data.images import ImageTransform
from llava_ft.errors import ImageError
from llava_ft.geometry import SizeWH


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a record, not yet opened."""

    image: str  # as the record names it
    source: int = 0  # position of the record's source among those of the run
    size_wh: SizeWH | None = None  # in pixels when the record was measured; None where nothing depends on them


class ReadsImages(Protocol):
    """Gives the entries of an item that stand for its images."""

    def read(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Read the images of one sample, at least one; an `ImageError` says which cannot be used."""
        ...

    def blank(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Give entries of the same shapes for images that cannot be read."""
        ...


class ImageReader:
    """Decodes pictures and prepares them for the vision tower.

    Args:
        transform: Prepares one picture.
        places: Where the images of each source are.
        exif_transpose: Turn pictures as their EXIF orientation says.
        fast_decode: Large photographs may be shrunk while they are decoded.
    """

    def __init__(
        self,
        transform: ImageTransform,
        places: Sequence[ImagePlace],
        *,
        exif_transpose: bool = False,
        fast_decode: bool = False,
    ):
        self.transform = transform
        self.places = tuple(places)
        self.exif_transpose = exif_transpose
        self.fast_decode = fast_decode

    def locate(self, image: ImageRef) -> str:
        """Name an image so that no other has the name; see `ImagePlace.locate`."""
        return self.places[image.source].locate(image.image)

    def load(self, image: ImageRef) -> Image.Image:
        """Decode an image as RGB, smaller than it is if that is allowed.

        Raises:
            ImageError: It cannot be used, or it is no longer as large as it was measured ("image-changed").
        """
        name = self.locate(image)

        def check_size(size_wh: SizeWH) -> None:
            if image.size_wh is not None and size_wh != image.size_wh:
                now, then = (f"{width} x {height}" for width, height in (size_wh, image.size_wh))
                raise ImageError(name, "image-changed", f"is {now} pixels, but was {then} before the run")

        def decode_size(size_wh: SizeWH) -> SizeWH:
            check_size(size_wh)  # the picture comes out smaller
            return self.transform.decode_size(size_wh)

        picture = load_image(
            self.places[image.source].content(image.image),
            exif_transpose=self.exif_transpose,
            fast_decode_to=decode_size if self.fast_decode else None,
            name=name,
        )
        if not self.fast_decode:
            check_size(picture.size)
        return picture

    def read(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Read the images of one sample.

        Returns:
            `pixel_values` `(num_tiles, 3, H, W)` uint8, the tiles of all images in reading order; where sizes matter
            `image_sizes` `(M, 2)` int64, width and height of each image in pixels.

        Raises:
            ImageError: As in `load`.
        """
        tiles = [self.transform.pixels(self.load(image), image.size_wh) for image in images]
        return {"pixel_values": torch.cat(tiles), **size_entries(images)}

    def blank(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Give zeros in the shapes of `read`."""
        tiles = [self.transform.blank(1, image.size_wh) for image in images]
        return {"pixel_values": torch.cat(tiles), **size_entries(images)}


def size_entries(images: Sequence[ImageRef]) -> dict[str, Any]:
    """Give the entry `image_sizes` of `ImageReader.read`."""
    sizes = [image.size_wh for image in images if image.size_wh is not None]
    return {"image_sizes": torch.tensor(sizes)} if sizes else {}
