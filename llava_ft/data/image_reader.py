"""From the images that a record names to what an item of the data set holds of them.

Everything that reads images during a run goes through one object with `read` and `blank`: `ImageReader` decodes and
prepares pictures, and whatever keeps prepared ones can stand in its place (`ReadsImages`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import torch
from PIL import Image

from llava_ft.data.image_files import resolve_image_path
from llava_ft.data.images import ImageTransform, load_image


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a record, not yet opened.

    Attributes:
        image: Path as the record has it.
        source: Position of the record's source among those of the run.
        size_wh: Width and height in pixels when the record was measured; None where nothing depends on them.
    """

    image: str
    source: int = 0
    size_wh: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where the images of one source are.

    Attributes:
        folder: Folder that relative paths start from; None allows absolute paths only.
    """

    folder: str | PathLike[str] | None = None


class ReadsImages(Protocol):
    """Gives the entries of an item that stand for its images."""

    def read(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Read the images of one sample, in reading order; at least one.

        Raises:
            ImageError: One of them cannot be used.
        """
        ...

    def blank(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Give entries of the same shapes as `read`, for images that cannot be read."""
        ...


class ImageReader:
    """Decodes pictures and prepares them for the vision tower.

    Args:
        transform: Prepares one picture.
        places: Where the images of each source are.
        exif_transpose: Whether pictures are turned as their EXIF orientation says.
    """

    def __init__(
        self,
        transform: ImageTransform,
        places: Sequence[ImagePlace],
        *,
        exif_transpose: bool = False,
    ):
        self.transform = transform
        self.places = tuple(places)
        self.exif_transpose = exif_transpose

    def locate(self, image: ImageRef) -> str:
        """Find the file of an image.

        Raises:
            ImageError: The path may not be used.
        """
        return resolve_image_path(image.image, self.places[image.source].folder)

    def load(self, image: ImageRef) -> Image.Image:
        """Decode an image as RGB.

        Raises:
            ImageError: It cannot be used.
        """
        return load_image(self.locate(image), exif_transpose=self.exif_transpose)

    def read(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Read the images of one sample.

        Returns:
            `pixel_values` `(num_tiles, 3, H, W)`, the tiles of all images in reading order.

        Raises:
            ImageError: One of them cannot be used.
        """
        return {"pixel_values": torch.stack([self.transform(self.load(image)) for image in images])}

    def blank(self, images: Sequence[ImageRef]) -> dict[str, Any]:
        """Give zeros in the shapes of `read`."""
        return {"pixel_values": self.transform.blank(len(images))}
