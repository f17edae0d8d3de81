"""From a picture to the tensor that the vision tower reads.

The arithmetic is that of transformers' image processors: resize, centre crop, rescale, normalise, each as the settings
say. It is written on Pillow and a table of 256 values per channel (`PixelNormalizer`), and the height of an image never
has to be told from its channels by guessing (LLaVA fails on some heights).
"""

import os
from typing import Final

import numpy as np
import torch
from PIL import Image

from llava_ft.data.image_files import swapped, to_rgb
from llava_ft.data.image_processor import ImageProcessorSettings, PixelNormalizer
from llava_ft.errors import ImageError, UserError
from llava_ft.geometry import ImageGeometry, SizeWH, fitted_size

ASPECT_RATIOS: Final = ("square", "pad")  # values of `image_aspect_ratio` that need no geometry

MAX_CANVAS_PIXELS: Final = 2**26
"""Largest picture made between two steps (256 MiB in Pillow). Above it the result is computed in parts."""

_FILTER: Final = Image.Resampling.BICUBIC


class ImageTransform:
    """Prepares pictures for the vision tower.

    "square" is the tower's own processor: for CLIP the shortest edge is resized and the centre cropped. "pad" first
    puts the picture in the middle of a square of the mean colour, so that nothing is cropped (LLaVA 1.5). "anyres"
    gives an overview and the tiles of a grid (LLaVA 1.6; `cut_into_tiles`).

    Args:
        settings: Sizes, filter and normalisation.
        aspect_ratio: "square" or "pad"; None means "square".
        geometry: How the model takes images, instead of `aspect_ratio`; anyres and S2 need it.

    Raises:
        UserError: `aspect_ratio` is unknown, `settings` would give pictures of different sizes, or they belong to
            another tower than `geometry`.
    """

    def __init__(
        self,
        settings: ImageProcessorSettings,
        aspect_ratio: str | None = None,
        *,
        geometry: ImageGeometry | None = None,
    ):
        if geometry is not None:
            aspect_ratio = geometry.aspect_ratio
            height, width = settings.output_size
            if (height, width) != (geometry.image_size, geometry.image_size):
                raise UserError(
                    f"The image processor makes images of {height} x {width} pixels, but the vision tower takes "
                    f"{geometry.image_size} x {geometry.image_size}. Its preprocessor_config.json belongs to another "
                    "tower."
                )
            largest = max((w * h for w, h in geometry.grid_pinpoints), default=0)
            if largest > MAX_CANVAS_PIXELS:
                raise UserError(
                    f"image_grid_pinpoints has a size of {largest:,} pixels; {MAX_CANVAS_PIXELS:,} are allowed. Give "
                    "smaller ones."
                )
            if geometry.s2_scales:
                settings = settings.resized_to(geometry.input_size)
        elif aspect_ratio is not None and aspect_ratio not in ASPECT_RATIOS:
            raise UserError(
                f"image_aspect_ratio is {aspect_ratio!r}; it can be {' or '.join(map(repr, ASPECT_RATIOS))}."
            )
        self.settings = settings
        self.aspect_ratio = aspect_ratio or "square"
        self.geometry = geometry
        self.output_size = settings.output_size  # height and width of each tile, in pixels
        self.normalizer = PixelNormalizer(settings)
        self._fill = tuple(int(mean * 255) for mean in settings.image_mean)
        self._resample = Image.Resampling(settings.resample)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], aspect_ratio: str | None = None, *, geometry: ImageGeometry | None = None
    ) -> "ImageTransform":
        """Read the settings beside a vision tower or model: a directory, a file, or a name on the hub."""
        return cls(ImageProcessorSettings.from_pretrained(path), aspect_ratio, geometry=geometry)

    def pixels(self, image: Image.Image, size_wh: SizeWH | None = None) -> torch.Tensor:
        """Prepare one picture of any mode and size, up to its normalisation.

        With anyres `size_wh` decides the grid: the size in pixels before the decoder shrank the picture
        (`fast_decode_to`), its own size when absent.

        Returns:
            `(K, 3, H, W)` uint8, red, green and blue, of K tiles; K is 1 without anyres.

        Raises:
            ImageError: The picture cannot be prepared within the memory limits.
        """
        picture = to_rgb(image) if image.mode != "RGB" else image
        if self.geometry is not None and self.geometry.needs_image_sizes:
            tiles = cut_into_tiles(picture, self.geometry, self._overview_wh, size_wh or picture.size)
            resized = [self._resize(tile) for tile in tiles]
        elif self.aspect_ratio == "pad" and picture.width != picture.height:
            resized = [self._resize_padded(picture)]
        else:
            resized = [self._resize(picture)]
        pixels_KHWC = np.stack([np.asarray(tile) for tile in resized])  # noqa: N806
        return torch.as_tensor(pixels_KHWC).permute(0, 3, 1, 2).contiguous()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Give the normalised `pixels`: `(3, H, W)` float32, or `(K, 3, H, W)` for the K tiles of anyres."""
        values = self.normalizer(self.pixels(image))
        return values if self.aspect_ratio.startswith("anyres") else values[0]

    def decode_size(self, size_wh: SizeWH) -> SizeWH:
        """Return the smallest width and height to which a picture may be shrunk without being enlarged afterwards."""
        width, height = size_wh
        if self.geometry is not None and self.geometry.needs_image_sizes:
            fitted = fitted_size(size_wh, self.geometry.best_resolution(size_wh))
            return max(fitted[0], self._overview_wh[0]), max(fitted[1], self._overview_wh[1])
        if self.aspect_ratio == "pad":
            side = max(size_wh)
            square = self._resized_size(side, side)
            return -(-width * square[0] // side), -(-height * square[1] // side)
        return self._resized_size(width, height)

    def blank(self, num_images: int, size_wh: SizeWH | None = None) -> torch.Tensor:
        """Give uint8 zeros in the shape of `pixels` of pictures (with anyres: of one size) that cannot be read."""
        num_tiles = 1 if self.geometry is None else self.geometry.num_tiles(size_wh)
        return torch.zeros(num_images * num_tiles, 3, *self.output_size, dtype=torch.uint8)

    @property
    def _overview_wh(self) -> SizeWH:
        """Size that a picture is squeezed into for the overview; it is square, as in LLaVA."""
        return self._resized_size(*swapped(self.output_size)) if self.settings.do_resize else self.output_size

    def _resize(self, picture: Image.Image) -> Image.Image:
        """Resize and crop, never holding more than `MAX_CANVAS_PIXELS` at a time."""
        width, height = self._resized_size(picture.width, picture.height)
        if width * height <= MAX_CANVAS_PIXELS:
            return self._crop(resize_in_two_passes(picture, (width, height), self._resample))
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

    def _crop(self, picture: Image.Image) -> Image.Image:
        """Cut out the centre; where the picture is too small, black surrounds it, as transformers does."""
        if not self.settings.do_center_crop:
            return picture
        height, width = self.output_size
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))


def resize_in_two_passes(picture: Image.Image, size_wh: SizeWH, resample: Image.Resampling) -> Image.Image:
    """Resize along the rows and then along the columns.

    Pillow up to 12.2 does the same in one call; 13.0 gives some tall pictures other values when it is left to one call.
    """
    width, height = size_wh
    return picture.resize((width, picture.height), resample).resize((width, height), resample)


def cut_into_tiles(
    picture: Image.Image, geometry: ImageGeometry, overview_wh: SizeWH, size_wh: SizeWH
) -> list[Image.Image]:
    """Cut a picture into an overview and, row by row, the tiles of a grid (anyres, LLaVA-1.6).

    The picture is fitted into the resolution that keeps most of it, padded with black, and cut into squares of the
    tower's size. In front of them comes the whole picture, squeezed into one square: its proportions are not kept.
    `size_wh` is the size of the picture as it is stored, which decides the grid; the decoder may have shrunk it since.

    Source: `process_anyres_image` of `llava/mm_utils.py`, which resizes with Pillow's default filter whatever the
    processor says.
    """
    target_wh = geometry.best_resolution(size_wh)
    fitted = resize_in_two_passes(picture, fitted_size(size_wh, target_wh), _FILTER)
    canvas = Image.new("RGB", target_wh)
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    side = geometry.image_size
    corners = [(left, top) for top in range(0, canvas.height, side) for left in range(0, canvas.width, side)]
    tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
    return [resize_in_two_passes(picture, overview_wh, _FILTER), *tiles]
