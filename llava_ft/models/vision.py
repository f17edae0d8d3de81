"""The vision tower: CLIP's image encoder up to the layer whose features LLaVA uses.

Source: LLaVA 1.5 (arXiv:2310.03744), section 3, and `llava/model/multimodal_encoder/clip_encoder.py`. Differs from
LLaVA: layers behind the selected one are not run, no other hidden state is kept, and a tower that is to be trained is
trained (the original always runs it without gradients).
"""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_ft.models.config import hidden_state_index
from llava_ft.models.s2 import multiscale_features


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
        """Encode pictures at one scale or at several."""
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
