"""LLaVA: a language model that reads image features among its word embeddings.

Source: LLaVA (arXiv:2304.08485) figure 1 and `llava/model/llava_arch.py`. The module tree is the original's, in memory
and on disk: `model.vision_tower` and `model.mm_projector` beside `model.layers`.

What is notable: the data side has already written one `IMAGE_TOKEN_INDEX` (-200) for each image token, so placing the
features among the words is one masked scatter and the sequence keeps its length, where the original splices sequences
of different lengths inside the model. With one image of three tokens::

    input_ids       [ 1, -200, -200, -200, 57,  9 ]
    inputs_embeds   [ e1,  f1,   f2,   f3, e57, e9 ]

Loss and last layer are computed only where a label is supervised (`loss.py`, `kernels/last_layer.py`); a micro-batch
without images does not run the tower.

Shapes: B samples, T positions, D width, M images, K tiles (one an image, more with anyres), N features per tile,
C width of the tower, S supervised positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.geometry import ImageGeometry, SizeWH
from llava_ft.models.anyres import merge_tiles
from llava_ft.models.attention.boundaries import SampleBoundaries, find_boundaries
from llava_ft.models.attention.kernels import takes_boundaries, takes_chosen_queries
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.kernels import ReadsChosenPositions
from llava_ft.models.loss import LossHead, mean_loss, supervised_positions
from llava_ft.models.projectors import find_projector
from llava_ft.models.towers import VisionTower, build_tower

if TYPE_CHECKING:

    class _CausalLM(PreTrainedModel, GenerationMixin):
        """What every causal language model of transformers has."""

        model: Any
        lm_head: nn.Linear
else:
    _CausalLM = object


class LlavaForCausalLM(_CausalLM):
    """Vision for a causal language model whose decoder is `self.model` and whose head is `self.lm_head`."""

    config: LlavaModelConfig

    runs_tower: bool = True
    """Whether pixels are encoded here. False where `image_features` are handed in for every image of a run: a
    micro-batch without images then leaves the tower alone too, which may not even be there."""

    _geometry: ImageGeometry | None = None

    def __init__(self, config: LlavaModelConfig):
        super().__init__(config)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            # What a language model does to its logits behind the head is not done here.
            assert getattr(config, name, None) in (None, 1.0), f"{type(config).__name__} has {name}"
        if self.lm_head.bias is None:
            self.lm_head.__class__ = LossHead
        self._add_vision(config)

    def _add_vision(self, config: LlavaModelConfig) -> None:
        """Add the tower and the projector that `config` describes; nothing for a text-only model."""
        vision, geometry = config.mm_vision_config, config.image_geometry
        if vision is None or geometry is None:
            return
        tower = build_tower(vision, config.mm_vision_select_layer, config.mm_vision_select_feature, geometry.s2_scales)
        projector = find_projector(config.mm_projector_type)
        self._geometry = geometry
        self.model.vision_tower = tower
        self.model.mm_projector = projector.build(config.mm_projector_type, tower.width, config.hidden_size)
        if config.has_image_newline:
            self.model.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    @property
    def _tower(self) -> VisionTower:
        return cast(VisionTower, self.model.vision_tower)

    @property
    def _projector(self) -> nn.Module:
        return cast(nn.Module, self.model.mm_projector)

    @property
    def _image_newline(self) -> nn.Parameter | None:
        """The vector behind each row of an unpadded picture. Under ZeRO-3 asking for it gathers it on all ranks."""
        return cast(nn.Parameter, self.model.image_newline) if self.config.has_image_newline else None

    @property
    def has_vision(self) -> bool:
        """Whether the model has a vision tower."""
        return self.config.mm_vision_config is not None

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turn pixels into embeddings.

        Args:
            pixel_values: `(K, 3, H, W)` normalised pixels.

        Returns:
            `(K, N, D)` features in word-embedding space.
        """
        return self.project(self._tower(pixel_values))

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        """Turn features of the tower, `(K, N, C)`, into embeddings, `(K, N, D)`."""
        weight = next(self._projector.parameters(), None)
        if weight is not None and not torch.is_autocast_enabled(image_features.device.type):
            image_features = image_features.to(weight.dtype)
        return self._projector(image_features)

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | Sequence[SizeWH] | None = None,
        image_features: torch.Tensor | None = None,
        tile_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed words and images; see `forward`.

        Returns:
            `(B, T, D)` embeddings.

        Raises:
            ValueError: Image positions and image features differ in number, or anyres lacks the images' sizes.
        """
        mask_BT = input_ids == IMAGE_TOKEN_INDEX
        embeds_BTD = self.get_input_embeddings()(input_ids.masked_fill(mask_BT, 0))
        if image_features is not None and image_features.shape[0] > 0:
            return scatter_image_features(embeds_BTD, self._lay_out(self.project(image_features), image_sizes), mask_BT)
        if pixel_values is not None and pixel_values.shape[0] > 0:
            features_KNC = self._tower(pixel_values)
            if tile_index is not None:  # before the projector, so that it computes the same as with cached features
                features_KNC = features_KNC.index_select(0, tile_index)
            return scatter_image_features(embeds_BTD, self._lay_out(self.project(features_KNC), image_sizes), mask_BT)
        if bool(mask_BT.any()):
            raise ValueError("input_ids has image positions, but there are neither pixel_values nor image_features.")
        is_divided = self.has_vision and any(hasattr(p, "ds_id") for p in self._projector.parameters())
        if is_divided or (self.has_vision and self.training):
            return embeds_BTD + self._unused_vision_term(embeds_BTD.device, is_divided).to(embeds_BTD.dtype)
        return embeds_BTD

    def _lay_out(self, features_KND: torch.Tensor, image_sizes: torch.Tensor | Sequence[SizeWH] | None) -> torch.Tensor:
        """Put the features of all images in a row, `(S, D)`, each image's tiles laid out as the geometry says."""
        geometry, newline_D = self._geometry, self._image_newline
        assert geometry is not None
        if not geometry.needs_image_sizes:
            features_SD = features_KND.flatten(0, 1)
            if newline_D is not None and newline_D.requires_grad:  # no rows to end, but it needs a gradient
                features_SD = features_SD + 0.0 * newline_D.sum().to(features_SD.dtype)
            return features_SD
        if image_sizes is None:
            raise ValueError("This model tiles images (anyres): image_sizes, their widths and heights, are needed.")
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        sizes_wh = [(int(width), int(height)) for width, height in sizes]
        num_tiles = [geometry.num_tiles(size_wh) for size_wh in sizes_wh]
        if sum(num_tiles) != features_KND.shape[0]:
            raise ValueError(
                f"Images of {sizes_wh} pixels have {sum(num_tiles)} tiles, but there are {features_KND.shape[0]}. "
                "pixel_values must hold the tiles of all images in the order of image_sizes."
            )
        images = zip(features_KND.split(num_tiles), sizes_wh, strict=True)
        return torch.cat([merge_tiles(tiles, size_wh, geometry, newline_D) for tiles, size_wh in images])

    def _unused_vision_term(self, device: torch.device, is_divided: bool) -> torch.Tensor:
        """Zero that depends on every trainable vision parameter.

        A micro-batch without images would otherwise leave them without a gradient: data-parallel ranks would wait for
        each other, and the optimizer would skip their momentum. Where ZeRO-3 has divided the parameters, every rank
        has to run the same modules in the same order, in evaluation too, so they run on one zero image.
        """
        term = torch.zeros((), device=device)
        if self.runs_tower and (is_divided or any(p.requires_grad for p in self._tower.parameters())):
            size = self._tower.input_size
            term = 0.0 * self.encode_images(torch.zeros(1, 3, size, size, device=device)).sum()
        elif is_divided:
            assert self.config.mm_hidden_size is not None
            assert self._geometry is not None
            shape = (1, self._geometry.features_per_tile, self.config.mm_hidden_size)
            term = 0.0 * self.project(torch.zeros(shape, device=device)).sum()
        else:
            for parameter in self._projector.parameters():
                if parameter.requires_grad:
                    term = term + 0.0 * parameter.sum()
        newline_D = self._image_newline
        return term if newline_D is None else term + 0.0 * newline_D.sum()

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
        image_sizes: torch.Tensor | Sequence[SizeWH] | None = None,
        image_features: torch.Tensor | None = None,
        tile_index: torch.Tensor | None = None,
        sample_lengths: Sequence[int] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: `(B, T)` int64, already expanded; each image position holds `IMAGE_TOKEN_INDEX`.
            attention_mask: `(B, T)`, true at real positions. Padding on the right needs none: attention looks back.
            position_ids: `(B, T)` int64; counted from 0, or from each sample's first position, when absent. Without
                mask, cache and `sample_lengths` a sample begins wherever they do not go on counting.
            past_key_values: Cache of earlier positions.
            inputs_embeds: `(B, T, D)`, instead of `input_ids` and `pixel_values`.
            labels: `(B, T)` int64, `IGNORE_INDEX` where nothing is supervised. With labels the loss is returned and
                no logits are: those of unsupervised positions are never computed.
            use_cache: Whether to return a cache; not with `sample_lengths`.
            pixel_values: `(K, 3, H, W)` normalised pixels of the tiles of all images of the batch in reading order.
            image_sizes: `(M, 2)`, width and height of each image in pixels; needed with anyres only.
            image_features: `(K, N, C)` features of the tower for the same tiles, instead of `pixel_values`.
            tile_index: `(K,)` int64 where `pixel_values` holds each of several equal tiles once: which of its entries
                each tile of the batch is.
            sample_lengths: Positions of each sample of the rows, padding included; not with a mask or a cache.
            logits_to_keep: Without labels: how many last positions get logits; 0 is all.
            num_items_in_batch: Number by which the summed loss is divided; by default the supervised positions here.
            **kwargs: Passed to the language model.

        Raises:
            ValueError: There is no input, or `sample_lengths` are not those of the batch.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Either input_ids or inputs_embeds is needed.")
            inputs_embeds = self.embed_inputs(input_ids, pixel_values, image_sizes, image_features, tile_index)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        kwargs |= self._samples(inputs_embeds, sample_lengths, kwargs)
        if labels is not None:
            return self._loss(inputs_embeds, labels, num_items_in_batch, kwargs)
        use_cache = use_cache if sample_lengths is None else False  # with one, `eager`'s mask would join the samples
        outputs = self.model(inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state[:, kept]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _samples(
        self, embeds_BTD: torch.Tensor, sample_lengths: Sequence[int] | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Find the samples of a batch for the attention kernels: once a forward pass, not in each layer."""
        has_mask = kwargs["attention_mask"] is not None or kwargs["past_key_values"] is not None
        if sample_lengths is None and not takes_boundaries(self.config._attn_implementation):
            return {}
        if has_mask and sample_lengths is not None:
            raise ValueError(
                "There are sample_lengths and an attention_mask or a cache, which would join the samples. Give the "
                "lengths alone: they include padding, and right-padded positions need no mask."
            )
        num_rows, row_length, _ = embeds_BTD.shape
        position_ids = kwargs["position_ids"]
        boundaries = find_boundaries(
            num_rows,
            row_length,
            embeds_BTD.device,
            sample_lengths=sample_lengths,
            position_ids=None if has_mask else position_ids,  # beside a mask each row is one sample, as in transformers
        )
        if position_ids is None and sample_lengths is not None:
            position_ids = boundaries.position_ids()
        return {"boundaries": boundaries, "position_ids": position_ids}

    def _loss(
        self,
        embeds_BTD: torch.Tensor,
        labels: torch.Tensor,
        num_items: torch.Tensor | int | None,
        kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """Run the decoder where the loss reads it, and compute the loss; see `forward`."""
        positions_S = supervised_positions(labels)
        is_selective = self._reads_selectively(kwargs)
        if is_selective:
            kwargs = kwargs | {"read_positions": positions_S}
            boundaries: SampleBoundaries | None = kwargs.get("boundaries")
            if boundaries is not None and takes_chosen_queries(self.config._attn_implementation):
                kwargs["boundaries"] = boundaries.count_reads(positions_S)
        outputs = self.model(inputs_embeds=embeds_BTD, use_cache=False, **kwargs)
        hidden_SD = outputs.last_hidden_state.flatten(0, 1)
        if not is_selective:
            hidden_SD = hidden_SD.index_select(0, positions_S)
        loss: Any = mean_loss(hidden_SD, self.lm_head, labels.flatten()[positions_S + 1], num_items)
        return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _reads_selectively(self, kwargs: dict[str, Any]) -> bool:
        """Whether the last layer may leave out positions that have no target: not if its whole output is asked for."""
        is_shown = any(
            kwargs.get(name, getattr(self.config, name)) for name in ("output_hidden_states", "output_attentions")
        )
        has_cache = kwargs.get("past_key_values") is not None
        return isinstance(self.model.layers[-1], ReadsChosenPositions) and not is_shown and not has_cache

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | Sequence[SizeWH] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text; takes everything `transformers.GenerationMixin.generate` takes.

        Args:
            input_ids: `(B, T)` int64, already expanded, padded on the left if lengths differ.
            pixel_values: `(K, 3, H, W)` pixels of the tiles of all images in reading order, or None.
            attention_mask: `(B, T)`, true at real positions; all of them when absent.
            image_sizes: `(M, 2)`, width and height of each image in pixels; needed with anyres only.
            **kwargs: Generation options.

        Returns:
            `(B, L)` int64: the new tokens alone, without the prompt.
        """
        if input_ids is None:
            raise ValueError("generate needs input_ids.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = self.embed_inputs(input_ids, pixel_values, image_sizes)
        generate = super().generate  # pyright: ignore[reportAttributeAccessIssue] - its `self` is too narrow
        return generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def scatter_image_features(embeds_BTD: torch.Tensor, features_SD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Put image features at the image positions.

    Args:
        embeds_BTD: `(B, T, D)` word embeddings; what stands at image positions is ignored.
        features_SD: Features of the S image positions in reading order: sample by sample, left to right.
        mask_BT: Which positions these are.

    Returns:
        `(B, T, D)` in the dtype of the embeddings.

    Raises:
        ValueError: The number of features is not the number of image positions.
    """
    num_positions = int(mask_BT.sum())
    if num_positions != features_SD.shape[0]:
        raise ValueError(
            f"{features_SD.shape[0]} image features for {num_positions} image positions. input_ids must hold one "
            f"{IMAGE_TOKEN_INDEX} for each image token, in the order of the images."
        )
    return embeds_BTD.masked_scatter(mask_BT.unsqueeze(-1), features_SD.to(embeds_BTD.dtype))
