"""Spellings that transformers renamed or removed: translated, or accepted without effect, and noted.

Checked against transformers 4.37 (what LLaVA ran on) and 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final, TypeAlias

from llava_ft.errors import UserError

RENAMED: Final[Mapping[str, str]] = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
}
"""Same values under another name."""

WITHOUT_EFFECT: Final[Mapping[str, tuple[Any, str]]] = {
    "_n_gpu": (int, "one process drives one GPU"),
    "fp16_backend": (str, "torch's own mixed precision is used"),
    "fp16_opt_level": (str, "it belonged to apex"),
    "half_precision_backend": (str, "torch's own mixed precision is used"),
    "include_tokens_per_second": (bool | None, "tokens per second are always logged"),
    "jit_mode_eval": (bool, "transformers removed it"),
    "mp_parameters": (str, "it belonged to SageMaker"),
    "overwrite_output_dir": (bool, "a run continues from the newest checkpoint in output_dir; give a new directory"),
    "past_index": (int, "transformers removed it"),
    "push_to_hub_organization": (str | None, "write it into hub_model_id, as in organization/name"),
    "ray_scope": (str | None, "there is no hyper-parameter search"),
    "tpu_metrics_debug": (bool, "TPUs are not supported"),
    "tpu_num_cores": (int | None, "TPUs are not supported"),
    "use_ipex": (bool, "transformers removed it"),
    "use_legacy_prediction_loop": (bool, "transformers removed it"),
    "use_mps_device": (bool, "the device is CUDA where there is one, else the CPU"),
}
"""Type hint, and why nothing happens."""

Values: TypeAlias = "MutableMapping[str, object]"
Translation: TypeAlias = Callable[[str, object, Values], str]
"""Gets the old flag's name and value; changes the values of the same source, and returns a note."""


def _warmup_ratio(_name: str, value: object, values: Values) -> str:
    """A ratio is a number of warm-up steps below 1 now; 1.0 itself would mean one step.

    Warm-up steps beside it win, as they did in transformers 4.37.
    """
    ratio = float(str(value))
    if not 0.0 <= ratio <= 1.0:
        raise UserError(f"warmup_ratio={ratio}: a share of all steps lies between 0 and 1. For steps use warmup_steps.")
    if float(str(values.get("warmup_steps", 0))) > 0:
        return f"warmup_ratio={ratio} has no effect beside warmup_steps={values['warmup_steps']}."
    values["warmup_steps"] = min(ratio, math.nextafter(1.0, 0.0)) if ratio else 0
    return f"warmup_ratio={ratio} is now warmup_steps={values['warmup_steps']} (below 1: a share of all steps)."


def _save_safetensors(name: str, value: object, values: Values) -> str:
    if value:
        return "save_safetensors=True has no effect: weights_format decides, safetensors for full checkpoints."
    return _is_now("weights_format", "bin", switched_on_by=False)(name, value, values)


def _trust_remote_code(_name: str, value: object, _values: Values) -> str:
    if not value:
        return "trust_remote_code=False is how it always is."
    raise UserError(
        "trust_remote_code=True: code that comes with a model is never run. The models that are supported need none; "
        "leave the flag out."
    )


def _is_now(new: str, meaning: str | list[str], *, switched_on_by: bool = True) -> Translation:
    """Translate a switch into a value of another flag, unless the same source says otherwise under the new name."""

    def translate(old: str, value: object, values: Values) -> str:
        if bool(value) != switched_on_by:
            return f"{old}={value} is the default."
        if values.get(new, meaning) != meaning:
            raise UserError(f"{old} contradicts {new}={values[new]}: it means {new}={meaning}. Give one of the two.")
        values[new] = meaning
        shown = old if switched_on_by else f"{old}={value}"
        return f"{shown} is now {new}={' '.join(meaning) if isinstance(meaning, list) else meaning}."

    return translate


def _into_mapping(target: str, key: str) -> Translation:
    """Translate a flag into one key of another flag that takes a mapping."""

    def translate(name: str, value: object, values: Values) -> str:
        if value is None or value == 0:
            return f"{name}={value} is the default."
        current: Any = values.get(target) or {}
        if not isinstance(current, dict):
            raise UserError(f"{name} beside {target}={current!r}: set {key} in that file instead.")
        values[target] = {**current, key: value}
        return f"{name} is now {key} of {target}."

    return translate


TRANSLATED: Final[Mapping[str, tuple[Any, Translation]]] = {
    "adafactor": (bool, _is_now("optim", "adafactor")),
    "dispatch_batches": (bool | None, _into_mapping("accelerator_config", "dispatch_batches")),
    "fsdp_min_num_params": (int, _into_mapping("fsdp_config", "min_num_params")),
    "fsdp_transformer_layer_cls_to_wrap": (
        str | None,
        _into_mapping("fsdp_config", "transformer_layer_cls_to_wrap"),
    ),
    "group_by_length": (bool, _is_now("train_sampling_strategy", "group_by_length")),
    "include_inputs_for_metrics": (bool, _is_now("include_for_metrics", ["inputs"])),
    "save_safetensors": (bool | None, _save_safetensors),
    "split_batches": (bool | None, _into_mapping("accelerator_config", "split_batches")),
    "trust_remote_code": (bool, _trust_remote_code),
    "warmup_ratio": (float, _warmup_ratio),
}
"""Type hint, and what to do."""

SPELLINGS: Final = frozenset(RENAMED) | frozenset(WITHOUT_EFFECT) | frozenset(TRANSLATED)
