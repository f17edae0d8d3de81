"""What a family of language models says of itself."""

from dataclasses import dataclass
from typing import Literal

from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.llava import LlavaForCausalLM


@dataclass(frozen=True)
class Family:
    """A family of language models: data, no logic.

    Attributes:
        model_type: `model_type` of the `config.json` of a language model alone.
        model_class: LLaVA on this language model. Its name is written into `config.json` as the architecture.
        config_class: Configuration of `model_class`.
        llava_types: `model_type` of a LLaVA model's `config.json` in the native layout; the first is written.
        inputs: The linear layers of a decoder layer that read what goes into it.
        sizes: Of fields of the configuration the parameter in a decoder layer, and its dimension, that prove them to be
            true; see `checkpoint/config_check.py`.
        layer_form: Whose form the decoder's layers have, as `models/kernels` and `tuning/kernels` are written for one;
            None runs them as transformers has them.
        example: A language model of this family, for messages.
    """

    model_type: str
    model_class: type[LlavaForCausalLM]
    config_class: type[LlavaModelConfig]
    llava_types: tuple[str, ...]
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    sizes: tuple[tuple[str, str, int], ...] = (
        ("intermediate_size", "mlp.gate_proj.weight", 0),
        ("query_width", "self_attn.q_proj.weight", 0),
    )
    layer_form: Literal["llama"] | None = None
    example: str = ""
