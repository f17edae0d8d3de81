"""`config.json` of transformers' own layout of LLaVA, and back.

The layout keeps the language model's fields under `text_config` and the tower's under `vision_config`, leaves out what
has its default, and knows two models: `llava`, one picture of the tower's size an image, and `llava_next`, which is
anyres with `spatial_unpad`. How an image becomes square is said by the processor's files and not by this one.

What a native configuration holds beyond that is written under one key of our own (`NATIVE_KEY`), which transformers
keeps and otherwise ignores, so that nothing is lost on the way there and back.
"""

from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from llava_ft.errors import CheckpointError
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families import family_of
from llava_ft.models.families.llama import LLAMA, LlavaLlamaConfig
from llava_ft.models.towers import find_tower, tower_fields
from llava_ft.models.towers.clip import CLIP

NATIVE_KEY: Final = "llava_ft"
"""Where a `config.json` of transformers' layout keeps the native fields that the layout has no place for."""

MODEL_CLASSES: Final = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
"""The models of this layout, by the `model_type` of their `config.json`."""

_CONFIG_CLASSES: Final = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
_NOT_SETTINGS: Final = (
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map",
    "quantization_config", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type",
)  # fmt: skip
"""What a configuration holds beside the model's settings: where it comes from, and the library's own switches."""

_ROPE_TWICE: Final = ("rope_theta", "rope_scaling")
"""transformers 4's names for what is in `rope_parameters`."""

_SELECT_FEATURES: Final = {"default": "patch", "full": "cls_patch"}
_OPENAI_TOWERS: Final = {224: "openai/clip-vit-large-patch14", 336: "openai/clip-vit-large-patch14-336"}


def is_hf_config(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a LLaVA model in transformers' own layout."""
    return fields.get("model_type") in _CONFIG_CLASSES and ("text_config" in fields or "vision_config" in fields)


def native_fields(hf: Mapping[str, Any], where: str = "The model") -> dict[str, Any]:
    """Return our `config.json`'s fields for the content of one of transformers' own layout.

    Args:
        hf: The content, as the library writes it: what has its default may be left out.
        where: The directory, for messages.

    Returns:
        The fields, defaults filled in. `unfreeze_mm_vision_tower` is true, which tells original LLaVA that the tower's
        weights are in the checkpoint. `image_aspect_ratio` is `square` for `llava`, whose CLIP processor resizes the
        shorter edge and crops; a processor that pads has to be looked for in the directory.

    Raises:
        CheckpointError: It is damaged, or describes what cannot be built here.
    """
    kind = hf.get("model_type")
    if kind not in _CONFIG_CLASSES:
        raise CheckpointError(f"{where} is a {kind!r} model; known in this layout are {' and '.join(_CONFIG_CLASSES)}.")
    try:
        config = cast("Any", _CONFIG_CLASSES[kind]).from_dict(dict(hf))
    except Exception as error:  # whatever the library's checks raise is about this file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"The config.json of {where} cannot be read: {reason}. Is it complete, and as transformers wrote it?"
        ) from None
    text, vision = config.text_config, config.vision_config
    _check_supported(config, where)
    assert isinstance(text, LlamaConfig)
    assert isinstance(vision, CLIPVisionConfig)
    pad_ids = (getattr(each, "pad_token_id", None) for each in (text, config))
    # OpenAI's tower of this architecture, for programs that look it up by name; the weights are inside.
    large = (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.intermediate_size)
    assert isinstance(vision.image_size, int)
    fields: dict[str, Any] = {key: value for key, value in text.to_dict().items() if key not in _NOT_SETTINGS}
    fields |= {
        "model_type": LlavaLlamaConfig.model_type,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "pad_token_id": next((i for i in pad_ids if isinstance(i, int) and 0 <= i < text.vocab_size), None),
        "mm_vision_tower": _OPENAI_TOWERS.get(vision.image_size) if large == (1024, 24, 14, 4096) else None,
        "mm_vision_config": tower_fields(vision.to_dict(), where),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": _SELECT_FEATURES[config.vision_feature_select_strategy],
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,
    }
    if kind == "llava_next":
        pinpoints = [[width, height] for height, width in config.image_grid_pinpoints]
        fields |= {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
        fields["image_grid_pinpoints"] = pinpoints
    beyond = hf.get(NATIVE_KEY)
    return fields | dict(cast("Mapping[str, Any]", beyond) if isinstance(beyond, Mapping) else {})


def hf_fields(config: LlavaModelConfig, *, image_token_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the `config.json` of transformers' own layout for a model.

    Args:
        config: The native configuration. Its `vocab_size` is the number of rows that the files hold, the row of
            `image_token_id` among them.
        image_token_id: Id of the token that stands for one feature of an image.
        dtype: Type of the weights in the files.

    Raises:
        CheckpointError: The layout cannot hold this model.
    """
    reason = why_not_hf(config)
    if reason is not None:
        raise CheckpointError(f"transformers' own layout cannot hold this model: {reason} Keep the native layout.")
    geometry = config.image_geometry
    assert config.mm_vision_config is not None
    assert geometry is not None
    is_next = geometry.merge_type == "spatial_unpad"
    type_name = str(dtype).removeprefix("torch.")
    # The language model's fields, with transformers 4's names beside those of 5.
    names, every = {*LlamaConfig().to_dict(), *_ROPE_TWICE} - {*_NOT_SETTINGS}, config.to_dict()
    types = {"dtype": type_name, "torch_dtype": type_name}
    text = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **types}
    text |= {key: every[key] for key in sorted(names) if key in every}
    fields: dict[str, Any] = {
        "architectures": [MODEL_CLASSES["llava_next" if is_next else "llava"]],
        "model_type": "llava_next" if is_next else "llava",
        "dtype": type_name,
        "torch_dtype": type_name,
        "ignore_index": -100,
        "image_token_index": image_token_id,
        "image_seq_length": geometry.tokens_per_tile,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": {v: k for k, v in _SELECT_FEATURES.items()}[config.mm_vision_select_feature],
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", **config.mm_vision_config},
    }
    if is_next:
        fields["image_grid_pinpoints"] = [[height, width] for width, height in geometry.grid_pinpoints]
        fields["use_image_newline_parameter"] = True
    known = {**LlavaLlamaConfig().to_dict(), **native_fields(fields)}  # pyright: ignore[reportCallIssue]
    beyond = {
        key: value
        for key, value in ({"unfreeze_mm_vision_tower": False} | config.to_dict()).items()
        if key not in (*_NOT_SETTINGS, *_ROPE_TWICE) and known.get(key) != value
    }
    return fields | ({NATIVE_KEY: beyond} if beyond else {})


def why_not_hf(config: LlavaModelConfig) -> str | None:
    """Say why transformers' own layout cannot hold a model; None if it can."""
    geometry = config.image_geometry
    if geometry is None:
        return "it is a text-only model, and the layout is one of images and text."
    assert config.mm_vision_config is not None
    if family_of(config) is not LLAMA:
        return f"its language model is a {family_of(config).model_type}, and LLaMA alone is written."
    if (tower := find_tower(config.mm_vision_config)) is not CLIP:
        return f"its vision tower is a {tower and tower.model_type}, and CLIP alone is written."
    if config.mm_projector_type != "mlp2x_gelu":
        return f"its projector is {config.mm_projector_type}, and the layout knows mlp2x_gelu alone."
    if config.s2:
        return f"its tower sees images at several scales (s2: {config.s2_scales}), and the layout's at one."
    tiled, merge_type = config.image_aspect_ratio.startswith("anyres"), config.mm_patch_merge_type
    if tiled and config.image_aspect_ratio != "anyres":
        return f"image_aspect_ratio is {config.image_aspect_ratio}, and the layout has no bound for an image's tokens."
    if tiled != (merge_type == "spatial_unpad") or merge_type not in ("flat", "spatial_unpad"):
        return (
            f"mm_patch_merge_type is {merge_type} with image_aspect_ratio {config.image_aspect_ratio}; the layout has "
            "spatial_unpad with anyres, and flat without."
        )
    if tiled and config.mm_vision_select_feature != "patch":
        return f"mm_vision_select_feature is {config.mm_vision_select_feature}; with anyres the layout has patch alone."
    return None


def _check_supported(config: Any, where: str) -> None:
    text, vision = config.text_config, config.vision_config
    if text.model_type != "llama":
        raise CheckpointError(
            f"The language model of {where} is a {text.model_type!r}. Supported are LLaVA models on language models of "
            "LLaMA's architecture (text_config.model_type 'llama'), such as llava-hf/llava-1.5-7b-hf."
        )
    if vision.model_type != "clip_vision_model":
        raise CheckpointError(
            f"The vision tower of {where} is a {vision.model_type!r}. Supported are CLIP's (vision_config.model_type "
            "'clip_vision_model'), such as that of llava-hf/llava-1.5-7b-hf."
        )
    selects = "vision_feature_select_strategy"
    is_fine = config.model_type != "llava_next" or getattr(config, selects) == "default"
    checks = [
        ("vision_feature_layer", isinstance(config.vision_feature_layer, int), "one layer"),
        ("projector_hidden_act", config.projector_hidden_act == "gelu", "'gelu'"),
        ("multimodal_projector_bias", bool(config.multimodal_projector_bias), "a projector with bias, true"),
        (selects, is_fine, "'default' with llava_next"),
    ]
    for key, is_fine, supported in checks:
        if not is_fine:
            raise CheckpointError(
                f"{key} of {where} is {getattr(config, key)!r}; supported is {supported}. Use a model trained so."
            )
