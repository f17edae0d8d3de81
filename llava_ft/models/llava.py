"""LLaVA: a language model that reads image features among its word embeddings.

Source: LLaVA (arXiv:2304.08485) figure 1 and `llava/model/llava_arch.py`. The module tree is the original's, in memory
and on disk: `model.vision_tower` and `model.mm_projector` beside `model.layers`.

What is notable: image placeholders are expanded by the data side, so the model does one masked scatter (`merge.py`);
logits and loss are computed only where a label is supervised; a micro-batch without images does not run the tower.

Shapes: B samples, T positions, D width, M images, N tokens per image, S supervised positions, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_ft.constants import IGNORE_INDEX
from llava_ft.models.config import LlavaLlamaConfig
from llava_ft.models.merge import image_positions, scatter_image_features
from llava_ft.models.projector import build_projector
from llava_ft.models.vision import CLIPVisionTower

_Base = LlamaForCausalLM if TYPE_CHECKING else object


class LlavaMixin(_Base):
    """Vision for a causal language model whose decoder is `self.model` and whose head is `self.lm_head`."""

    config: LlavaLlamaConfig

    def _add_vision(self, config: LlavaLlamaConfig) -> None:
        """Add the tower and the projector that `config` describes; nothing for a text-only model."""
        vision_config = config.vision_config
        if vision_config is None:
            return
        self.model.vision_tower = CLIPVisionTower(
            vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature
        )
        self.model.mm_projector = build_projector(
            config.mm_projector_type, vision_config.hidden_size, config.hidden_size
        )

    @property
    def _tower(self) -> CLIPVisionTower:
        return cast(CLIPVisionTower, self.model.vision_tower)

    @property
    def _projector(self) -> nn.Module:
        return cast(nn.Module, self.model.mm_projector)

    @property
    def has_vision(self) -> bool:
        """Whether the model has a vision tower."""
        return self.config.mm_vision_config is not None

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turn pixels into embeddings.

        Args:
            pixel_values: `(M, 3, H, W)` normalised pixels.

        Returns:
            `(M, N, D)` features in word-embedding space.
        """
        features_MNC = self._tower(pixel_values)
        weight = next(self._projector.parameters(), None)
        if weight is not None and not torch.is_autocast_enabled(features_MNC.device.type):
            features_MNC = features_MNC.to(weight.dtype)
        return self._projector(features_MNC)

    def embed_inputs(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Embed words and images.

        Args:
            input_ids: `(B, T)` int64, already expanded: each image token is one `IMAGE_TOKEN_INDEX`.
            pixel_values: `(M, 3, H, W)` in reading order, or None without images.

        Returns:
            `(B, T, D)` embeddings.

        Raises:
            ValueError: Image positions and image features differ in number.
        """
        mask_BT = image_positions(input_ids)
        embeds_BTD = self.get_input_embeddings()(input_ids.masked_fill(mask_BT, 0))
        if pixel_values is not None and pixel_values.shape[0] > 0:
            features_SD = self.encode_images(pixel_values).flatten(0, 1)
            return scatter_image_features(embeds_BTD, features_SD, mask_BT)
        if bool(mask_BT.any()):
            raise ValueError("input_ids has image positions, but there are no pixel_values.")
        is_divided = self.has_vision and any(hasattr(p, "ds_id") for p in self._projector.parameters())
        if is_divided or (self.has_vision and self.training):
            return embeds_BTD + self._unused_vision_term(embeds_BTD.device, is_divided).to(embeds_BTD.dtype)
        return embeds_BTD

    def _unused_vision_term(self, device: torch.device, is_divided: bool) -> torch.Tensor:
        """Zero that depends on every trainable vision parameter.

        A micro-batch without images would otherwise leave them without a gradient: data-parallel ranks would wait for
        each other, and the optimizer would skip their momentum. Where ZeRO-3 has divided the parameters, every rank
        has to run the same modules, in evaluation too, so tower and projector run on one zero image.
        """
        tower_is_trained = any(parameter.requires_grad for parameter in self._tower.parameters())
        if tower_is_trained or is_divided:
            size = self._tower.image_size
            return 0.0 * self.encode_images(torch.zeros(1, 3, size, size, device=device)).sum()
        term = torch.zeros((), device=device)
        for parameter in self._projector.parameters():
            if parameter.requires_grad:
                term = term + 0.0 * parameter.sum()
        return term

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: `(B, T)` int64, already expanded; each image position holds `IMAGE_TOKEN_INDEX`.
            attention_mask: `(B, T)`, true at real positions.
            position_ids: `(B, T)` int64; counted from 0 when absent.
            past_key_values: Cache of earlier positions.
            inputs_embeds: `(B, T, D)`, instead of `input_ids` and `pixel_values`.
            labels: `(B, T)` int64, `IGNORE_INDEX` where nothing is supervised. With labels the loss is returned and
                no logits are: those of unsupervised positions are never computed.
            use_cache: Whether to return a cache.
            pixel_values: `(M, 3, H, W)` normalised pixels of all images of the batch in reading order.
            logits_to_keep: Without labels: how many last positions get logits; 0 is all.
            num_items_in_batch: Number by which the summed loss is divided; the supervised positions of this batch when
                absent.
            **kwargs: Passed to the language model.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Either input_ids or inputs_embeds is needed.")
            inputs_embeds = self.embed_inputs(input_ids, pixel_values)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = self._supervised_loss(hidden_BTD, labels, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_BTD[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _supervised_loss(
        self, hidden_BTD: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Next-token cross-entropy over the supervised positions, in float32.

        A batch without supervised positions gives zero with zero gradients, not NaN.
        """
        targets_BT = labels[:, 1:]
        supervised_BT = targets_BT != IGNORE_INDEX
        logits_SV = self.lm_head(hidden_BTD[:, :-1][supervised_BT]).float()
        total = F.cross_entropy(logits_SV, targets_BT[supervised_BT], reduction="sum")
        if num_items is None:
            num_items = supervised_BT.sum()
        if isinstance(num_items, torch.Tensor):
            return total / num_items.to(total.device).clamp(min=1)
        return total / max(num_items, 1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text; takes everything `transformers.GenerationMixin.generate` takes.

        Args:
            input_ids: `(B, T)` int64, already expanded, padded on the left if lengths differ.
            pixel_values: `(M, 3, H, W)` pixels of all images in reading order, or None.
            attention_mask: `(B, T)`, true at real positions; all of them when absent.
            **kwargs: Generation options.

        Returns:
            `(B, L)` int64: the new tokens alone, without the prompt.
        """
        if input_ids is None:
            raise ValueError("generate needs input_ids.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = self.embed_inputs(input_ids, pixel_values)
        generate = super().generate  # pyright: ignore[reportAttributeAccessIssue] - its `self` is too narrow
        return generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


class LlavaLlamaForCausalLM(LlavaMixin, LlamaForCausalLM):
    """LLaVA on LLaMA and on models of LLaMA's architecture, such as Vicuna."""

    config_class = LlavaLlamaConfig

    def __init__(self, config: LlavaLlamaConfig):
        super().__init__(config)
        self._add_vision(config)


def parts(model: nn.Module) -> dict[str, str]:
    """Name the part of the model that each parameter belongs to.

    Returns:
        Parameter name to one of "LoRA", "projector", "vision tower", "new token rows", "embeddings", "head" and
        "language model".
    """
    return {name: part_of(name) for name, _ in model.named_parameters()}


def part_of(name: str) -> str:
    """Name the part of the model that a parameter name, with or without PEFT's prefixes, belongs to."""
    markers = (
        ("lora_", "LoRA"),
        ("mm_projector", "projector"),
        ("vision_tower", "vision tower"),
        ("new_rows", "new token rows"),
        ("embed_tokens", "embeddings"),
        ("lm_head", "head"),
    )
    return next((part for marker, part in markers if marker in name), "language model")
