"""Flags of the training run that are this program's own, and inherited ones with another default.

This module does not import transformers, which takes seconds; `llava_ft.args.build.TrainingArguments` joins
these fields with those of `transformers.TrainingArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llava_ft.args.value_types import flag


@dataclass
class TrainingFlags:
    """Own training flags, then inherited ones whose default differs.

    - `optim`: AdamW in both cases; the fused one of a GPU rounds differently.
    - `remove_unused_columns`: the collator needs what `forward` does not take, such as the record numbers.
    - `logging_nan_inf_filter`: a loss of NaN must never be logged as a number.
    - `report_to`: nothing leaves the machine unless asked for.
    - `prediction_loss_only`: logits are computed only where a label is supervised, so they cannot be gathered.
    - `gradient_checkpointing`: a word instead of a switch; true and false mean full and none.
    - `gradient_checkpointing_kwargs`: re-entrant checkpointing loses the gradient when the inputs of a block
      need none, which is the case under LoRA.
    """

    cache_dir: str | None = flag(None, "Where models named rather than given as a directory are downloaded to.")
    freeze_mm_mlp_adapter: bool = flag(False, "Keep the projector fixed.")
    mpt_attn_impl: str = flag("triton", "Accepted for old command lines; only MPT models used it.")
    model_max_length: int = flag(512, "Longest sequence in tokens, image tokens included; see truncation.")
    double_quant: bool = flag(True, "With bits 4: quantise the scales as well.")
    quant_type: Literal["nf4", "fp4"] = flag("nf4", "With bits 4: the data type.")
    bits: Literal[4, 8, 16] = flag(16, "Bits in which the frozen weights of the language model are held.")
    lora_enable: bool = flag(False, "Train LoRA adapters in the language model.")
    lora_r: int = flag(64, "Rank of the LoRA matrices.")
    lora_alpha: int = flag(16, "LoRA scale; the update is multiplied by alpha / r.")
    lora_dropout: float = flag(0.05, "Dropout before LoRA A, at least 0 and below 1.")
    init_from: str = flag(
        "",
        "Directory to start from: of a LoRA run, of a projector run, or a whole model. Unset: model_name_or_path "
        "alone.",
    )
    adapter_mode: Literal["continue", "new", "merge_first"] | None = flag(
        None,
        "What becomes of the adapter in init_from. continue: it is trained on; new: it is left out, and what was "
        "trained beside it is kept; merge_first: it is merged into its base, which is trained from there. Unset: "
        "continue.",
    )
    lora_weight_path: str = flag("", "The original's name for init_from with adapter_mode continue.")
    lora_bias: Literal["none", "all", "lora_only"] = flag(
        "none", "Which biases of the language model are trained beside LoRA."
    )
    fast_lora: bool = flag(
        True, "LoRA's arithmetic written out in place of PEFT's; equal but for rounding, see docs/internals/speed.md."
    )
    mm_projector_lr: float | None = flag(None, "Learning rate of the projector. Unset: learning_rate.")
    group_by_modality_length: bool = flag(False, "Batches of similar length that are all with images or all without.")
    lora_target_modules: list[str] | None = flag(
        None,
        "Names of the linear layers inside the language model that get LoRA, such as q_proj v_proj. Unset: all of them "
        "but the output layer.",
    )
    save_vision_tower: bool = flag(False, "Write the vision tower's weights into full checkpoints too.")
    weights_format: Literal["auto", "bin", "safetensors", "both"] = flag(
        "auto", "File format of saved weights. auto: .bin for LoRA and projector, safetensors for full."
    )
    loss_normalization: Literal["tokens", "micro_batch"] = flag(
        "tokens",
        "tokens: the mean over all supervised tokens of an optimizer step; micro_batch: the mean of the means of its "
        "micro-batches, as in the original.",
    )
    gradient_checkpointing_every: int = flag(
        1, "gradient_checkpointing for every N-th layer alone, the first among them; 1 is all."
    )
    activation_offload: bool = flag(
        False,
        "With gradient_checkpointing full: keep the inputs of the layers in the host's memory until the backward pass.",
    )
    overwrite_output_dir: bool = flag(
        False,
        "Write over files in output_dir that are not this run's own. Complete checkpoints are still resumed.",
    )
    allow_base_mismatch: bool = flag(False, "Load an adapter on another base than the one it was trained on.")
    force: bool = flag(
        False,
        "Go on with another base, with files of different runs and with an adapter of another scale; warnings say what "
        "is ignored.",
    )
    logging_dir: str | None = flag(
        None, "Where TensorBoard files go. Unset: TENSORBOARD_LOGGING_DIR, else runs/ in output_dir."
    )
    bad_sample_limit: float = flag(
        0.05, "Share of the samples that may turn out unreadable during the run before it stops."
    )

    optim: str | None = flag(
        None, "Optimizer; the names are those of transformers. Unset: adamw_torch_fused on a GPU, adamw_torch on a CPU."
    )
    remove_unused_columns: bool = flag(False, "Must stay false: the collator needs columns that forward does not take.")
    logging_nan_inf_filter: bool = flag(False, "Hide a non-finite loss in the logs.")
    report_to: str | list[str] = flag("none", "Where to report besides the terminal, such as wandb or tensorboard.")
    prediction_loss_only: bool = flag(True, "Evaluation returns the loss alone, not the logits.")
    gradient_checkpointing: Literal["none", "full", "selective"] = flag(
        "none",
        "What the backward pass computes again to save memory: full, all of a layer; selective, all but matrix "
        "products and attention. True means full, False none.",
        switch=("none", "full"),
    )
    gradient_checkpointing_kwargs: dict[str, Any] | None = field(
        default_factory=lambda: {"use_reentrant": False},
        metadata={"help": "Options of torch.utils.checkpoint; use_reentrant has to be false."},
    )

    @property
    def start(self) -> tuple[str, str]:
        """The directory that the run starts from, "" without one, and the flag that named it."""
        return (self.init_from, "init_from") if self.init_from else (self.lora_weight_path, "lora_weight_path")
