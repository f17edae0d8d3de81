"""Random LLaVA models of a preset, made in place, with the same values in every layout."""

import re
from typing import Any

import torch
from torch import nn
from workload import Preset

from llava_ft.models.builder import build_skeleton, settle_config
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.parts import part_of
from llava_ft.models.towers import tower_fields
from llava_ft.tuning.quant import Quantization, is_quantized, quantize_linears, set_quantized_weight

QUANTIZATION = Quantization(4, "nf4", True)


def preset_config(preset: Preset) -> LlavaModelConfig:
    """The configuration of a preset's model."""
    fields: dict[str, Any] = {"model_type": "llama", "eos_token_id": 2, "pad_token_id": 0, **preset.language}
    wishes = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad"}
    vision = tower_fields(dict(preset.vision), "inside")
    return settle_config(fields, "random", wishes=wishes, vision_tower="inside", vision=vision)


def build_native(preset: Preset, attn_implementation: str) -> LlavaForCausalLM:
    """The program's model with random weights on the preset's device, in the dtypes of training; nothing is marked yet.

    Weights that are trained are float32, frozen ones in the compute dtype.
    """
    model = build_skeleton(preset_config(preset), attn_implementation=attn_implementation)
    model.config.use_cache = False
    if preset.bits == 4:
        quantize_linears(model, QUANTIZATION, lambda _: preset.dtype)
    give_values(model, preset)
    return model.to(preset.device)


def is_trained(name: str, preset: Preset) -> bool:
    """Whether a parameter of the program's model is trained: adapters and projector, or all but the tower."""
    part = part_of(name)
    return part in ("LoRA", "projector") or (not preset.lora_r and part != "vision tower")


def give_values(model: nn.Module, preset: Preset) -> None:
    """Put random values in place of parameters on the meta device, each from a seed of its own."""
    for module_name, module in model.named_modules():
        if is_quantized(module):
            shape = torch.Size((module.out_features, module.in_features))
            set_quantized_weight(module, random_values(f"{module_name}.weight", shape, preset.dtype, preset.device))
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            name = f"{module_name}.{leaf}"
            dtype = torch.float32 if is_trained(name, preset) else preset.dtype
            values = random_values(name, parameter.shape, dtype, preset.device)
            module._parameters[leaf] = nn.Parameter(values, requires_grad=parameter.requires_grad)


def random_values(name: str, shape: torch.Size, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Values of a parameter, from its name alone: near 1 for scales, else of spread 0.02."""
    seed = sum(ord(letter) * 31 ** (place % 11) for place, letter in enumerate(name)) % 2**31
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
    is_scale = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight"))
    return values.add_(1.0) if is_scale else values


def randomize_adapters(model: nn.Module) -> None:
    """Give all LoRA weights values, so that none of their gradients is zero."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = random_values(canonical(name), parameter.shape, parameter.dtype, str(parameter.device))
            parameter.data.copy_(values)


def canonical(name: str) -> str:
    """The native name of a parameter in any of the layouts, without PEFT's prefixes."""
    name = name.replace("base_model.model.", "", 1) if name.startswith("base_model.model.") else name
    name = name.replace(".default.", ".").replace(".base_layer.", ".")
    name = re.sub(r"^model\.language_model\.", "model.", name)
    name = re.sub(r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0", name)
    name = re.sub(r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2", name)
    name = re.sub(r"^model\.vision_tower\.(?!vision_tower)", "model.vision_tower.vision_tower.vision_model.", name)
    return name
