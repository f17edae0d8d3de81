"""Cutting a picture into an overview and the tiles of a grid (anyres, LLaVA-1.6).

The picture is fitted into the resolution that keeps most of it, padded with black, and cut into squares of the vision
tower's size. In front of them comes the whole picture, squeezed into one square: its proportions are not kept.

Source: `process_anyres_image` of `llava/mm_utils.py`, which resizes with Pillow's default filter whatever the processor
says.
"""

from typing import Final

from PIL import Image

from llava_ft.geometry import ImageGeometry, SizeWH, fitted_size

_FILTER: Final = Image.Resampling.BICUBIC


def resize_in_two_passes(picture: Image.Image, size_wh: SizeWH, resample: Image.Resampling) -> Image.Image:
    """Resize along the rows and then along the columns.

    Pillow up to 12.2 does the same in one call; 13.0 gives some tall pictures other values when it is left to one call.
    """
    width, height = size_wh
    return picture.resize((width, picture.height), resample).resize((width, height), resample)


def cut_into_tiles(
    picture: Image.Image, geometry: ImageGeometry, overview_wh: SizeWH, size_wh: SizeWH
) -> list[Image.Image]:
    """Make the overview and the tiles of a picture.

    Args:
        picture: The picture, in mode "RGB".
        geometry: Says which resolutions there are and how large a tile is.
        overview_wh: Size of the overview, in pixels.
        size_wh: Size of the picture as it is stored, which decides the grid; the decoder may have shrunk it since.

    Returns:
        The overview, then the tiles row by row.
    """
    target_wh = geometry.best_resolution(size_wh)
    fitted = resize_in_two_passes(picture, fitted_size(size_wh, target_wh), _FILTER)
    canvas = Image.new("RGB", target_wh)
    canvas.paste(fitted, ((canvas.width - fitted.width) // 2, (canvas.height - fitted.height) // 2))
    side = geometry.image_size
    corners = [(left, top) for top in range(0, canvas.height, side) for left in range(0, canvas.width, side)]
    tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
    return [resize_in_two_passes(picture, overview_wh, _FILTER), *tiles]
