"""Contradictions between flags, found before any file is opened.

Each message has three parts: what is wrong, what is allowed, what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from llava_ft.args.data import DataArguments
from llava_ft.args.model import ModelArguments
from llava_ft.args.training import TrainingFlags
from llava_ft.constants import ASPECT_RATIO_PATTERN
from llava_ft.conversation import get_template
from llava_ft.errors import UserError
from llava_ft.geometry import parse_grid_pinpoints, parse_s2_scales

CHECKPOINT_OPTIONS: Final = frozenset({"use_reentrant", "preserve_rng_state", "determinism_check", "early_stop"})
"""Options of `torch.utils.checkpoint` that `gradient_checkpointing_kwargs` takes."""

_RANGES: Final[Sequence[tuple[str, Callable[[float], bool], str]]] = (
    ("preprocessing_num_workers", lambda x: x >= 1, "must be at least 1. Leave it out to use every core."),
    (
        "validation_fraction",
        lambda x: 0 <= x < 1,
        "allowed is at least 0 and below 1. Give the share of data_path to hold out, such as 0.02.",
    ),
    ("length_multiple", lambda x: x >= 0, "must not be negative. Give 0 for no filling up, or 128."),
    ("lora_r", lambda x: x >= 1, "the rank must be at least 1. Usual values are 8 to 128."),
    ("lora_alpha", lambda x: x >= 1, "must be at least 1. Twice lora_r is usual."),
    ("lora_dropout", lambda x: 0 <= x < 1, "allowed is at least 0 and below 1. The default is 0.05."),
    ("model_max_length", lambda x: x >= 1, "must be at least 1 token. LLaVA v1.5 uses 2048."),
    ("bad_sample_limit", lambda x: 0 <= x <= 1, "a share between 0 and 1 is allowed. The default is 0.05."),
    ("mm_projector_lr", lambda x: x >= 0, "must not be negative. Leave it out to use learning_rate."),
    ("gradient_checkpointing_every", lambda x: x >= 1, "must be at least 1. 1 is every layer, 2 every second."),
    (
        "learning_rate weight_decay max_grad_norm warmup_steps dataloader_num_workers",
        lambda x: x >= 0,
        "must not be negative. Give 0 or more.",
    ),
    (
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps",
        lambda x: x >= 1,
        "must be at least 1. Give a whole number from 1.",
    ),
    ("max_steps", lambda x: x >= 1 or x == -1, "must be at least 1, or -1 to let num_train_epochs decide."),
    (
        "save_steps logging_steps eval_steps",
        lambda x: 0 < x <= 1 or (x > 1 and x == int(x)),
        "give a whole number from 1, or a share of all steps between 0 and 1.",
    ),
)
"""Numbers, what each has to be, and what is said of another one."""

_EXCLUSIVE: Final[Mapping[tuple[str, str], str]] = {
    ("validation_fraction", "validation_data_path"): ". Give either a file of its own or a share of data_path.",
    ("lora_enable", "tune_mm_mlp_adapter"): (
        ": tune_mm_mlp_adapter trains the projector alone. LoRA trains the projector beside it anyway, so leave out "
        "tune_mm_mlp_adapter."
    ),
    ("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter"): (
        ": one keeps the projector fixed, the other trains nothing else. Give one of the two."
    ),
    ("init_from", "lora_weight_path"): (
        ": lora_weight_path is init_from with adapter_mode=continue. Give one of the two."
    ),
    ("init_from", "pretrain_mm_mlp_adapter"): (
        ": init_from brings the projector it was trained with. Leave out pretrain_mm_mlp_adapter, or override a "
        "configuration file with --pretrain_mm_mlp_adapter null."
    ),
    ("bf16", "fp16"): ". Give one of the two; bf16 where the GPU has it.",
    ("bf16_full_eval", "fp16_full_eval"): ". Give one of the two; bf16 where the GPU has it.",
    ("packing", "padding_free"): ": packed rows have no padding between samples anyway. Give one of the two.",
    ("packing", "group_by_modality_length"): (
        ": packed rows are all of one length. Leave out one; --no_group_by_modality_length overrides a configuration "
        "file."
    ),
    ("packing", "train_sampling_strategy"): (
        ": samples stand where there is room for them, and packed rows are all of one length. Leave out "
        "train_sampling_strategy."
    ),
    ("group_by_modality_length", "train_sampling_strategy"): (
        ": both set the order of the records. Give one of the two."
    ),
}
"""Flags of which one at most may be given, and what is said of both."""


def check_arguments(
    model: ModelArguments, data: DataArguments, training: TrainingFlags, inherited: Mapping[str, object]
) -> None:
    """Refuse what cannot be meant; `inherited` are those fields of `transformers.TrainingArguments` that were given.

    Raises:
        UserError: For the first contradiction found.
    """
    get_template(model.version)
    values = {**vars(model), **vars(data), **vars(training), **inherited}
    problems = chain(
        _number_problems(values, inherited),
        _exclusions(values),
        _input_problems(model, data),
        _tuning_problems(model, training),
        _run_problems(training, inherited),
        _evaluation_problems(data, inherited),
    )
    for problem in problems:
        raise UserError(problem)


def find_idle_flags(model: ModelArguments, data: DataArguments, training: TrainingFlags) -> list[str]:
    """Return a note for each flag that differs from its default and changes nothing in this combination."""
    uses_lora, is_tiled = training.lora_enable, data.image_aspect_ratio not in ("square", "pad")
    idle = (
        ("freeze_backbone", uses_lora, " with lora_enable: LoRA keeps the language model fixed anyway"),
        ("lora_r lora_alpha lora_dropout lora_bias lora_target_modules", not uses_lora, " without lora_enable"),
        ("quant_type double_quant", training.bits != 4, f" with bits={training.bits}"),
        ("image_grid_pinpoints mm_patch_merge_type", not is_tiled, " without anyres"),
        ("vision_cache_dtype", data.vision_cache is None, " without vision_cache"),
        ("length_multiple", data.packing, " with packing: rows have model_max_length tokens"),
        ("gradient_checkpointing_every", training.gradient_checkpointing == "none", " without gradient_checkpointing"),
        ("mpt_attn_impl", True, ": use attn_implementation"),
    )
    given = {**vars(model), **vars(data), **vars(training)}
    defaults = {**vars(ModelArguments("")), **vars(DataArguments()), **vars(TrainingFlags()), "length_multiple": 0}
    return [
        f"{name} has no effect{why}."
        for names, is_idle, why in idle
        if is_idle
        for name in names.split()
        if given[name] not in (None, defaults[name])
    ]


def _number_problems(values: Mapping[str, Any], inherited: Mapping[str, object]) -> Iterator[str]:
    for names, is_allowed, otherwise in _RANGES:
        for name in names.split():
            value = values.get(name)
            if isinstance(value, int | float) and not is_allowed(value):
                yield f"{name}={f'{value:g}' if name in inherited else value}: {otherwise}"


def _exclusions(values: Mapping[str, Any]) -> Iterator[str]:
    given = {name: value for name, value in values.items() if value and value != "random"}
    for pair, why in _EXCLUSIVE.items():
        if given.keys() >= set(pair):
            shown = (name if given[name] is True else f"{name}={given[name]}" for name in pair)
            yield f"{' and '.join(shown)} exclude each other{why}"


def _input_problems(model: ModelArguments, data: DataArguments) -> Iterator[str]:
    if model.pretrain_mm_mlp_adapter == "":
        yield (
            "pretrain_mm_mlp_adapter is empty. Give the mm_projector.bin of a pretraining run, or leave the "
            "flag out to start from the base's or a new projector."
        )

    ratio = data.image_aspect_ratio
    if ratio is not None and not ASPECT_RATIO_PATTERN.fullmatch(ratio):
        yield (
            f"image_aspect_ratio={ratio}: unknown. Allowed: square, pad, anyres, anyres_max_N with N from 1. "
            "LLaVA v1.5 uses pad, LLaVA v1.6 anyres."
        )

    merge_type = model.mm_patch_merge_type
    if data.image_grid_pinpoints is not None:
        parse_grid_pinpoints(data.image_grid_pinpoints, 1)
    if ratio and ratio.startswith("anyres_max") and merge_type not in (None, "spatial_unpad"):
        yield (
            f"image_aspect_ratio={ratio} shrinks the grid of an unpadded picture, so it needs "
            f"mm_patch_merge_type=spatial_unpad, which is {merge_type}. Set that, or use image_aspect_ratio=anyres."
        )
    if model.s2_scales is not None:
        parse_s2_scales(model.s2_scales)
    if model.s2_scales is not None and ratio and ratio.startswith("anyres"):
        yield (
            f"s2_scales={model.s2_scales} and image_aspect_ratio={ratio} exclude each other: both cut images into "
            "tiles. Use image_aspect_ratio=pad with S2, or leave s2_scales out."
        )


def _tuning_problems(model: ModelArguments, training: TrainingFlags) -> Iterator[str]:
    frozen = model.freeze_backbone and training.freeze_mm_mlp_adapter and not training.lora_enable
    if frozen and not model.mm_use_im_start_end:
        yield (
            "freeze_backbone and freeze_mm_mlp_adapter leave nothing to train. Leave out one of them, or add "
            "lora_enable."
        )
    if training.bits != 16 and not (training.lora_enable or model.tune_mm_mlp_adapter):
        reason = (
            "a run with freeze_backbone writes the whole model, which quantised weights cannot be written as"
            if model.freeze_backbone
            else "quantised weights cannot be trained themselves"
        )
        yield (
            f"bits={training.bits}: {reason}. Add lora_enable (QLoRA), train the projector alone with "
            "tune_mm_mlp_adapter, or use bits=16."
        )

    if training.lora_weight_path and not training.lora_enable:
        yield (
            f"lora_weight_path={training.lora_weight_path} needs lora_enable, which is off. Add "
            "lora_enable, or leave out lora_weight_path."
        )
    if training.lora_target_modules is not None and not training.lora_target_modules:
        yield (
            "lora_target_modules is empty. Name layers such as q_proj v_proj, or leave it out for all linear layers."
        )
    for name in training.lora_target_modules or ():
        if "." in name or not name.isidentifier():
            yield (
                f"lora_target_modules={name}: allowed are plain layer names inside the language model, "
                "without a path or pattern, such as q_proj v_proj."
            )

    start, flag = training.start
    mode = training.adapter_mode
    if mode is not None and not start:
        yield (
            f"adapter_mode={mode} says what becomes of the adapter in init_from, which is missing. Add init_from, or "
            "leave out adapter_mode."
        )
    if flag == "lora_weight_path" and mode not in (None, "continue"):
        yield (
            f"adapter_mode={mode} and lora_weight_path={start} exclude each other: lora_weight_path always goes on "
            f"with the adapter. Write init_from={start}."
        )
    if mode == "merge_first" and training.bits != 16:
        yield (
            f"adapter_mode=merge_first and bits={training.bits} exclude each other: quantising the merged weights "
            "would change what the adapter has learnt. Use bits=16, or go on with the adapter on quantised weights "
            "(adapter_mode=continue); or run llava-ft merge and give its result as model_name_or_path."
        )


def _run_problems(training: TrainingFlags, inherited: Mapping[str, object]) -> Iterator[str]:
    if training.remove_unused_columns:
        yield (
            "remove_unused_columns=True would take from the records what the collator needs. Only False is "
            "allowed; leave the flag out."
        )
    if training.activation_offload and training.gradient_checkpointing != "full":
        yield (
            f"activation_offload with gradient_checkpointing={training.gradient_checkpointing}: what is moved to the "
            "host's memory is the inputs of layers that are computed again as a whole. Add "
            "gradient_checkpointing=full, or leave out activation_offload."
        )
    options = training.gradient_checkpointing_kwargs or {}
    if options.get("use_reentrant"):
        yield (
            "gradient_checkpointing_kwargs: use_reentrant=true loses the gradients of layers whose input needs none. "
            "Only false is allowed; leave it out."
        )
    moved = {"every_n_layers": "gradient_checkpointing_every", "offload": "activation_offload"}
    for name in options:
        if name not in CHECKPOINT_OPTIONS:
            instead = f"use {moved[name]}" if name in moved else "leave it out"
            yield (
                f"gradient_checkpointing_kwargs has {name}. Allowed are {', '.join(sorted(CHECKPOINT_OPTIONS))}; "
                f"{instead}."
            )

    epochs = _number(inherited, "num_train_epochs", 3.0)
    if epochs <= 0 and _number(inherited, "max_steps", -1.0) == -1:
        yield f"num_train_epochs={epochs:g}: must be above 0 unless max_steps is given. Give either."


def _evaluation_problems(data: DataArguments, inherited: Mapping[str, object]) -> Iterator[str]:
    evaluation = inherited.get("eval_strategy", "no")
    saving = inherited.get("save_strategy", "steps")
    # Whether a mixture holds records out is seen when it is opened.
    is_mixture = (data.data_path or "").lower().endswith((".yaml", ".yml"))
    has_validation = data.validation_data_path is not None or data.validation_fraction > 0 or is_mixture
    hint = "Add validation_data_path or validation_fraction, or held_out to a mixture"
    if evaluation != "no" and not has_validation:
        yield f"eval_strategy={evaluation} needs records to evaluate on. {hint}; or set eval_strategy=no."
    if saving == "best" and evaluation == "no":
        yield f"save_strategy=best needs an evaluation to tell what is best. {hint} and an eval_strategy."
    if not inherited.get("load_best_model_at_end"):
        return
    if evaluation == "no":
        yield f"load_best_model_at_end needs an evaluation to tell what is best. {hint} and an eval_strategy."
    elif saving not in ("best", evaluation):
        yield (
            f"load_best_model_at_end: save_strategy={saving} and eval_strategy={evaluation} differ, so the "
            "best model may never have been saved. Give both the same value."
        )
    elif saving == "steps":
        save_steps = _number(inherited, "save_steps", 500.0)
        eval_steps = _number(inherited, "eval_steps", _number(inherited, "logging_steps", 500.0))
        ratio = save_steps / eval_steps
        if (save_steps < 1) != (eval_steps < 1) or abs(ratio - round(ratio)) > 1e-6 or round(ratio) < 1:
            yield (
                f"load_best_model_at_end: save_steps={save_steps:g} is no multiple of "
                f"eval_steps={eval_steps:g}, so the best model may never have been saved. Give a multiple."
            )


def _number(inherited: Mapping[str, object], name: str, default: float) -> float:
    value = inherited.get(name)
    return float(value) if isinstance(value, int | float) else default
