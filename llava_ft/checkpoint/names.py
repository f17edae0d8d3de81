"""The names of tensors and files: the one place that knows how a parameter is called on disk.

In memory and in a full checkpoint a parameter has its native LLaVA name, `model.mm_projector.0.weight`. Files of LoRA
runs put PEFT's prefix before it, `base_model.model.model.mm_projector.0.weight`; data-parallel wrappers put `module.`
before that; transformers' own layout calls it `multi_modal_projector.linear_1.weight`. `native_name` undoes all of it.
The directory of a vision tower knows nothing of `model.vision_tower`: see `TowerType.native_name`.
"""

import re
from typing import Final

from llava_ft.models.parts import VISION_PREFIX

ADAPTER_BIN: Final = "adapter_model.bin"
ADAPTER_SAFETENSORS: Final = "adapter_model.safetensors"
ADAPTER_ALL_BIN: Final = "adapter_model_all.bin"
ADAPTER_CONFIG: Final = "adapter_config.json"
NON_LORA_BIN: Final = "non_lora_trainables.bin"
NON_LORA_SAFETENSORS: Final = "non_lora_trainables.safetensors"
PROJECTOR_BIN: Final = "mm_projector.bin"
PROJECTOR_SAFETENSORS: Final = "mm_projector.safetensors"
CONFIG: Final = "config.json"
PREPROCESSOR_CONFIG: Final = "preprocessor_config.json"
GENERATION_CONFIG: Final = "generation_config.json"
RUN_CONFIG: Final = "run_config.yaml"
TRAINABLE_TABLE: Final = "trainable_parameters.json"
MANIFEST: Final = "llava_ft.json"
TRAINER_STATE: Final = "trainer_state.json"
OPTIMIZER: Final = "optimizer.pt"
SCHEDULER: Final = "scheduler.pt"
RANKS: Final = "ranks.json"

PEFT_PREFIX: Final = "base_model.model."
PROJECTOR_PREFIX: Final = "model.mm_projector."
IMAGE_NEWLINE: Final = "model.image_newline"
EMBEDDINGS: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
NEW_ROWS_SUFFIX: Final = ".new_rows"

_WRAPPERS = re.compile(r"^(?:module\.|base_model\.model\.|_fsdp_wrapped_module\.|_orig_mod\.)+")
_PEFT_MODULE_COPY = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_PEFT_ADAPTER = re.compile(r"(\.lora_[A-Za-z_]+)\.(?!(?:weight|bias)$)[^.]+(?=\.|$)")
_BARE = (
    "mm_projector.", "vision_tower.", "embed_tokens.", "layers.", "norm.", "image_newline", "multi_modal_projector.",
)  # fmt: skip
_TRANSFORMERS_LAYOUT = (
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?lm_head(?=\.|$)"), "lm_head"),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "model."),
    (re.compile(r"^model\.multi_modal_projector\.linear_1(?=\.|$)"), "model.mm_projector.0"),
    (re.compile(r"^model\.multi_modal_projector\.linear_2(?=\.|$)"), "model.mm_projector.2"),
    (re.compile(r"^model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(?=.)"), VISION_PREFIX),
)
_TRANSFORMERS_SPELLING = re.compile(
    r"^(?:model\.)*(?:language_model\.|multi_modal_projector\.|vision_tower\.(?!vision_tower\.))"
)
_DERIVED = re.compile(r"(?:rotary_emb\.inv_freq|embeddings\.position_ids)$")


def native_name(key: str) -> str:
    """Return the native LLaVA name of a key from a model, adapter or projector file of any layout.

    `base_model.model.model.mm_projector.0.weight`, `module.model.mm_projector.0.weight`, `mm_projector.0.weight` and
    `multi_modal_projector.linear_1.weight` are all `model.mm_projector.0.weight`. What PEFT puts into the names of its
    own parameters, the adapter's name in `lora_A.default.weight` and `modules_to_save`, is taken out.
    """
    name = _WRAPPERS.sub("", key)
    name = re.sub(r"^(?:model\.)+", "model.", name)
    if name.startswith(_BARE):
        name = "model." + name
    name = _PEFT_ADAPTER.sub(r"\1", _PEFT_MODULE_COPY.sub("", name))
    for pattern, beginning in _TRANSFORMERS_LAYOUT:
        name = pattern.sub(beginning, name)
    return name


def plain_name(name: str) -> str:
    """Return a parameter's native name without the adapter's name: the name it has in every kind of file."""
    return native_name(name).replace(".default.", ".").replace(".base_layer.", ".")


def is_transformers_spelling(key: str) -> bool:
    """Whether a key is spelled as in transformers' own layout, so that no program of LLaVA's native layout wrote it."""
    return _TRANSFORMERS_SPELLING.search(_WRAPPERS.sub("", key)) is not None


def is_derived(name: str) -> bool:
    """Whether a tensor follows from the configuration and is not a weight, such as rotary frequencies."""
    return _DERIVED.search(name) is not None


def adapter_name(name: str) -> str:
    """Return the key of a LoRA parameter in an adapter file, given its name in a PEFT model."""
    return re.sub(r"\.default(?=\.|$)", "", name)
