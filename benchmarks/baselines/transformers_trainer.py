"""transformers' own LLaVA with PEFT's LoRA, for transformers' Trainer: nothing of this program computes in it."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from models import canonical, is_trained, random_values, randomize_adapters
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from workload import Preset, Sample

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

IMAGE_TOKEN, PAD = 2, 0
"""The vocabulary entry that stands for an image token; the samples' text never holds it."""

LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def build(preset: Preset) -> nn.Module:
    """The model with the values of the program's; adapters and projector are trained, without adapters all but CLIP."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**preset.vision),
        text_config=LlamaConfig(pad_token_id=PAD, use_cache=False, **preset.language),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(preset.dtype)
    with torch.device(preset.device):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        native = canonical(name)
        dtype = torch.float32 if is_trained(native, preset) else preset.dtype
        parameter.data = random_values(native, parameter.shape, dtype, preset.device)
    if not preset.lora_r:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(canonical(name), preset))
        return model
    if preset.bits == 4:
        _quantize(model, preset)
    lora = LoraConfig(
        r=preset.lora_r,
        lora_alpha=preset.lora_alpha,
        lora_dropout=0.0,
        target_modules=rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({LINEARS})",
    )
    wrapped = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
    randomize_adapters(wrapped)
    return wrapped


def _quantize(model: nn.Module, preset: Preset) -> None:
    """Hold the language model's linear layers in 4 bits, as bitsandbytes does for transformers."""
    import bitsandbytes as bnb

    pattern = re.compile(rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({LINEARS})")
    for name, linear in [(n, m) for n, m in model.named_modules() if pattern.fullmatch(n)]:
        options = {"compress_statistics": True, "quant_type": "nf4"}
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=preset.dtype, device="meta", **options
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, **options)
        model.set_submodule(name, layer.to(preset.device))
    model.is_loaded_in_4bit = True


def collate(samples: Sequence[Sample], preset: Preset) -> dict[str, Any]:
    """Pad samples as transformers' processor and a padding collator do."""
    ids = [sample.input_ids.where(sample.input_ids != IMAGE_TOKEN_INDEX, IMAGE_TOKEN) for sample in samples]
    batch: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
        "labels": pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
    }
    side = preset.vision["image_size"]
    if pixels := [sample.pixel_values(side) for sample in samples if sample.has_image]:
        batch["pixel_values"] = torch.cat(pixels).to(preset.dtype)
    return batch
