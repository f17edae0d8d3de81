"""Which keys PEFT would take from an adapter's file, found out on a model without memory.

`PeftModel.from_pretrained` passes over keys that it does not know, and starts modules anew whose keys it does not find;
both look like success.
"""

from pathlib import Path
from typing import Any, Literal, cast

from accelerate import init_empty_weights  # pyright: ignore[reportMissingTypeStubs]
from peft import LoraConfig, get_peft_model
from peft import get_peft_model_state_dict as _state_dict  # pyright: ignore[reportUnknownVariableType]
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

from llava_ft.checkpoint.hf.config import hf_fields
from llava_ft.checkpoint.names import ADAPTER_BIN, ADAPTER_SAFETENSORS
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import RunError
from llava_ft.models.builder import build_skeleton
from llava_ft.models.config import LlavaLlamaConfig

_CLASSES: Any = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}


def build_hf_skeleton(config: LlavaLlamaConfig, dtype: Any) -> Any:
    """Build transformers' own model for a configuration, with its parameters on the meta device.

    Args:
        config: The native configuration.
        dtype: Type that the model's configuration says.
    """
    fields = hf_fields(config, image_token_id=config.vocab_size - 1, dtype=dtype)
    config_class, model_class = _CLASSES[fields["model_type"]]
    with init_empty_weights(include_buffers=False):
        return model_class(config_class.from_dict(fields))


def check_taken(directory: Path, config: LlavaLlamaConfig, layout: Literal["llava", "hf"]) -> None:
    """Check that PEFT takes every tensor of an adapter's file, and finds every tensor that it looks for.

    Args:
        directory: The adapter.
        config: Configuration of the model it belongs to.
        layout: Layout of that model.

    Raises:
        RunError: It does not.
    """
    model: Any
    if layout == "hf":
        model = build_hf_skeleton(config, "float32")
    else:  # as original LLaVA has it when it puts an adapter on: the tower is loaded afterwards
        model = build_skeleton(config)
        del model.model.vision_tower
    adapter = cast("Any", LoraConfig).from_pretrained(str(directory))
    model.name_or_path = adapter.base_model_name_or_path  # PEFT compares the two, and warns
    wrapped = cast("Any", get_peft_model)(model, adapter, low_cpu_mem_usage=True)
    state = cast("Any", _state_dict)(wrapped, save_embedding_layers=False)  # or PEFT looks into the base's directory
    looked_for = {key: tuple(value.shape) for key, value in state.items()}
    files = [directory / name for name in (ADAPTER_BIN, ADAPTER_SAFETENSORS) if (directory / name).is_file()]
    found = {
        key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): info.shape
        for file in files
        for key, info in WeightFiles.open(file).tensors.items()
    }
    wrong = sorted(key for key in looked_for.keys() | found.keys() if looked_for.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise RunError(
            f"PEFT would not take the exported adapter as it is: {len(wrong)} keys, such as {key} "
            f"({looked_for.get(key, 'not looked for')} in its model, {found.get(key, 'missing')} in the file)."
        )
