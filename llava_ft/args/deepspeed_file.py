"""DeepSpeed's JSON file: found by name, and checked against itself and the flags before anything is loaded.

DeepSpeed, accelerate and transformers each read the file at another moment, most of it after the weights. What they
would refuse then is refused here; what they would ignore silently is refused too, or noted.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

from llava_ft.args.sources import find_config, known_configs
from llava_ft.errors import UserError, did_you_mean

_Section = Mapping[str, Any]

_FILLED_IN: Final[Mapping[str, str]] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "fp16.enabled": "fp16",
    "bf16.enabled": "bf16",
}
"""Where `auto` becomes the value of a flag, and where another value has to equal it."""

_COMPUTED: Final = frozenset(
    {
        "train_batch_size",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
    }
)
"""Where `auto` is computed."""

_LEFT_TO_THE_TRAINER: Final[Mapping[str, str]] = {
    "optimizer": "optim, and its groups to mm_projector_lr and weight_decay",
    "scheduler": "lr_scheduler_type and warmup_steps",
}

_KNOWN_KEYS: Final = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "disable_allgather", "dump_state", "elasticity", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "gradient_predivide_factor", "memory_breakdown", "optimizer", "prescale_gradients",
    "scheduler", "seq_parallel_communication_data_type", "sparse_gradients", "steps_per_print", "tensorboard",
    "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown",
    "wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""Keys of DeepSpeed 0.19 at the top of the file. It ignores others without a word."""


def read_deepspeed_config(given: str | dict[str, Any], notes: list[str]) -> tuple[dict[str, Any], str]:
    """Return a DeepSpeed configuration, and its path or, where it was given as a mapping, what messages call it.

    A path that does not exist is looked up in `configs` by its file name, with or without `.json`, because published
    command lines say `./scripts/zero3.json`.

    Raises:
        UserError: If there is none, or it is no JSON object.
    """
    if not isinstance(given, str):
        return given, "the mapping"
    path = Path(given).expanduser()
    found = find_config(given, (".json",), anywhere=True)
    if found is None:
        known = known_configs(".json")
        hint = did_you_mean(path.stem, [file.removesuffix(".json") for file in known])
        raise UserError(
            f"deepspeed={given}: there is no such file. Give the path of a DeepSpeed JSON file or one of the "
            f"names in configs: {', '.join(known) or 'none found'}.{hint}"
        )
    try:
        content: Any = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed={found} cannot be read: {error}. Give a DeepSpeed JSON file.") from error
    if not isinstance(content, dict):
        raise UserError(f"deepspeed={found} holds no JSON object. Give a DeepSpeed JSON file.")
    if found != path:
        notes.append(f"deepspeed={given} is taken from {found}.")
    return dict[str, Any](content), str(found)  # pyright: ignore[reportUnknownArgumentType]


def check_deepspeed_config(config: _Section, source: str, values: Mapping[str, Any]) -> list[str]:
    """Compare a configuration, which messages call `source`, with what DeepSpeed knows and every training argument.

    Returns:
        Notes about what DeepSpeed will do differently from what the flags say.

    Raises:
        UserError: For the first thing that cannot work or contradicts a flag.
    """
    for problem in chain(_own_problems(config), _flag_problems(config, values), _section_problems(config)):
        raise UserError(f"deepspeed={source}: {problem}")
    notes: list[str] = []
    if "gradient_clipping" not in config and values["max_grad_norm"]:
        notes.append(
            f"Gradients are not clipped: {source} has no gradient_clipping, so max_grad_norm="
            f'{values["max_grad_norm"]:g} has no effect. "gradient_clipping": "auto" in it would apply it.'
        )
    unknown = sorted(set(config) - set(_KNOWN_KEYS))
    if unknown:
        notes.append(f"DeepSpeed may not know {', '.join(unknown)} in {source} and ignore it.")
    return notes


def choose_offloaded_adam(config: dict[str, Any], *, uses_cpu: bool) -> list[str]:
    """Choose the Adam that steps on the CPU when the optimizer is offloaded: DeepSpeed's, or torch's.

    DeepSpeed's is several times faster and is compiled at its first use, which pays on a machine with GPUs and is not
    possible without a compiler. A file that says `zero_force_ds_cpu_optimizer` has decided itself. With `uses_cpu` the
    model is on the CPU too, so that nothing is offloaded really.

    Returns:
        A note if torch's is taken, which the configuration then says.
    """
    zero: Mapping[str, Any] = config["zero_optimization"]
    offload: Mapping[str, Any] = zero.get("offload_optimizer") or {}
    if offload.get("device", "none") == "none" or "zero_force_ds_cpu_optimizer" in config:
        return []
    if uses_cpu:
        reason = "there is no GPU to offload from"
    elif shutil.which(os.environ.get("CXX") or "c++") is None:
        reason = "there is no C++ compiler to build DeepSpeed's with (install g++ for a faster step)"
    else:
        return []
    config["zero_force_ds_cpu_optimizer"] = False
    return [f"The offloaded optimizer is torch's: {reason}."]


def _own_problems(config: _Section) -> Iterator[str]:
    for key in config:
        nearest = difflib.get_close_matches(key, _KNOWN_KEYS, n=1, cutoff=0.8)
        if key not in _KNOWN_KEYS and nearest:
            yield f"there is no key {key}. Did you mean {nearest[0]}? DeepSpeed would ignore it."
    for key, flags in _LEFT_TO_THE_TRAINER.items():
        if key in config:
            yield f"{key} cannot be set here: it is left to {flags}. Remove {key} and use these flags."
    if not isinstance(config.get("zero_optimization"), Mapping):
        yield (
            f"zero_optimization is {json.dumps(config.get('zero_optimization'))}; it has to be an object that holds at "
            'least the stage. Write "zero_optimization": {"stage": 2}, or 0 for none.'
        )
    elif config["zero_optimization"].get("round_robin_gradients"):
        yield (
            "zero_optimization.round_robin_gradients is true, with which DeepSpeed 0.19 names the wrong parameters in "
            "what it saves, so that a checkpoint could not be resumed. Remove the key."
        )
    for key in ("fp16", "bf16"):
        if not isinstance(config.get(key, {}), Mapping):
            yield f'{key} is {json.dumps(config[key])}; it has to be an object. Write "{key}": {{"enabled": "auto"}}.'
    sections: list[tuple[str, _Section]] = [("", config)]
    sections += [(f"{key}.", config[key]) for key in ("fp16", "bf16", "zero_optimization") if key in config]
    for prefix, section in sections:
        for key, value in section.items():
            name = prefix + key
            if value == "auto" and name not in _FILLED_IN and name not in _COMPUTED:
                yield f"{name} is auto, which nothing fills in. Write a value, or leave it out for DeepSpeed's default."


def _flag_problems(config: _Section, values: Mapping[str, Any]) -> Iterator[str]:
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        flag = _FILLED_IN[key]
        value, wanted = config.get(key, 1 if key == "gradient_accumulation_steps" else "auto"), values[flag]
        if value not in ("auto", wanted):
            stated = f"is {json.dumps(value)}" if key in config else "is absent, which counts as 1"
            yield f'{key} {stated}, but {flag} is {json.dumps(wanted)}. Write "{key}": "auto", or make them equal.'
    if not {"train_micro_batch_size_per_gpu", "train_batch_size"} & set(config):
        yield 'it has no batch size. Write "train_micro_batch_size_per_gpu": "auto".'
    num_ranks = int(os.environ.get("WORLD_SIZE") or 1)
    batch_size, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    product = num_ranks * batch_size * accumulation
    total = config.get("train_batch_size", "auto")
    if total not in ("auto", product):
        yield (
            f"train_batch_size is {json.dumps(total)}, but {num_ranks} ranks x {batch_size} x {accumulation} "
            f'accumulation steps are {product}. Write "train_batch_size": "auto".'
        )

    enabled: dict[str, Any] = {key: config.get(key, {}).get("enabled", False) for key in ("fp16", "bf16")}
    if enabled["fp16"] is True and enabled["bf16"] is True:
        yield 'fp16 and bf16 are both enabled. Write "enabled": "auto" in both, and give --bf16 or --fp16.'
    for key, value in enabled.items():
        if value != "auto" and value != values[key]:
            stated = f"{key}.enabled is {json.dumps(value)}" if key in config else f"it has no section {key}"
            yield f'{stated}, but the flag {key} is {json.dumps(values[key])}. Write "{key}": {{"enabled": "auto"}}.'


def _section_problems(config: _Section) -> Iterator[str]:
    """Let DeepSpeed read the sections that it checks itself."""
    from deepspeed.runtime.precision_config import (  # pyright: ignore[reportMissingTypeStubs]
        DeepSpeedBF16Config,
        DeepSpeedFP16Config,
    )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # pyright: ignore[reportMissingTypeStubs]
    from pydantic import ValidationError

    models: dict[str, Any] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for key, model in models.items():
        try:
            model(**config.get(key, {}))
        except (ValidationError, AssertionError) as error:
            if not isinstance(error, ValidationError):
                yield f"{key}: {error}."
                continue
            for detail in error.errors():
                name, given = ".".join((key, *map(str, detail["loc"]))), detail["input"]
                if detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1:
                    fields: Mapping[str, Any] = model.model_fields
                    known = {text for field, info in fields.items() for text in (field, info.alias) if text}
                    yield f"there is no key {name}.{did_you_mean(str(detail['loc'][0]), sorted(known), ' Remove it.')}"
                elif detail["type"].startswith("int_"):
                    whole = f" Write {round(given)}." if isinstance(given, float) else ""
                    yield f"{name} is {json.dumps(given)}; it has to be a whole number.{whole}"
                else:
                    yield f"{name} is {json.dumps(given)}: {detail['msg']}."
