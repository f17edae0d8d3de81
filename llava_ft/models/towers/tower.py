"""A vision tower, and what a type of tower says of itself.

Source: LLaVA 1.5 (arXiv:2310.03744), section 3, and `llava/model/multimodal_encoder/clip_encoder.py`. Differs from
LLaVA: layers behind the selected one are not run, no other hidden state is kept, and a tower that is to be trained is
trained (the original always runs it without gradients).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedConfig

from llava_ft.errors import UserError
from llava_ft.models.parts import VISION_PREFIX
from llava_ft.models.towers.s2 import multiscale_features

SELECT_FEATURES: Final = ("patch", "cls_patch")
"""Known values of `mm_vision_select_feature`: patches only, or what stands before them (a class token) too."""


@dataclass(frozen=True)
class TowerFacts:
    """Sizes of one tower."""

    image_size: int  # side of the square pictures that it takes, in pixels
    patch_size: int  # side in pixels of the square that one feature stands for
    width: int  # width of its features
    depth: int  # number of its layers; hidden state 0 is what goes into the first one
    num_prefix_tokens: int = 0  # features before those of the patches: 1 for a class token

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < self.patch_size:
            raise UserError(
                f"A vision tower with image_size {self.image_size} and patch_size {self.patch_size} has no patches; "
                "patch_size must be at least 1 and at most image_size."
            )

    def tokens(self, height: int, width: int, select_feature: str = "patch") -> int:
        """Count the features of a picture. Pixels beyond the last whole patch are not seen."""
        prefix = self.num_prefix_tokens if select_feature == "cls_patch" else 0
        return (height // self.patch_size) * (width // self.patch_size) + prefix


def _without_prefix(key: str) -> str | None:
    return key.removeprefix("vision_model.")


@dataclass(frozen=True)
class TowerType:
    """A type of vision tower.

    The encoder is `model.vision_tower.vision_tower.vision_model` of the model, in memory and in files.

    Attributes:
        model_type: `model_type` of its `config.json`.
        whole_types: Those of models it is a part of, which describe it under `vision_config`.
        config_class: Its configuration.
        fields: What of that is its architecture, and is written into `mm_vision_config`.
        build: Makes the encoder from the configuration.
        encode: Runs the encoder up to a hidden state: pixels `(M, 3, H, W)` and number of layers to `(M, N, C)`.
        num_prefix_tokens: Features before those of the patches: 1 for a class token.
        encoder_name: Name of a parameter in the encoder for that in the tower's own files; None leaves it out.
        layers: Name of the list of layers in the encoder.
        sizes: Of a few fields the parameter in the encoder, and its dimension, that prove them to be true; see
            `checkpoint/config_check.py`.
        positions: Name of the table with a row for each feature, if there is one.
        example: A tower of this type, for messages.
    """

    model_type: str
    config_class: type[PreTrainedConfig]
    fields: tuple[str, ...]
    build: Callable[[Any], nn.Module]
    encode: Callable[[Any, torch.Tensor, int], torch.Tensor]
    num_prefix_tokens: int = 0
    encoder_name: Callable[[str], str | None] = _without_prefix
    layers: str = "encoder.layers"
    sizes: tuple[tuple[str, str, int], ...] = ()
    positions: str | None = None
    whole_types: tuple[str, ...] = ()
    example: str = ""

    def native_name(self, key: str) -> str | None:
        """Return a parameter's name in the model for that in the tower's own files; None leaves it out."""
        name = self.encoder_name(key)
        return None if name is None else VISION_PREFIX + name

    def facts(self, config: Any) -> TowerFacts:
        """Read a tower's sizes from its configuration."""
        for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers"):
            value = getattr(config, name)
            if type(value) is not int:
                raise UserError(f"{name} of the vision tower is {value!r}; it must be one whole number.")
        return TowerFacts(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            num_prefix_tokens=self.num_prefix_tokens,
        )


class VisionTower(nn.Module):
    """An image encoder that returns the features of one hidden state.

    Args:
        tower_type: What it is.
        config: Architecture of the encoder.
        select_layer: Hidden state to return; negative counts from the last one.
        select_feature: `patch` drops the class token, `cls_patch` keeps it.
        s2_scales: Sides in pixels at which each image is seen (S2), the tower's own first; empty for that one alone.

    Attributes:
        one_at_a_time: Whether a frozen tower encodes image by image. On a CPU that costs nothing, and the features of
            an image then do not depend, in their last bits, on how many others are encoded with it.
    """

    def __init__(
        self,
        tower_type: TowerType,
        config: PreTrainedConfig,
        select_layer: int,
        select_feature: str,
        s2_scales: tuple[int, ...] = (),
    ):
        super().__init__()
        facts = tower_type.facts(config)
        self.tower_type = tower_type
        self.num_layers_run = hidden_state_index(select_layer, facts.depth)
        self.num_dropped = facts.num_prefix_tokens if select_feature == "patch" else 0
        self.s2_scales = s2_scales
        self.one_at_a_time = False
        self.input_size = s2_scales[-1] if s2_scales else facts.image_size
        self.width = facts.width * max(1, len(s2_scales))
        # `vision_model.` is in the names of files since LLaVA 1.0; transformers 5.6 dropped it from CLIP's own.
        self.vision_tower = nn.ModuleDict({"vision_model": tower_type.build(config)})

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers, those behind the selected hidden state among them."""
        layers = self.vision_tower["vision_model"].get_submodule(self.tower_type.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

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
        encoder = self.vision_tower["vision_model"]
        hidden_MNC = self.tower_type.encode(encoder, pixel_values.to(self.dtype), self.num_layers_run)
        # Contiguous as features from a file are: in bfloat16 the projector's gradients depend on the layout.
        return hidden_MNC[:, self.num_dropped :].contiguous() if self.num_dropped else hidden_MNC


def hidden_state_index(select_layer: int, num_layers: int) -> int:
    """Number of encoder layers to run to get hidden state `select_layer` of a tower with `num_layers` layers.

    Raises:
        UserError: The tower has no such hidden state.
    """
    index = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= index <= num_layers:
        raise UserError(
            f"mm_vision_select_layer is {select_layer}, but the vision tower has {num_layers} layers: "
            f"allowed are {-num_layers - 1} to {num_layers}."
        )
    return index
