"""Configuration of a LLaVA model: the language model's fields and, beside them, LLaVA's `mm_*` fields.

Each family of language models puts the two together: `families/`.

The file written by `save_pretrained` is read by original LLaVA (transformers 4.37) as well as by transformers 5:
fields that transformers 5 renamed are written under both names.
"""

import math
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from llava_ft.errors import UserError
from llava_ft.geometry import DEFAULT_GRIDS, DEFAULT_S2_SCALES, ImageGeometry, parse_grid_pinpoints, parse_s2_scales
from llava_ft.models.projectors import find_projector
from llava_ft.models.towers import TowerFacts, describe_tower


class LlavaModelConfig(PreTrainedConfig):
    """LLaVA's fields, named as in `llava/model/llava_arch.py`; a family adds its language model's.

    Attributes:
        mm_vision_tower: Name or path of the vision tower; None is a text-only model.
        mm_vision_config: Architecture of the tower, so that a checkpoint that holds the tower's weights needs no second
            directory; without `model_type` it is a CLIP. Original LLaVA ignores it.
        mm_hidden_size: Width of the tower's features.
        mm_projector_type: See `projectors/`.
        mm_vision_select_layer: Which hidden state is taken; 0 is the embedding, -1 the last layer's output.
        mm_vision_select_feature: `patch` drops the class token, `cls_patch` keeps it.
        mm_patch_merge_type: How the features of a tiled image are laid out; `spatial_unpad` has `image_newline`.
        image_aspect_ratio: How an image is brought into the tower's shape.
        image_grid_pinpoints: With anyres: widths and heights that a tiled picture may take, in pixels.
        s2: Whether the tower sees each image at several scales (S2).
        s2_scales: Sides in pixels of these scales, with commas between them.
        conversation_template: Template the model was trained with. Original LLaVA ignores it.
    """

    if TYPE_CHECKING:  # of every language model's configuration
        vocab_size: int
        hidden_size: int
        intermediate_size: int
        num_hidden_layers: int
        num_attention_heads: int
        num_key_value_heads: int
        max_position_embeddings: int
        hidden_act: str
        rms_norm_eps: float
        attention_bias: bool
        mlp_bias: bool
        tie_word_embeddings: bool
        rope_parameters: Any

        def __init__(self, **fields: Any) -> None: ...

    mm_vision_tower: str | None = None
    mm_vision_config: dict[str, Any] | None = None
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    mm_vision_select_layer: int = -1
    mm_vision_select_feature: str = "patch"
    mm_patch_merge_type: str = "flat"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    image_aspect_ratio: str = "square"
    image_grid_pinpoints: list[list[int]] | None = None
    s2: bool = False
    s2_scales: str | None = None
    conversation_template: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with the names transformers 4 used added for what transformers 5 renamed."""
        fields = super().to_dict()
        rope = fields.get("rope_parameters") or {}
        if "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            fields["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        return fields

    @property
    def head_width(self) -> int:
        """Width of one attention head of the language model."""
        return getattr(self, "head_dim", None) or self.hidden_size // max(self.num_attention_heads, 1)

    @property
    def query_width(self) -> int:
        """Width of all attention heads of the language model together."""
        return self.num_attention_heads * self.head_width

    @property
    def tower_facts(self) -> TowerFacts | None:
        """Sizes of the vision tower, or None for a text-only model."""
        return None if self.mm_vision_config is None else describe_tower(self.mm_vision_config)[2]

    @property
    def image_geometry(self) -> ImageGeometry | None:
        """How an image becomes tiles and tokens; None for a text-only model.

        Raises:
            UserError: The settings contradict each other.
        """
        tower = self.tower_facts
        if tower is None:
            return None
        side, per_side = tower.image_size, tower.image_size // tower.patch_size
        num_features = tower.tokens(side, side, self.mm_vision_select_feature)
        is_square = num_features == per_side**2
        if self.s2 and not is_square:
            raise UserError(
                f"s2_scales={self.s2_scales} pools patches, and mm_vision_select_feature="
                f"{self.mm_vision_select_feature} adds a class token that has no place there. Use "
                "mm_vision_select_feature=patch."
            )
        projector = find_projector(self.mm_projector_type)
        num_tokens = projector.num_tokens(num_features)
        default = [(columns * side, rows * side) for columns, rows in DEFAULT_GRIDS]
        is_tiled = self.image_aspect_ratio.startswith("anyres")
        return ImageGeometry(
            image_size=side,
            tokens_per_side=math.isqrt(num_tokens) if is_square and projector.keeps_grid else None,
            tokens_per_tile=num_tokens,
            features_per_tile=num_features,
            aspect_ratio=self.image_aspect_ratio,
            merge_type=self.mm_patch_merge_type,
            grid_pinpoints=parse_grid_pinpoints(self.image_grid_pinpoints or default, side) if is_tiled else (),
            s2_scales=parse_s2_scales(self.s2_scales or DEFAULT_S2_SCALES) if self.s2 else (),
        )

    @property
    def tokens_per_image(self) -> int:
        """Most tokens that one image takes; 0 for a text-only model."""
        geometry = self.image_geometry
        return 0 if geometry is None else geometry.max_tokens

    @property
    def has_image_newline(self) -> bool:
        """Whether the model has `image_newline`, the learnt vector behind each row of an unpadded picture."""
        return self.mm_vision_config is not None and "unpad" in self.mm_patch_merge_type
