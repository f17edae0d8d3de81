"""What a resumed run asks for that its checkpoint was not made with: refused, or noted in one line.

Every setting is in one of three groups. What was learnt belongs to `FIXED` ones: with others the run would go on from
something else without a word. `FREE` ones change nothing of what is learnt. All others take effect, and are noted.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
import yaml

from llava_ft.args import resolved_config
from llava_ft.checkpoint.lineage import read_lineage
from llava_ft.checkpoint.names import CONFIG, RUN_CONFIG
from llava_ft.checkpoint.save import config_fields
from llava_ft.errors import CheckpointError, UserError
from llava_ft.json_files import read_json
from llava_ft.resolve import RunModel

logger = logging.getLogger(__name__)

FIXED: Final = frozenset((
    "version", "supervise", "optim", "optim_target_modules", "bits", "quant_type", "double_quant",
    "lora_enable", "lora_r", "lora_alpha", "lora_bias", "lora_target_modules",
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone",
))  # fmt: skip
"""Flags that have to stay. Those that `config.json` keeps have to as well: see `_fields_of`."""

FREE: Final = frozenset((
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "init_from", "lora_weight_path", "adapter_mode",
    "model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "force", "allow_base_mismatch", "cache_dir",
    "data_path", "validation_data_path",  # compared by what they hold
    "data_cache_dir", "vision_cache", "preprocessing_num_workers", "lazy_preprocess", "is_multimodal", "mpt_attn_impl",
    "report_to", "run_name", "project", "disable_tqdm", "debug", "log_level", "log_level_replica", "log_on_each_node",
    "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps", "logging_strategy",
    "save_steps", "save_strategy", "save_total_limit", "save_on_each_node", "save_only_model", "save_vision_tower",
    "weights_format", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy",
    "hub_always_push", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "skip_memory_metrics", "include_num_input_tokens_seen", "do_train", "do_eval", "do_predict", "eval_on_start",
    "eval_steps", "eval_strategy", "eval_delay", "per_device_eval_batch_size", "eval_accumulation_steps",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_multiprocessing_context", "ddp_timeout", "deepspeed", "use_cpu", "torch_empty_cache_steps",
    "gradient_checkpointing", "gradient_checkpointing_every", "gradient_checkpointing_kwargs", "activation_offload",
    # Compared as the settled configuration has them.
    "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type",
    "mm_use_im_start_end", "mm_use_im_patch_token", "image_aspect_ratio", "image_grid_pinpoints", "s2_scales",
    # What a step takes is compared with `ranks.json`.
    "per_device_train_batch_size", "gradient_accumulation_steps", "remove_unused_columns", "prediction_loss_only",
))  # fmt: skip
"""Flags that change nothing of what is learnt, or whose change is looked at elsewhere."""

_SAME_STATE: Final[Mapping[str, str]] = {"adamw_torch_fused": "adamw_torch"}
"""Optimizers that keep the same state."""

_NOT_COMPARED: Final = frozenset((
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
    "mm_vision_tower",  # a path; its architecture is compared
    "mm_projector_lr", "tokenizer_model_max_length", "tokenizer_padding_side", "conversation_template",
    "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower",
))  # fmt: skip
"""Fields of `config.json` that are no architecture, or that flags of the same name say."""


def check_changes(run: RunModel, checkpoint: Path) -> None:
    """Compare what a run asks for with what its checkpoint was made with, and note what takes effect.

    A checkpoint of another program says too little to be compared.

    Raises:
        CheckpointError: A setting to which what was learnt belongs is another one.
    """
    if not (checkpoint / RUN_CONFIG).is_file():
        return
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(transformers.TrainingArguments)
        if field.default is not dataclasses.MISSING
    }
    said = (_read_settings(checkpoint), resolved_config(run.args))  # with None for what was left to transformers
    before, now = (defaults | {name: v for name, v in one.items() if v is not None} for one in said)
    for settings in (before, now):
        settings["optim"] = _SAME_STATE.get(str(_plain(settings["optim"])), settings["optim"])
    changed = {
        name: f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}"
        for name in sorted({*before, *now} - FREE)
        if _plain(before.get(name)) != _plain(now.get(name))
    }
    fixed = [text for name, text in changed.items() if name in FIXED]
    fixed += _changed_fields(run, checkpoint)
    if fixed:
        raise CheckpointError(
            f"{checkpoint} was made with other settings, to which what it learnt belongs: {', '.join(fixed)}. Use the "
            f"same; or start a new run from its weights, with --init_from {checkpoint} and another --output_dir."
        )
    if changed:
        logger.warning("Changed since %s: %s.", checkpoint.name, ", ".join(changed.values()))


def note_changed_data(checkpoint: Path, data: list[dict[str, Any]]) -> None:
    """Note records that are others than those a checkpoint was trained on: their order and number may differ."""
    lineage = read_lineage(checkpoint)
    if lineage is None:
        return
    before: list[dict[str, Any]] = lineage.get("data", [])
    compared = ("path", "fingerprint", "num_usable", "image_folder")
    old, new = ([{key: source.get(key) for key in compared} for source in sources] for sources in (before, data))
    for source in new:
        if source not in old:
            logger.warning(
                "Changed since %s: the records of %s (%s usable now) are another file than then, by its path, size or "
                "time of change, or have another image folder. The run goes on at the same place in their order.",
                checkpoint.name,
                source["path"],
                source["num_usable"],
            )


def _read_settings(checkpoint: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load((checkpoint / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{checkpoint / RUN_CONFIG} cannot be read ({error}). Use another checkpoint.") from None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _changed_fields(run: RunModel, checkpoint: Path) -> list[str]:
    """Name the fields of the model's configuration that differ."""
    if not (checkpoint / CONFIG).is_file():
        return []
    before, now = read_json(checkpoint / CONFIG), config_fields(run.config, torch.float32)
    return [
        f"{name} {_shown(before[name])} -> {_shown(now[name])}"
        for name in sorted(before.keys() & now.keys() - _NOT_COMPARED)
        if _plain(before[name]) != _plain(now[name])
    ]


def _plain(value: Any) -> Any:
    """Return a value as it is after being written and read: lists for tuples, texts for choices."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[Any]", value)]
    return getattr(value, "value", value)


def _shown(value: Any) -> str:
    text = str(_plain(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
