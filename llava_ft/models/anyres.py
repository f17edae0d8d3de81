"""Laying out the tiles of an image as one sequence of features (LLaVA-1.6).

The tower sees an overview of the image and the tiles of a grid. `flat` puts their features one tile after the other;
`spatial` lays the grid's features out as one picture, row by row; `spatial_unpad` takes away from that picture what is
padding and ends each row with the learnt `image_newline`::

    overview      grid of 2 x 1 tiles, 2 x 2 features each
    o1 o2         a1 a2 | b1 b2        flat             o1 o2 o3 o4  a1 a2 a3 a4  b1 b2 b3 b4
    o3 o4         a3 a4 | b3 b4        spatial          o1 o2 o3 o4  a1 a2 b1 b2  a3 a4 b3 b4
                                       spatial_unpad    o1 o2 o3 o4  a1 a2 b1 b2 newline  a3 a4 b3 b4 newline

Source: `prepare_inputs_labels_for_multimodal` of `llava/model/llava_arch.py`; the reduction of `anyres_max_N` is
LLaVA-NeXT's.

Shapes: K tiles, N features of a tile, D width, T features of an image; R rows and C columns of features.
"""

import torch
import torch.nn.functional as F

from llava_ft.geometry import ImageGeometry, SizeWH, unpadding


def merge_tiles(
    features: torch.Tensor, size_wh: SizeWH, geometry: ImageGeometry, image_newline: torch.Tensor | None
) -> torch.Tensor:
    """Lay out the features of one image.

    Args:
        features: `(K, N, D)`, the overview first, then the grid row by row.
        size_wh: Width and height of the image, in pixels.
        geometry: How the model lays images out.
        image_newline: `(D,)`, with `spatial_unpad`.

    Returns:
        `(T, D)` with T equal to `geometry.num_tokens(size_wh)`.
    """
    if geometry.merge_type == "flat":
        return features.flatten(0, 1)
    columns, rows = geometry.grid(size_wh)
    picture_DRC = as_picture(features[1:], rows, columns)
    if geometry.merge_type == "spatial_unpad":
        assert image_newline is not None
        picture_DRC = unpad(picture_DRC, size_wh)
        picture_DRC = _reduce(picture_DRC, geometry)
        newline_DR1 = image_newline.to(features.dtype)[:, None, None].expand(-1, picture_DRC.shape[1], 1)
        picture_DRC = torch.cat((picture_DRC, newline_DR1), dim=2)
    return torch.cat((features[0], picture_DRC.flatten(1, 2).T))


def as_picture(features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Put the tiles of a grid together.

    Args:
        features: `(rows * columns, N, D)` features of square tiles, row by row.
        rows: Rows of tiles.
        columns: Columns of tiles.

    Returns:
        `(D, R, C)`.
    """
    num_features, width = features.shape[1:]
    side = round(num_features**0.5)
    grid = features.reshape(rows, columns, side, side, width)
    return grid.permute(4, 0, 2, 1, 3).reshape(width, rows * side, columns * side)


def unpad(picture: torch.Tensor, size_wh: SizeWH) -> torch.Tensor:
    """Take away the rows or columns of a `(D, R, C)` picture that hold padding alone."""
    rows, columns = picture.shape[1:]
    top, left = unpadding(rows, columns, size_wh)
    return picture[:, top : rows - top, left : columns - left]


def _reduce(picture: torch.Tensor, geometry: ImageGeometry) -> torch.Tensor:
    """Shrink a picture that has too many features for `anyres_max_N`."""
    rows, columns = picture.shape[1:]
    size = geometry.reduced(rows, columns)
    if size == (rows, columns):
        return picture
    return F.interpolate(picture[None], size=size, mode="bilinear")[0]
