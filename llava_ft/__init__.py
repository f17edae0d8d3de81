"""Fine-tuning of LLaVA models.

    tokenizer, model, image_processor, context_len = llava_ft.load_pretrained_model("./checkpoints/llava-v1.5-7b-lora")

Names are loaded at their first use, because transformers takes seconds to import.
"""

from typing import TYPE_CHECKING, Any

from llava_ft.version import __version__ as __version__

if TYPE_CHECKING:
    from llava_ft.inference.load import load_pretrained_model as load_pretrained_model

__all__ = ["__version__", "load_pretrained_model"]


def __getattr__(name: str) -> Any:
    if name == "load_pretrained_model":
        from llava_ft.inference.load import load_pretrained_model

        return load_pretrained_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
