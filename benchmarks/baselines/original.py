"""The computation of original LLaVA's training step, on this program's modules.

What it does as the original (`llava/model/llava_arch.py`, `clip_encoder.py`, LlamaForCausalLM of transformers 4.37):
the tower runs all its layers and returns every hidden state, of which one is used; samples are padded to the longest;
a batch without images runs tower and projector on one zero image; logits are computed at every position, in float32,
and shifted copies of them go into cross-entropy. Adapters are PEFT's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.models.llava import LlavaForCausalLM, scatter_image_features


def all_hidden_states(model: LlavaForCausalLM, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """Every hidden state of the tower."""
    encoder = model._tower.vision_tower.vision_model
    states = [encoder.pre_layrnorm(encoder.embeddings(pixel_values))]
    for layer in encoder.encoder.layers:
        states.append(layer(states[-1], None))
    encoder.post_layernorm(states[-1][:, 0])
    return states


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The mean loss of a padded batch."""
    native = next(module for module in model.modules() if isinstance(module, LlavaForCausalLM))
    pixels, side = batch.get("pixel_values"), native._tower.input_size
    if pixels is None:
        pixels = torch.zeros(1, 3, side, side, device=batch["input_ids"].device)
    with torch.no_grad():
        states = all_hidden_states(native, pixels.to(native._tower.dtype))
    features = native.project(states[-2][:, 1:])
    mask = batch["input_ids"] == IMAGE_TOKEN_INDEX
    embeds = native.get_input_embeddings()(batch["input_ids"].masked_fill(mask, 0))
    if batch.get("pixel_values") is None:
        embeds = embeds + 0.0 * features.sum().to(embeds.dtype)
    else:
        embeds = scatter_image_features(embeds, features.flatten(0, 1), mask)
    hidden = native.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False)
    logits = native.lm_head(hidden.last_hidden_state).float()
    shifted = logits[..., :-1, :].contiguous()
    targets = batch["labels"][..., 1:].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), targets.view(-1))
