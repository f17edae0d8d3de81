"""CLIP's image encoder (arXiv:2103.00020)."""

import re
from typing import Final

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_ft.models.towers.tower import TowerType

_TEXT_HALF: Final = re.compile(r"^(?:text_model\.|text_projection\.|visual_projection\.|logit_scale$)")


def _encode(encoder: CLIPVisionModel, pixel_values: torch.Tensor, num_layers: int) -> torch.Tensor:
    hidden = encoder.pre_layrnorm(encoder.embeddings(pixel_values))
    for layer in encoder.encoder.layers[:num_layers]:
        hidden = layer(hidden, None)
    return hidden


def _encoder_name(key: str) -> str | None:
    """Leave out CLIP's text half, which its directories hold too."""
    return None if _TEXT_HALF.search(key) else key.removeprefix("vision_model.")


CLIP = TowerType(
    model_type="clip_vision_model",
    whole_types=("clip",),
    config_class=CLIPVisionConfig,
    fields=(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "image_size",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
        "projection_dim",
    ),
    build=CLIPVisionModel,
    encode=_encode,
    num_prefix_tokens=1,
    encoder_name=_encoder_name,
    sizes=(
        ("hidden_size", "embeddings.position_embedding.weight", 1),
        ("intermediate_size", "encoder.layers.0.mlp.fc1.weight", 0),
        ("num_channels", "embeddings.patch_embedding.weight", 1),
        ("patch_size", "embeddings.patch_embedding.weight", 2),
    ),
    positions="embeddings.position_embedding.weight",
    example="openai/clip-vit-large-patch14-336",
)
