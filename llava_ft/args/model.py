"""What the model is made of, and what an unset value of it means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

PROJECTOR_TYPE_PATTERN: Final = re.compile(r"linear|identity|mlp[1-9]\d*x_gelu")
"""Every projector that can be built: one linear layer, none, or N linear layers with GELU between them."""

ORIGINAL_DEFAULTS: Final[Mapping[str, object]] = {
    "vision_tower": None,
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "square",
}
"""What a flag left unset means when the base is no LLaVA checkpoint.

The values are the original's defaults but for `mm_use_im_patch_token`: true there, and false in every
published script since v1, because the entry it adds to the vocabulary is never used.
"""

CHECKPOINT_KEYS: Final[Mapping[str, str]] = {
    name: "mm_vision_tower" if name == "vision_tower" else name for name in ORIGINAL_DEFAULTS
}
"""The key of a LLaVA checkpoint's config.json that holds each of these values."""


@dataclass
class ModelArguments:
    """The language model, the vision tower and the projector between them.

    A field of `ORIGINAL_DEFAULTS` that is None was not given: the LLaVA checkpoint named by
    `model_name_or_path` decides, and for any other base the original's default holds (see
    `resolve_multimodal`).
    """

    model_name_or_path: str = field(
        metadata={
            "help": "Base language model or LLaVA checkpoint: a directory or a Hugging Face name. Required."
        }
    )
    version: str = field(
        default="v1",
        metadata={"help": "Conversation template, such as v1, plain, llama_2 or mistral_instruct."},
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Keep the language model fixed, its output layer included."}
    )
    tune_mm_mlp_adapter: bool = field(
        default=False, metadata={"help": "Train the projector alone (the pretraining stage)."}
    )
    vision_tower: str | None = field(
        default=None,
        metadata={
            "help": "CLIP vision model: a directory or a Hugging Face name. Unset: the LLaVA checkpoint's "
            "own, "
            "else none (text only)."
        },
    )
    mm_vision_select_layer: int | None = field(
        default=None,
        metadata={
            "help": "Hidden state of the tower that is used; -2 is the last but one. Unset: checkpoint, "
            "else -1."
        },
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "mm_projector.bin of a pretraining run, to start the projector from."}
    )
    mm_projector_type: str | None = field(
        default=None,
        metadata={
            "help": "linear, identity or mlpNx_gelu such as mlp2x_gelu. Unset: checkpoint, else linear."
        },
    )
    mm_use_im_start_end: bool | None = field(
        default=None,
        metadata={"help": "Put <im_start> and <im_end> around each image. Unset: checkpoint, else false."},
    )
    mm_use_im_patch_token: bool | None = field(
        default=None,
        metadata={
            "help": "Add <im_patch> to the vocabulary, as old checkpoints did. Unset: checkpoint, else false."
        },
    )
    mm_patch_merge_type: Literal["flat"] | None = field(
        default=None,
        metadata={"help": "How the features of one image are laid out. Unset: checkpoint, else flat."},
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] | None = field(
        default=None,
        metadata={
            "help": "Features of the patches, or with the class token first. Unset: checkpoint, else patch."
        },
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = field(
        default="auto",
        metadata={"help": "Attention kernel. auto: flash_attention_2 where it can run, else sdpa."},
    )


@dataclass(frozen=True, slots=True)
class MultimodalSettings:
    """The fields of `ORIGINAL_DEFAULTS` with nothing left open.

    `vision_tower` is None for a text-only model.
    """

    vision_tower: str | None
    mm_projector_type: str
    mm_vision_select_layer: int
    mm_vision_select_feature: str
    mm_use_im_start_end: bool
    mm_use_im_patch_token: bool
    mm_patch_merge_type: str
    image_aspect_ratio: str


def resolve_multimodal(
    model: ModelArguments, image_aspect_ratio: str | None, checkpoint_config: Mapping[str, object] | None
) -> MultimodalSettings:
    """Fill in what the request left open.

    Args:
        model: As parsed.
        image_aspect_ratio: `DataArguments.image_aspect_ratio` as parsed.
        checkpoint_config: Content of config.json if the base is a LLaVA checkpoint, else None.

    Returns:
        For each field the flag if given, else the checkpoint's value, else the original's default.
    """

    def pick(name: str, requested: object) -> object:
        if requested is not None:
            return requested
        stored = (checkpoint_config or {}).get(CHECKPOINT_KEYS[name])
        return ORIGINAL_DEFAULTS[name] if stored is None else stored

    tower = pick("vision_tower", model.vision_tower)
    return MultimodalSettings(
        vision_tower=None if tower is None else str(tower),
        mm_projector_type=str(pick("mm_projector_type", model.mm_projector_type)),
        mm_vision_select_layer=int(str(pick("mm_vision_select_layer", model.mm_vision_select_layer))),
        mm_vision_select_feature=str(pick("mm_vision_select_feature", model.mm_vision_select_feature)),
        mm_use_im_start_end=bool(pick("mm_use_im_start_end", model.mm_use_im_start_end)),
        mm_use_im_patch_token=bool(pick("mm_use_im_patch_token", model.mm_use_im_patch_token)),
        mm_patch_merge_type=str(pick("mm_patch_merge_type", model.mm_patch_merge_type)),
        image_aspect_ratio=str(pick("image_aspect_ratio", image_aspect_ratio)),
    )
