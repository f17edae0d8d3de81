"""Faster ways to compute decoder layers with adapters, each written for one form of layer; see `models/kernels`."""

from typing import Any

from llava_ft.models.families import family_of


def why_not_fast(config: Any) -> str | None:
    """Say why there is no such kernel for a model's decoder layers; None if there is one."""
    family = family_of(config)
    if family.layer_form != "llama":
        return f"there is no kernel for the layers of {family.model_type}"
    if config.attention_bias or config.mlp_bias:
        return "its linear layers have biases"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act} and not silu"
    return None
