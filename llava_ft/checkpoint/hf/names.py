"""What a parameter is called in transformers' own layout of LLaVA.

There are two spellings. Files on the hub say `language_model.model.layers.0...` and `vision_tower.vision_model...`, as
the modules were called up to transformers 4.51; every version reads them. The modules of later versions are called
`model.language_model.layers.0...`, which is what the keys of PEFT's adapters follow. Both are read by
`llava_ft.checkpoint.names.native_name`; here is the way out.
"""

import re
from collections.abc import Sequence
from typing import Final

from llava_ft.errors import CheckpointError
from llava_ft.models.parts import VISION_PREFIX

_Rules = Sequence[tuple[re.Pattern[str], str]]


def _rules(vision: str, projector: str, newline: str, head: str, language_model: str) -> _Rules:
    """Put the beginnings of native names beside those of another spelling, the more special ones first."""
    return (
        (re.compile(re.escape(VISION_PREFIX)), vision),
        (re.compile(r"model\.mm_projector\.0(?=\.|$)"), f"{projector}linear_1"),
        (re.compile(r"model\.mm_projector\.2(?=\.|$)"), f"{projector}linear_2"),
        (re.compile(r"model\.image_newline$"), newline),
        (re.compile(r"lm_head(?=\.|$)"), head),
        (re.compile(r"model\.(?=(?:embed_tokens|layers|norm)(?:\.|$))"), language_model),
    )


_HUB: Final = _rules(
    vision="vision_tower.vision_model.",
    projector="multi_modal_projector.",
    newline="image_newline",
    head="language_model.lm_head",
    language_model="language_model.model.",
)
_MODULES: Final = _rules(
    vision="model.vision_tower.",
    projector="model.multi_modal_projector.",
    newline="model.image_newline",
    head="lm_head",
    language_model="model.language_model.",
)


def hub_name(native: str) -> str:
    """Return the key of a parameter in model files, in the spelling of the checkpoints on the hub.

    Raises:
        CheckpointError: The layout has no place for it.
    """
    return _rename(native, _HUB)


def module_name(native: str) -> str:
    """Return the name that a parameter, a module or a LoRA matrix has in a model that transformers has loaded.

    Raises:
        CheckpointError: The layout has no place for it.
    """
    return _rename(native, _MODULES)


def _rename(native: str, rules: _Rules) -> str:
    for pattern, beginning in rules:
        if match := pattern.match(native):
            return beginning + native[match.end() :]
    raise CheckpointError(
        f"transformers' layout of LLaVA has no place for {native}. It holds a LLaMA language model, a CLIP vision "
        "tower, a projector of two layers (mlp2x_gelu) and, with anyres, image_newline. Keep the native layout."
    )
