"""What a model is made of, from its `config.json` alone; no weight file is needed or opened.

A plan is often made on a machine that has not got the model. So a directory with nothing but `config.json` is enough,
and the architectures of LLaVA v1.5, of v1.6 on Vicuna and of what they are made from are known here. They are copied
from the `config.json` that the models were published with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llava_ft.checkpoint.directory import read_config
from llava_ft.checkpoint.names import CONFIG
from llava_ft.errors import CheckpointError

_LLAMA_7B: Final = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
_LLAMA_13B: Final = _LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_LLAVA_V1_5: Final = {
    "model_type": "llava_llama",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}
_LLAVA_V1_6: Final = _LLAVA_V1_5 | {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_patch_merge_type": "spatial_unpad",
    "unfreeze_mm_vision_tower": True,
}
PUBLISHED: Final[Mapping[str, Mapping[str, Any]]] = {
    "lmsys/vicuna-7b-v1.5": _LLAMA_7B,
    "lmsys/vicuna-13b-v1.5": _LLAMA_13B,
    "liuhaotian/llava-v1.5-7b": _LLAMA_7B | _LLAVA_V1_5,
    "liuhaotian/llava-v1.5-13b": _LLAMA_13B | _LLAVA_V1_5,
    "liuhaotian/llava-v1.6-vicuna-7b": _LLAMA_7B | _LLAVA_V1_6,
    "liuhaotian/llava-v1.6-vicuna-13b": _LLAMA_13B | _LLAVA_V1_6,
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
}
"""Content of `config.json` by name on the hub, as far as it decides sizes."""


@dataclass(frozen=True)
class Architecture:
    """What is known of a model without its weights.

    Attributes:
        fields: Content of `config.json`.
        directory: Where it is, if it is on this machine.
        is_published: Whether the fields are those of `PUBLISHED`, because the model is not on this machine.
    """

    fields: Mapping[str, Any]
    directory: Path | None
    is_published: bool = False


def find_architecture(name: str, *, cache_dir: str | None = None, relative_to: Path | None = None) -> Architecture:
    """Find a model's `config.json`.

    Looked at in this order: the directory of that name, the local cache of the Hugging Face hub, `PUBLISHED`, the hub.

    Args:
        name: A directory, or `owner/name` on the hub.
        cache_dir: Where downloads are kept; the hub's own default when absent.
        relative_to: Another directory that a relative path may start from.

    Raises:
        CheckpointError: It is nowhere.
    """
    for candidate in (Path(name), *([relative_to / name] if relative_to else [])):
        if candidate.is_dir():
            return Architecture(_read_config(candidate), candidate)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"The model directory {name} does not exist. Give a directory with {CONFIG} in it.")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, CONFIG, cache_dir=cache_dir)
    if isinstance(cached, str):
        return Architecture(_read_config(Path(cached).parent), Path(cached).parent)
    if name in PUBLISHED:
        return Architecture(PUBLISHED[name], None, is_published=True)
    try:
        fetched = Path(hf_hub_download(name, CONFIG, cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is no directory here, and its {CONFIG} could not be fetched from the Hugging Face hub: "
            f"{str(error).splitlines()[0]}. Give a directory with {CONFIG} in it; weights are not needed to plan. "
            f"Known without any file are {', '.join(PUBLISHED)}."
        ) from None
    return Architecture(_read_config(fetched.parent), fetched.parent)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG).is_file():
        names = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{directory} has no {CONFIG}, which says what the model is made of. It holds {names}. Give the directory "
            "of a whole model; an adapter goes into --lora_weight_path."
        )
    return read_config(directory)[0]
