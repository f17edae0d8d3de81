"""What the two GGUF files say about a model, and what llama.cpp could not carry out.

The keys are those of llama.cpp's architectures `llama` and `clip`. Of the tower only the layers in front of the
selected features are there, and `clip.vision.feature_layer` names the last one: without it llama.cpp stops one layer
earlier.
"""

from typing import Any, Final, cast

import torch

from llava_ft.convert.gguf_file import Fields, num_tower_layers, real
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.errors import CheckpointError
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families import family_of
from llava_ft.models.families.llama import LLAMA
from llava_ft.models.towers import describe_tower
from llava_ft.models.towers.clip import CLIP

_FILE_TYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
_QUANTIZATION_VERSION: Final = 2
_ACTIVATIONS: Final = ("quick_gelu", "gelu")
_ELSEWHERE: Final = "Export with --format llava instead."


def check_expressible(config: LlavaModelConfig) -> None:
    """Check that llama.cpp can run a model like this one.

    Raises:
        CheckpointError: It cannot; the message says what stands in the way.
    """
    obstacles: list[str] = []
    if family_of(config) is not LLAMA:
        obstacles.append(f"its language model is a {family_of(config).model_type}, and only LLaMA is exported")
    rope_type = _rope(config).get("rope_type", "default")
    if rope_type not in ("default", "linear"):
        obstacles.append(f"its rotary embedding is scaled by {rope_type!r}, and only linear scaling is exported")
    if config.hidden_act != "silu":
        obstacles.append(f"its language model uses {config.hidden_act!r}, and llama.cpp's LLaMA uses silu")
    if config.mm_vision_config is not None:
        tower, architecture, _ = describe_tower(config.mm_vision_config)
        vision: Any = architecture
        if config.mm_projector_type != "mlp2x_gelu":
            obstacles.append(
                f"its projector is {config.mm_projector_type}, and llama.cpp's has two linear layers with GELU between "
                "them (mlp2x_gelu)"
            )
        if config.s2:
            obstacles.append("it sees each image at several scales (S2), and llama.cpp at one")
        if config.mm_vision_select_feature != "patch":
            obstacles.append(
                f"it keeps the class token (mm_vision_select_feature={config.mm_vision_select_feature}), and llama.cpp "
                "drops it"
            )
        if num_tower_layers(config) == 0:
            obstacles.append("it reads the tower's embeddings, and llama.cpp runs one layer at least")
        if tower is not CLIP:
            obstacles.append(f"its vision tower is a {tower.model_type}, and only CLIP is exported")
        elif vision.hidden_act not in _ACTIVATIONS:
            obstacles.append(
                f"its vision tower uses {vision.hidden_act!r}, and llama.cpp's CLIP {' or '.join(_ACTIVATIONS)}"
            )
        elif vision.num_channels != 3:
            obstacles.append(f"its vision tower takes {vision.num_channels} channels, and llama.cpp gives 3")
    if obstacles:
        raise CheckpointError(f"This model cannot be exported to GGUF: {'; '.join(obstacles)}. {_ELSEWHERE}")


def check_image_settings(settings: ImageProcessorSettings) -> None:
    """Check that llama.cpp, which reads mean and deviation alone, normalises images as the model expects.

    Raises:
        CheckpointError: Pixels are scaled in another way.
    """
    if not settings.do_rescale or not settings.do_normalize or abs(settings.rescale_factor * 255 - 1) > 1e-6:
        raise CheckpointError(
            f"The model's images are prepared with do_rescale={settings.do_rescale}, do_normalize="
            f"{settings.do_normalize} and rescale_factor={settings.rescale_factor}; llama.cpp always divides by 255 "
            f"and normalises. {_ELSEWHERE}"
        )


def differences(config: LlavaModelConfig) -> list[str]:
    """Say in what llama.cpp treats images otherwise than the model was trained, though it reads the files."""
    if config.mm_vision_config is None:
        return []
    found = [
        "many builds of llama.cpp put the class token behind the patches (its issue 25814) and so misread every CLIP "
        "tower: docs/how-to/gguf.md has the test and the one-line correction"
    ]
    aspect_ratio = config.image_aspect_ratio
    if aspect_ratio == "square":
        found.append(
            "llama.cpp pads an image to a square; this model was trained on images cropped to one "
            "(image_aspect_ratio=square)"
        )
    if aspect_ratio.startswith("anyres"):
        found.append(
            "llama.cpp puts the tiles of a large image one after another and an image no larger than the tower's "
            "input in one piece; this model was trained on every image in tiles"
            + (
                ", arranged in rows with image_newline behind each and the padding cut off"
                if config.has_image_newline
                else ""
            )
        )
    return found


def language_fields(config: LlavaModelConfig, name: str, dtype: torch.dtype) -> Fields:
    """Describe the language model, all but its vocabulary."""
    rope = _rope(config)
    head_dim = config.head_width
    fields: Fields = {
        "general.type": "model",
        **_general_fields(name, dtype),
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": real(config.rms_norm_eps),
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": real(rope.get("rope_theta", 10000.0)),
    }
    if rope.get("rope_type") == "linear":
        fields["llama.rope.scaling.type"] = "linear"
        fields["llama.rope.scaling.factor"] = real(rope["factor"])
    return fields


def vision_fields(config: LlavaModelConfig, settings: ImageProcessorSettings, name: str, dtype: torch.dtype) -> Fields:
    """Describe the vision tower and the projector."""
    assert config.mm_vision_config is not None
    vision: Any = describe_tower(config.mm_vision_config)[1]
    num_layers = num_tower_layers(config)
    fields: Fields = {
        "general.type": "mmproj",
        **_general_fields(name, dtype),
        "general.description": "vision tower and projector of a LLaVA model",
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.hidden_act == "gelu",
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.projection_dim": config.hidden_size,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": real(vision.layer_norm_eps),
        "clip.vision.block_count": num_layers,
        "clip.vision.feature_layer": [num_layers],
        "clip.vision.image_mean": [real(value) for value in settings.image_mean],
        "clip.vision.image_std": [real(value) for value in settings.image_std],
        "clip.vision.image_aspect_ratio": config.image_aspect_ratio,
        "clip.vision.mm_patch_merge_type": config.mm_patch_merge_type,
    }
    geometry = config.image_geometry
    assert geometry is not None
    if geometry.grid_pinpoints:
        sizes = [side for width_height in geometry.grid_pinpoints for side in width_height]
        fields["clip.vision.image_grid_pinpoints"] = sizes
    return fields


def _general_fields(name: str, dtype: torch.dtype) -> Fields:
    return {
        "general.name": name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": _QUANTIZATION_VERSION,
    }


def _rope(config: LlavaModelConfig) -> dict[str, Any]:
    return dict(cast("Any", config).rope_parameters or {})
