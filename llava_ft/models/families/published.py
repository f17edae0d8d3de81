"""Architectures that are known by name: those of LLaVA v1.5, of v1.6 on Vicuna and of what they are made from.

A plan is often made on a machine that has not got the model; their `config.json` decides all sizes.
"""

from collections.abc import Mapping
from typing import Any, Final


def _vicuna(hidden_size: int, intermediate_size: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), depth),
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    }


_LLAMA_7B: Final = _vicuna(4096, 11008, 32)
_LLAMA_13B: Final = _vicuna(5120, 13824, 40)
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
