"""Spellings that transformers renamed or removed: translated, or accepted without effect, and noted.

Checked against transformers 4.37 (what LLaVA ran on) and 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any, Final

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

_SWITCHES: Final[Mapping[str, tuple[Any, bool, str, object]]] = {
    "adafactor": (bool, True, "optim", "adafactor"),
    "group_by_length": (bool, True, "train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": (bool, True, "include_for_metrics", ["inputs"]),
    "save_safetensors": (bool | None, False, "weights_format", "bin"),
}
"""Type hint, and the position of the switch that stands for a value of another flag now; the other is the default."""

_KEYS: Final[Mapping[str, tuple[Any, str, str]]] = {
    "dispatch_batches": (bool | None, "accelerator_config", "dispatch_batches"),
    "fsdp_min_num_params": (int, "fsdp_config", "min_num_params"),
    "fsdp_transformer_layer_cls_to_wrap": (str | None, "fsdp_config", "transformer_layer_cls_to_wrap"),
    "split_batches": (bool | None, "accelerator_config", "split_batches"),
}
"""Type hint, and the flag and the key of its mapping that stand for it now."""

SPELLINGS: Final[Mapping[str, Any]] = {
    **dict.fromkeys(RENAMED),
    **{name: hint for table in (WITHOUT_EFFECT, _SWITCHES, _KEYS) for name, (hint, *_) in table.items()},
    "trust_remote_code": bool,
    "warmup_ratio": float,
}
"""Every old spelling with its type hint; None means that of its new name."""


def translate(name: str, value: Any, values: MutableMapping[str, Any], where: str) -> str:
    """Write the value of an old spelling, found at a place, into those of the same source, and return a note about it.

    Raises:
        UserError: The same source says otherwise under the new name, or the value has no meaning any more.
    """
    if name in WITHOUT_EFFECT:
        return f"{name} has no effect: {WITHOUT_EFFECT[name][1]}."

    if name in RENAMED:
        new = RENAMED[name]
        if values.setdefault(new, value) != value:
            raise UserError(f"{where}={value} contradicts {new}={values[new]}: they are the same flag. Give one.")
        return f"{name} is now called {new}."

    if name == "warmup_ratio":
        # A ratio is a number of warm-up steps below 1 now; 1.0 itself would mean one step. Warm-up steps beside it win,
        # as they did in transformers 4.37.
        if not 0.0 <= value <= 1.0:
            raise UserError(
                f"warmup_ratio={value}: a share of all steps lies between 0 and 1. For steps use warmup_steps."
            )
        if values.get("warmup_steps", 0) > 0:
            return f"warmup_ratio={value} has no effect beside warmup_steps={values['warmup_steps']}."
        values["warmup_steps"] = min(value, math.nextafter(1.0, 0.0)) if value else 0
        return f"warmup_ratio={value} is now warmup_steps={values['warmup_steps']} (below 1: a share of all steps)."

    if name == "trust_remote_code":
        if not value:
            return "trust_remote_code=False is how it always is."
        raise UserError(
            "trust_remote_code=True: code that comes with a model is never run. The models that are supported need "
            "none; leave the flag out."
        )

    if name in _KEYS:
        _, flag, key = _KEYS[name]
        if value is None or value == 0:
            return f"{name}={value} is the default."
        current: Any = values.get(flag) or {}
        if not isinstance(current, dict):
            raise UserError(f"{name} beside {flag}={current!r}: set {key} in that file instead.")
        values[flag] = {**current, key: value}
        return f"{name} is now {key} of {flag}."

    _, position, flag, meaning = _SWITCHES[name]
    if bool(value) != position:
        if name == "save_safetensors":
            return "save_safetensors=True has no effect: weights_format decides, safetensors for full checkpoints."
        return f"{name}={value} is the default."
    if values.get(flag, meaning) != meaning:
        raise UserError(f"{name} contradicts {flag}={values[flag]}: it means {flag}={meaning}. Give one of the two.")
    values[flag] = meaning
    shown = " ".join(map(str, meaning)) if isinstance(meaning, list) else meaning
    return f"{name if position else f'{name}={value}'} is now {flag}={shown}."
