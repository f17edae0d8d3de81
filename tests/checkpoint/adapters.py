"""Adapters that PEFT itself makes, merges and saves on the tiny recorded models."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llava_ft.inference.load import load_model

BASE = "ckpt/llava15-tiny"
DECODER = r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj"
"""The linear layers of the decoder, and not those of the vision tower that have the same names."""


def peft_adapter(directory: Path, base: str = BASE, *, seed: int = 1, **options: Any) -> Any:
    """Let PEFT make an adapter on a model and save it.

    Args:
        directory: Where PEFT saves it.
        base: The model, which holds its vision tower or names it.
        seed: Decides the adapter's values.
        **options: Settings of `LoraConfig`.

    Returns:
        The PEFT model.
    """
    model: Any = load_model(base, device="cpu").model
    model.name_or_path = base  # PEFT writes this into the adapter's configuration
    settings = {"r": 4, "lora_alpha": 8, "target_modules": DECODER, "task_type": "CAUSAL_LM"} | options
    wrapped: Any = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(directory)
    return wrapped


def merged_by_peft(wrapped: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a PEFT model after PEFT has merged it, float32, by native name."""
    return {name: parameter.detach() for name, parameter in wrapped.merge_and_unload().named_parameters()}


def rewrite(directory: Path, change: Any, **settings: Any) -> None:
    """Change an adapter's tensors in place, and settings of its configuration."""
    weights = load_file(directory / "adapter_model.safetensors")
    change(weights)
    save_file(weights, directory / "adapter_model.safetensors")
    set_fields(directory / "adapter_config.json", **settings)


def set_fields(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def model_with_biases(directory: Path) -> str:
    """Write a LLaVA model whose attention has biases, and return its path."""
    shutil.copytree(BASE, directory)
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(5)
    for name in list(weights):
        if name.startswith("model.layers.") and ".self_attn." in name:
            weights[name.replace(".weight", ".bias")] = 0.1 * torch.randn(weights[name].shape[0])
    save_file(weights, directory / "model.safetensors")
    set_fields(directory / "config.json", attention_bias=True, mm_vision_tower=str(Path("ckpt/clip-tiny").resolve()))
    return str(directory)
