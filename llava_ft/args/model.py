"""What the model is made of, and what an unset value of it means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llava_ft.args.value_types import flag


@dataclass
class ModelArguments:
    """The language model, the vision tower and the projector between them.

    A field of `ORIGINAL_DEFAULTS` that is None was not given: the LLaVA checkpoint named by
    `model_name_or_path` decides, and for any other base the original's default holds (see
    `resolve_multimodal`).
    """

    model_name_or_path: str = field(
        metadata={"help": "Base language model or LLaVA checkpoint: a directory or a Hugging Face name. Required."}
    )
    version: str = flag("v1", "Conversation template, such as v1, plain, llama_2 or mistral_instruct.")
    freeze_backbone: bool = flag(False, "Keep the language model fixed, its output layer included.")
    tune_mm_mlp_adapter: bool = flag(False, "Train the projector alone (the pretraining stage).")
    vision_tower: str | None = flag(
        None,
        "Vision tower: a directory or a Hugging Face name. Unset: the LLaVA checkpoint's own, else none (text only).",
    )
    mm_vision_select_layer: int | None = flag(
        None, "Hidden state of the tower that is used; -2 is the last but one. Unset: checkpoint, else -1."
    )
    pretrain_mm_mlp_adapter: str | None = flag(
        None, "mm_projector.bin of a pretraining run, to start the projector from."
    )
    mm_projector_type: str | None = flag(
        None, "linear, identity or mlpNx_gelu such as mlp2x_gelu. Unset: checkpoint, else linear."
    )
    mm_use_im_start_end: bool | None = flag(
        None, "Put <im_start> and <im_end> around each image. Unset: checkpoint, else false."
    )
    mm_use_im_patch_token: bool | None = flag(
        None, "Add <im_patch> to the vocabulary, as old checkpoints did. Unset: checkpoint, else false."
    )
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] | None = flag(
        None,
        "How the tiles of an anyres image are laid out. flat: one after the other; spatial: as one picture, row by "
        "row; spatial_unpad: the same without padding and with a learnt newline after each row. Unset: checkpoint, "
        "else flat.",
    )
    s2_scales: str | None = flag(
        None,
        "Sides in pixels, such as 336,672,1008, at which the tower sees each image (S2); their features are joined "
        "channel by channel. Unset: checkpoint, else one scale.",
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] | None = flag(
        None, "Features of the patches, or with the class token first. Unset: checkpoint, else patch."
    )
    attn_implementation: Literal[
        "auto", "flash_attention_3", "flash_attention_2", "varlen", "flex_attention", "sdpa", "eager"
    ] = flag(
        "auto",
        "Attention kernel. auto: the first of flash_attention_3, flash_attention_2, varlen and sdpa that is installed "
        "and runs on this machine.",
    )
