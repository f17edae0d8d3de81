"""The vision tower: CLIP's image encoder up to the layer whose features LLaVA uses.

Source: LLaVA 1.5 (arXiv:2310.03744), section 3, and `llava/model/multimodal_encoder/clip_encoder.py`. Differs from
LLaVA: layers behind the selected one are not run, no other hidden state is kept, and a tower that is to be trained is
trained (the original always runs it without gradients).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_ft.models.config import hidden_state_index


class _NamedVisionModel(nn.Module):
    """Keeps `vision_model.` in the parameter names, which `CLIPVisionModel` dropped in transformers 5.6."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.vision_model = CLIPVisionModel(config)


class CLIPVisionTower(nn.Module):
    """CLIP image encoder that returns the features of one hidden state.

    Args:
        config: Architecture of the encoder.
        select_layer: Hidden state to return; negative counts from the last one.
        select_feature: `patch` drops the class token, `cls_patch` keeps it.
        s2_scales: Sides in pixels at which each image is seen (S2), the tower's own first; empty for that one alone.

    Attributes:
        one_at_a_time: Whether a frozen tower encodes image by image. On a CPU that costs nothing, and the features of
            an image then do not depend, in their last bits, on how many others are encoded with it.
    """

    def __init__(
        self, config: CLIPVisionConfig, select_layer: int, select_feature: str, s2_scales: tuple[int, ...] = ()
    ):
        super().__init__()
        self.num_layers_run = hidden_state_index(select_layer, config.num_hidden_layers)
        self.drop_class_token = select_feature == "patch"
        assert isinstance(config.image_size, int)
        self.s2_scales = s2_scales
        self.one_at_a_time = False
        self.input_size = s2_scales[-1] if s2_scales else config.image_size
        self.width = config.hidden_size * max(1, len(s2_scales))
        self.vision_tower = _NamedVisionModel(config)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the encoder's weights."""
        # Asked of the iterator: under ZeRO-3 a parameter looked up by its name is gathered on the spot.
        return next(self.vision_tower.parameters()).dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixel_values: `(M, 3, H, W)` normalised pixels, H and W equal to `input_size`.

        Returns:
            `(M, N, C)` features in the tower's dtype: N tokens an image in reading order, width C; with S2 the
            channels of all scales.
        """
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            if self.one_at_a_time and not trained and len(pixel_values) > 1:
                return torch.cat([self._encode_scales(image.clone()) for image in pixel_values.split(1)])
            return self._encode_scales(pixel_values)

    def _encode_scales(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.s2_scales:
            return multiscale_features(self._encode, pixel_values, self.s2_scales)
        return self._encode(pixel_values)

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode pictures of the tower's own size."""
        encoder = self.vision_tower.vision_model
        hidden_MNC = encoder.pre_layrnorm(encoder.embeddings(pixel_values.to(self.dtype)))
        for layer in encoder.encoder.layers[: self.num_layers_run]:
            hidden_MNC = layer(hidden_MNC, None)
        # Contiguous as features from a file are: in bfloat16 the projector's gradients depend on the layout.
        return hidden_MNC[:, 1:].contiguous() if self.drop_class_token else hidden_MNC


def multiscale_features(
    encode: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor, scales: Sequence[int]
) -> torch.Tensor:
    """S2: let the same tower look at images at several scales (arXiv:2403.13043, section 3.1).

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
