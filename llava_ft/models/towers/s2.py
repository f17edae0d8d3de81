"""S2: one tower looks at each image at several scales (arXiv:2403.13043, section 3.1)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def multiscale_features(
    encode: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, scales: Sequence[int]
) -> torch.Tensor:
    """Let the same tower look at images at several scales.

    Each scale is cut into G x G tiles of the tower's own size; the features of the tiles, S x S each, are put together
    as one picture, pooled to the size of the smallest scale, and joined channel by channel. So the number of tokens
    stays and the width grows. The arithmetic is that of `CLIPVisionTowerS2` of original LLaVA.

    Args:
        encode: The tower: `(M, 3, H, W)` pixels of its own size to `(M, S * S, C)` features.
        pixel_values: `(M, 3, H, W)` normalised pixels at the largest scale.
        scales: Sides in pixels, ascending; the first is the tower's own, the others whole multiples of it.

    Returns:
        `(M, S * S, C * len(scales))`, the smallest scale's channels first.
    """
    tile = scales[0]
    joined: list[torch.Tensor] = []
    for scale in scales:
        num_tiles = scale // tile
        pixels = F.interpolate(pixel_values.float(), size=(scale, scale), mode="bicubic").to(pixel_values.dtype)
        features = _put_together(encode(_cut(pixels, num_tiles)), num_tiles)
        side = features.shape[-1] // num_tiles
        joined.append(F.interpolate(features.float(), size=(side, side), mode="area").to(features.dtype))
    return torch.cat(joined, dim=1).flatten(2).transpose(1, 2)


def _cut(pixels: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """Cut `(M, 3, G * h, G * w)` into `(M * G * G, 3, h, w)`, image by image and row by row."""
    num_images, channels, height, width = pixels.shape
    tiles = pixels.reshape(num_images, channels, num_tiles, height // num_tiles, num_tiles, width // num_tiles)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _put_together(features: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """Put the tiles' features `(M * G * G, S * S, C)` together as `(M, C, G * S, G * S)`."""
    num_features, width = features.shape[1:]
    side = round(num_features**0.5)
    grid = features.reshape(-1, num_tiles, num_tiles, side, side, width)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, width, num_tiles * side, num_tiles * side)
