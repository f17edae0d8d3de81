"""LLaMA, and models of its architecture such as Vicuna."""

from transformers import LlamaConfig, LlamaForCausalLM

from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families.family import Family
from llava_ft.models.llava import LlavaForCausalLM


class LlavaLlamaConfig(LlavaModelConfig, LlamaConfig):
    """Configuration of LLaVA on LLaMA."""

    model_type = "llava_llama"


class LlavaLlamaForCausalLM(LlavaForCausalLM, LlamaForCausalLM):
    """LLaVA on LLaMA."""

    config_class = LlavaLlamaConfig


LLAMA = Family(
    model_type="llama",
    model_class=LlavaLlamaForCausalLM,
    config_class=LlavaLlamaConfig,
    # What original LLaVA's own releases and their copies are called.
    llava_types=("llava_llama", "llava"),
    layer_form="llama",
    example="lmsys/vicuna-7b-v1.5",
)
