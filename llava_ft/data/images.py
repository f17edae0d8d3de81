"""From an image file to the tensor that the vision tower reads.

The arithmetic is that of the CLIP image processor: resize, centre crop, rescale, normalise. It is written
on Pillow and NumPy: a table of 256 values per channel holds rescaling and normalisation exactly, and the
height of an image never has to be told from its channels by guessing (LLaVA fails on some heights).
"""

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.errors import UserError

ASPECT_RATIOS: Final = ("square", "pad")
"""Known values of `image_aspect_ratio`."""

MAX_SIDE: Final = 65_535
"""Longest side of an image, in pixels: JPEG's limit, kept for every format so that memory stays bounded."""

MAX_CANVAS_PIXELS: Final = 2**26
"""Largest picture made between two steps (256 MiB in Pillow). Above it the result is computed in parts."""


class ImageError(UserError):
    """An image file cannot be used.

    Attributes:
        path: The file.
        kind: Short, stable name of what is wrong: "image-missing", "image-not-a-file", "image-empty",
            "image-unreadable", "image-corrupt", "image-truncated" or "image-too-large".
        reason: What is wrong, without the path.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, reason: str):
        super().__init__(f"Image {os.fspath(path)!r} {reason}.")
        self.path = os.fspath(path)
        self.kind = kind
        self.reason = reason

    def __reduce__(self):
        """Keep the fields when the error travels from a data-loading worker."""
        return (type(self), (self.path, self.kind, self.reason))


def check_image_file(path: str | os.PathLike[str]) -> None:
    """Check that `path` is a regular file with something in it, without opening it.

    Raises:
        ImageError: It is not.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ImageError(path, "image-missing", "does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(path, "image-unreadable", f"cannot be reached: {reason}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(path, "image-not-a-file", "is a directory, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "image-not-a-file", "is a pipe, socket or device, not a regular file")
    if status.st_size == 0:
        raise ImageError(path, "image-empty", "is an empty file")


def check_image_header(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read the size of an image without decoding it.

    Returns:
        Width and height in pixels, as stored (EXIF orientation not applied).

    Raises:
        ImageError: The file is missing, is not an image, or is too large to be decoded.
    """
    check_image_file(path)
    with _reading(path), Image.open(path) as image:
        _check_size(path, image)
        return image.size


def load_image(path: str | os.PathLike[str], *, exif_transpose: bool = False) -> Image.Image:
    """Decode an image file as RGB.

    The conversion is Pillow's, as in LLaVA: transparency is dropped, an animation gives its first frame, and
    greys of more than 8 bits are cut off at 255 and not scaled.

    Args:
        path: The file.
        exif_transpose: Turn the picture as its EXIF orientation says. LLaVA ignores the orientation.

    Returns:
        The picture, in mode "RGB".

    Raises:
        ImageError: The file is missing, not an image, damaged, cut short, or too large to be decoded.
    """
    check_image_file(path)
    with _reading(path), Image.open(path) as image:
        _check_size(path, image)
        image.load()
        turned = ImageOps.exif_transpose(image) if exif_transpose else image
        return _to_rgb(turned)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()
    # RGB has no transparency; Pillow would otherwise warn about some palettes for every single picture.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _check_size(path: str | os.PathLike[str], image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(path, "image-corrupt", f"has a size of {width} x {height} pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError(path, "image-too-large", f"is {width} x {height} pixels; a side can have {MAX_SIDE} at most")


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Generator[None]:
    """Turn whatever the file system or a Pillow decoder raises into an `ImageError`."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(path, "image-too-large", f"is too large to be decoded: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(path, "image-corrupt", "is not an image in a format that Pillow can read") from None
    except OSError as error:
        if error.errno is not None:
            raise ImageError(path, "image-unreadable", f"cannot be read: {error.strerror}") from None
        kind = "image-truncated" if "truncated" in str(error) else "image-corrupt"
        raise ImageError(path, kind, f"cannot be decoded: {error}") from None
    # Decoders meet damaged files with whatever their parsing happens to raise: struct.error, SyntaxError ...
    except Exception as error:
        kind = "image-truncated" if "truncated" in str(error).lower() else "image-corrupt"
        raise ImageError(path, kind, f"cannot be decoded: {type(error).__name__}: {error}") from None


class ImageTransform:
    """Prepares pictures for the vision tower: `(3, H, W)` float32, the same size for every picture.

    "square" is the CLIP processor itself: the shortest edge is resized and the centre cropped. "pad" first
    puts the picture in the middle of a square of CLIP's mean colour, so that nothing is cropped (LLaVA 1.5).

    Resizing goes along the rows first and then along the columns, in two calls. Pillow up to 12.2 does the
    same in one call; 13.0 gives some tall pictures other values when it is left to one call.

    Args:
        settings: Sizes, filter and normalisation.
        aspect_ratio: "square" or "pad"; None means "square".

    Attributes:
        output_size: Height and width of what comes out, in pixels.

    Raises:
        UserError: `aspect_ratio` is unknown, or `settings` would give pictures of different sizes.
    """

    def __init__(self, settings: ImageProcessorSettings, aspect_ratio: str | None = None):
        if aspect_ratio is not None and aspect_ratio not in ASPECT_RATIOS:
            raise UserError(
                f"image_aspect_ratio is {aspect_ratio!r}; it can be {' or '.join(map(repr, ASPECT_RATIOS))}."
            )
        self.settings = settings
        self.aspect_ratio = aspect_ratio or "square"
        self.output_size = _output_size(settings)
        self._fill = tuple(int(mean * 255) for mean in settings.image_mean)
        self._resample = Image.Resampling(settings.resample)
        self._table = _value_table(settings)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], aspect_ratio: str | None = None) -> "ImageTransform":
        """Read the settings beside a vision tower or model: a directory, a file, or a name on the hub.

        Raises:
            UserError: There are no usable settings, or `aspect_ratio` is unknown.
        """
        return cls(ImageProcessorSettings.from_pretrained(path), aspect_ratio)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Prepare one picture of any mode and size.

        Returns:
            `(3, H, W)` float32, red, green and blue.

        Raises:
            ImageError: The picture cannot be prepared within the memory limits.
        """
        picture = _to_rgb(image) if image.mode != "RGB" else image
        if self.aspect_ratio == "pad" and picture.width != picture.height:
            resized = self._resize_padded(picture)
        else:
            resized = self._resize(picture)
        pixels_HWC = np.asarray(resized)  # noqa: N806
        values_CHW = np.empty((3, *pixels_HWC.shape[:2]), dtype=np.float32)  # noqa: N806
        for channel in range(3):
            np.take(self._table[channel], pixels_HWC[:, :, channel], out=values_CHW[channel])
        return torch.as_tensor(values_CHW)

    def blank(self, num_images: int) -> torch.Tensor:
        """Give `(num_images, 3, H, W)` zeros: what stands for pictures that could not be read."""
        return torch.zeros(num_images, 3, *self.output_size)

    def _resize(self, picture: Image.Image) -> Image.Image:
        """Resize and crop, never holding more than `MAX_CANVAS_PIXELS` at a time."""
        width, height = self._resized_size(picture.width, picture.height)
        if width * height <= MAX_CANVAS_PIXELS:
            return self._crop(self._two_passes(picture, width, height))
        # Only the part that the crop keeps: equal up to rounding, for pictures of extreme shape.
        out_height, out_width = self.output_size
        left, top = (width - out_width) // 2, (height - out_height) // 2
        rows_per_pixel, columns_per_pixel = picture.height / height, picture.width / width
        columns = (left * columns_per_pixel, 0, (left + out_width) * columns_per_pixel, picture.height)
        narrow = picture.resize((out_width, picture.height), self._resample, box=columns)
        rows = (0, top * rows_per_pixel, out_width, (top + out_height) * rows_per_pixel)
        return narrow.resize((out_width, out_height), self._resample, box=rows)

    def _resize_padded(self, picture: Image.Image) -> Image.Image:
        """Do the same on the picture in the middle of a square of the mean colour."""
        side = max(picture.size)
        left, top = (side - picture.width) // 2, (side - picture.height) // 2
        if side * side <= MAX_CANVAS_PIXELS:
            square = Image.new("RGB", (side, side), self._fill)
            square.paste(picture, (left, top))
            return self._resize(square)
        if not self.settings.do_resize:
            raise ImageError("", "image-too-large", f"of {picture.width} x {picture.height} pixels cannot be padded")
        # The pass along the rows in bands: the same arithmetic, without the whole square in memory.
        width, height = self._resized_size(side, side)
        columns = Image.new("RGB", (width, side), self._fill)
        rows_per_band = MAX_CANVAS_PIXELS // side
        for start in range(0, picture.height, rows_per_band):
            rows = min(rows_per_band, picture.height - start)
            band = Image.new("RGB", (side, rows), self._fill)
            band.paste(picture.crop((0, start, picture.width, start + rows)), (left, 0))
            columns.paste(band.resize((width, rows), self._resample), (0, top + start))
        return self._crop(columns.resize((width, height), self._resample))

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing, in pixels."""
        if not self.settings.do_resize:
            return width, height
        size = self.settings.size
        if "shortest_edge" not in size:
            return size["width"], size["height"]
        shortest = size["shortest_edge"]
        if width <= height:
            return shortest, int(shortest * height / width)
        return int(shortest * width / height), shortest

    def _two_passes(self, picture: Image.Image, width: int, height: int) -> Image.Image:
        return picture.resize((width, picture.height), self._resample).resize((width, height), self._resample)

    def _crop(self, picture: Image.Image) -> Image.Image:
        """Cut out the centre; where the picture is too small, black surrounds it, as in CLIP."""
        if not self.settings.do_center_crop:
            return picture
        height, width = self.output_size
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))


def _output_size(settings: ImageProcessorSettings) -> tuple[int, int]:
    """Height and width of every prepared picture."""
    if settings.do_center_crop:
        return settings.crop_size["height"], settings.crop_size["width"]
    if settings.do_resize and "height" in settings.size:
        return settings.size["height"], settings.size["width"]
    raise UserError(
        f"An image processor with do_center_crop false, do_resize {str(settings.do_resize).lower()} and size "
        f"{settings.size} gives pictures of different sizes; the vision tower needs one. Set do_center_crop "
        "to true, or size to a height and a width."
    )


def _value_table(settings: ImageProcessorSettings) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Tabulate what each level of each channel becomes: `(3, 256)` float32, rounded as CLIP does."""
    levels = np.arange(256, dtype=np.float64)
    values = (levels * settings.rescale_factor if settings.do_rescale else levels).astype(np.float32)
    table = np.tile(values, (3, 1))
    if settings.do_normalize:
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (settings.image_mean, settings.image_std))
        table = (table - mean) / std
    return table
