"""Building a LLaVA model without memory, and settling its configuration from a directory and the user's wishes."""

import logging
from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights

from llava_ft.constants import CHECKPOINT_FIELDS, ORIGINAL_DEFAULTS
from llava_ft.errors import UserError
from llava_ft.geometry import (
    DEFAULT_GRIDS,
    DEFAULT_S2_SCALES,
    parse_grid_pinpoints,
    parse_s2_scales,
)
from llava_ft.models.architecture import make_config
from llava_ft.models.attention.kernels import fitting_kernel, register
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families import family_of, find_family, known_families
from llava_ft.models.kernels.last_layer import read_last_layer_selectively
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.projectors import find_projector
from llava_ft.models.towers import describe_tower
from llava_ft.models.towers.tower import SELECT_FEATURES, TowerFacts, hidden_state_index

logger = logging.getLogger(__name__)

# `auto_map` names code in the directory, which is never run; `num_labels` makes transformers build a table of labels.
_NOT_TAKEN_OVER = ("model_type", "architectures", "torch_dtype", "auto_map", "num_labels", "id2label", "label2id")


def is_llava_config(fields: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a LLaVA model in the native layout."""
    family = find_family(fields)
    is_named = family is not None and fields.get("model_type") == family.llava_types[0]
    return "mm_projector_type" in fields or "mm_hidden_size" in fields or is_named


def checkpoint_wishes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the `config.json` of something trained on a base asks of the whole model; see `settle_config`."""
    wishes = {key: fields.get(key) for key in CHECKPOINT_FIELDS}
    wishes["s2_scales"] = (fields.get("s2_scales") or DEFAULT_S2_SCALES) if fields.get("s2") else None
    return wishes


def settle_config(
    base: Mapping[str, Any],
    where: str,
    *,
    wishes: Mapping[str, Any],
    vision_tower: str | None,
    vision: Mapping[str, Any] | None,
    projector_is_replaced: bool = False,
) -> LlavaModelConfig:
    """Settle the configuration of the model to build.

    What the user asks for comes first, then what a LLaVA checkpoint says, then `ORIGINAL_DEFAULTS`.

    Args:
        base: Content of the base model's `config.json`: a language model's or a LLaVA checkpoint's.
        where: The base model's directory, for messages.
        wishes: Fields the user set, by name; None is "not set".
        vision_tower: Name of the vision tower, or None for a text-only model.
        vision: Architecture of the tower, as `tower_fields` gives it.
        projector_is_replaced: Whether the projector's weights come from a file of their own, so that the type may
            differ from the checkpoint's.

    Raises:
        UserError: The base is of no known family, a wish is impossible, or it contradicts the checkpoint's weights.
    """
    family = find_family(base)
    if family is None:
        raise UserError(_unsupported_base(base, where))
    fields = {key: value for key, value in base.items() if key not in _NOT_TAKEN_OVER}
    was_llava = is_llava_config(base)
    for key, default in ORIGINAL_DEFAULTS.items():
        wish = wishes.get(key)
        known = base.get(key) if was_llava else None
        if wish is not None and known is not None and wish != known:
            if key == "mm_projector_type" and not projector_is_replaced:
                find_projector(wish)  # raises that there is no such type
                raise UserError(
                    f"mm_projector_type is {wish!r}, but the projector in {where} is {known!r}. Leave the flag out, or "
                    "give a projector file of that type with --pretrain_mm_mlp_adapter."
                )
            logger.warning("%s: %s instead of %s, which %s was trained with.", key, wish, known, where)
        fields[key] = wish if wish is not None else known if known is not None else default
    fields["mm_vision_tower"] = vision_tower if vision else None
    fields["mm_vision_config"] = dict(vision) if vision else None
    tower = describe_tower(vision)[2] if vision else None
    fields["mm_hidden_size"] = tower.width if tower else None
    fields["use_mm_proj"] = tower is not None
    if tower is not None:
        _settle_resolution(fields, wishes, tower, where if was_llava else "")
    config = make_config(family.config_class, fields, where)
    config._name_or_path = where  # what PEFT calls an adapter's base; the file names the base's own base
    config.architectures = [family.model_class.__name__]
    _check(config)
    return config


def build_skeleton(config: LlavaModelConfig, *, attn_implementation: str = "sdpa") -> LlavaForCausalLM:
    """Build the model with its parameters on the meta device and its buffers in memory.

    Args:
        config: The model's configuration.
        attn_implementation: Attention of the language model: one of `attention/kernels.py`. If it does not go with the
            model, sdpa or eager, which computes the same, takes its place.

    Raises:
        UserError: There is no such kernel, its package is not installed, or no such padding token.
    """
    family = family_of(config)
    if config.pad_token_id is not None and not -1 <= config.pad_token_id < config.vocab_size:
        raise UserError(
            f"pad_token_id of {config._name_or_path} is {config.pad_token_id:,}, and it has {config.vocab_size:,} "
            "tokens. Set it in config.json to one of these, or leave it out."
        )
    config._attn_implementation = register(fitting_kernel(attn_implementation, config))
    with init_empty_weights(include_buffers=False):
        model = family.model_class(config)
    if family.layer_form is not None:
        read_last_layer_selectively(model.model.layers)
    if config.tie_word_embeddings:  # each was moved off memory by itself
        model.lm_head.weight = model.model.embed_tokens.weight
    model.requires_grad_(False)
    return model


def _settle_resolution(fields: dict[str, Any], wishes: Mapping[str, Any], tower: TowerFacts, where: str) -> None:
    """Settle what depends on the tower's size: the sizes of tiled pictures and the scales of S2.

    Args:
        fields: The configuration so far, which holds what the base says; changed in place.
        wishes: Fields the user set.
        tower: Sizes of the tower.
        where: Directory of a LLaVA checkpoint, for messages; "" for another base.
    """
    side = tower.image_size
    if str(fields["image_aspect_ratio"]).startswith("anyres"):
        known = fields.get("image_grid_pinpoints")
        wish = wishes.get("image_grid_pinpoints")
        default = [(columns * side, rows * side) for columns, rows in DEFAULT_GRIDS]
        pinpoints = parse_grid_pinpoints(wish or known or default, side)
        if wish and known and pinpoints != parse_grid_pinpoints(known, side):
            logger.warning("image_grid_pinpoints: %s instead of %s, which %s was trained with.", wish, known, where)
        fields["image_grid_pinpoints"] = [list(size) for size in pinpoints]
    known_scales = (fields.get("s2_scales") or DEFAULT_S2_SCALES) if fields.get("s2") else None
    scales = wishes.get("s2_scales") or known_scales
    fields["s2"] = scales is not None
    fields["s2_scales"] = None
    if scales is not None:
        settled = parse_s2_scales(scales)
        if known_scales is not None and settled != parse_s2_scales(known_scales):
            logger.warning("s2_scales: %s instead of %s, which %s was trained with.", scales, known_scales, where)
        fields["s2_scales"] = ",".join(map(str, settled))
        fields["mm_hidden_size"] = tower.width * len(settled)


def _check(config: LlavaModelConfig) -> None:
    if config.mm_vision_select_feature not in SELECT_FEATURES:
        raise UserError(
            f"mm_vision_select_feature is {config.mm_vision_select_feature!r}; allowed are "
            f"{' and '.join(SELECT_FEATURES)}."
        )
    projector, tower = find_projector(config.mm_projector_type), config.tower_facts
    if tower is None:
        return
    hidden_state_index(config.mm_vision_select_layer, tower.depth)
    _ = config.image_geometry  # raises what contradicts itself
    if projector.keeps_width and config.mm_hidden_size != config.hidden_size:
        raise UserError(
            f"mm_projector_type is {config.mm_projector_type}, but the vision tower is {config.mm_hidden_size} wide "
            f"and the language model {config.hidden_size}. Use linear or mlp2x_gelu."
        )


def _unsupported_base(base: Mapping[str, Any], where: str) -> str:
    kind = base.get("model_type")
    if "text_config" in base:
        return (
            f"{where} is a {kind!r} model. Of the models in transformers' own layout 'llava' and 'llava_next' are "
            "supported, such as llava-hf/llava-1.5-7b-hf; beside them models in LLaVA's native layout, such as "
            "liuhaotian/llava-v1.5-7b, and language models."
        )
    known = ", ".join(f"{family.model_type} (such as {family.example})" for family in known_families())
    return f"{where} is a {kind!r} model. Supported language models: {known}, and LLaVA models built on them."
