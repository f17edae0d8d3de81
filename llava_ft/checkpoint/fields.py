"""What the fields of the JSON files of a model, an adapter and a checkpoint must be; what is not read is left open.

transformers checks the types of an architecture's own fields; here are their ranges and the fields of LLaVA and PEFT.
"""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator
from transformers.activations import ACT2FN

from llava_ft.json_files import Amount, Count, Fields, Share

_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Every = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Steps = Annotated[int, Field(ge=0, le=10**12)]
_Id = Annotated[int, Field(ge=-1, le=10**9)]


class _Architecture(Fields):
    hidden_size: Count = 1
    intermediate_size: Count = 1
    num_hidden_layers: Count = 1
    num_attention_heads: Count = 1
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = ""

    @field_validator("hidden_act")
    @classmethod
    def is_known(cls, name: str) -> str:
        """Check the name of the activation, which transformers looks up when it builds a layer."""
        if name not in ACT2FN:
            raise ValueError("There is no such activation in transformers")
        return name

    @model_validator(mode="after")
    def heads_divide_it(self) -> Self:
        """Check what transformers would find out in the first step, or not at all."""
        of = {name: getattr(self, name) for name in self.model_fields_set}
        pairs = [] if of.get("head_dim") else [("hidden_size", "num_attention_heads")]
        for whole, part in [*pairs, ("num_attention_heads", "num_key_value_heads")]:
            if of.get(whole) and of.get(part) and of[whole] % of[part]:
                raise ValueError(f"{whole} {of[whole]} is no multiple of {part} {of[part]}")
        return self


class TowerFields(_Architecture):
    """Of a vision tower's `config.json`, or of the same fields in a model's."""

    image_size: Count = 1
    patch_size: Count = 1
    num_channels: Count = 3
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5


class ModelFields(_Architecture):
    """Of `config.json` of a language model or a LLaVA model in the native layout."""

    model_type: str = ""
    vocab_size: Count = 1
    max_position_embeddings: Count = 1
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: Share = 0.0
    tie_word_embeddings: bool | None = None
    bos_token_id: _Id | None = None
    eos_token_id: _Id | list[_Id] | None = None
    pad_token_id: _Id | None = None
    mm_vision_tower: str | None = None
    mm_vision_config: TowerFields | None = None
    mm_hidden_size: Count | None = None
    mm_projector_type: str | None = None
    mm_vision_select_layer: int | None = None
    mm_vision_select_feature: str | None = None
    mm_patch_merge_type: str | None = None
    mm_use_im_start_end: bool | None = None
    mm_use_im_patch_token: bool | None = None
    image_aspect_ratio: str | None = None
    image_grid_pinpoints: str | list[list[Count]] | None = None
    s2: bool | None = None
    s2_scales: str | None = None
    conversation_template: str | None = None
    unfreeze_mm_vision_tower: bool | None = None
    tokenizer_model_max_length: Count | None = None


class AdapterFields(Fields):
    """Of PEFT's `adapter_config.json`."""

    peft_type: str = "LORA"
    r: Annotated[int, Field(gt=0, le=10**6)]
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    lora_dropout: Share = 0.0
    bias: Annotated[str, Field(pattern="^(none|all|lora_only)$")] = "none"
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    rank_pattern: dict[str, Annotated[int, Field(gt=0, le=10**6)]] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    modules_to_save: list[str] | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_bias: bool | None = None


class TrainerStateFields(Fields):
    """Of `trainer_state.json`, which transformers reads to resume."""

    global_step: _Steps
    max_steps: int = 0
    epoch: _Rate | None = None
    num_train_epochs: _Rate = 0
    num_input_tokens_seen: _Steps = 0
    total_flos: _Rate = 0
    logging_steps: _Every = 1
    eval_steps: _Every | None = None
    save_steps: _Every = 1
    train_batch_size: Count
    log_history: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    stateful_callbacks: dict[str, Any] | None = None
    best_metric: Amount | None = None
    best_global_step: _Steps | None = None
    best_model_checkpoint: str | None = None


class RankFields(Fields):
    """Of `ranks.json`."""

    world_size: Count
    batch: Count
    epoch: Count | None = None
