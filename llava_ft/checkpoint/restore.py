"""Putting trained weights back: what a resumed run, a run that starts from an adapter, and inference have in common.

Every trained tensor has to be restored and every tensor in the files has to find its place; anything else is an error
that lists the difference. A projector that silently starts anew is the mistake this module exists to prevent.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_ft.checkpoint.directory import ModelDirectory, base_of_adapter, identify
from llava_ft.checkpoint.fields import AdapterFields
from llava_ft.checkpoint.manifest import check_pairing, read_manifest
from llava_ft.checkpoint.names import (
    ADAPTER_ALL_BIN,
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    ADAPTER_SAFETENSORS,
    MANIFEST,
    NEW_ROWS_SUFFIX,
    NON_LORA_BIN,
    TRAINER_STATE,
    is_derived,
    is_transformers_spelling,
    plain_name,
)
from llava_ft.checkpoint.overrides import Force, refuse_unless
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import CheckpointError, some_of
from llava_ft.json_files import read_json
from llava_ft.models.builder import is_llava_config
from llava_ft.models.parts import module_part

logger = logging.getLogger(__name__)


def trained_files(directory: ModelDirectory, *, force: Force = False) -> list[WeightFiles]:
    """Return the weight files of a directory that a run wrote.

    With `force` files that were not written together are used as they are, and an adapter without its projector.

    Returns:
        For an adapter its file, which may hold more than LoRA matrices, and `non_lora_trainables` if there is one.

    Raises:
        CheckpointError: One that belongs there is missing or damaged.
    """
    check_pairing(directory.path, force=force)
    if directory.kind != "lora":
        projector = directory.projector_file if directory.kind == "projector" else None
        return [WeightFiles.open(projector or directory.path)]
    if directory.adapter_file is None:
        raise CheckpointError(
            f"{directory.path} has {ADAPTER_CONFIG} but no weights: neither {ADAPTER_BIN} nor {ADAPTER_SAFETENSORS}, "
            f"nor {ADAPTER_ALL_BIN}. Is the copy or download complete?"
        )
    adapter = WeightFiles.open(directory.adapter_file)
    if directory.non_lora_file is not None:
        return [adapter, WeightFiles.open(directory.non_lora_file)]
    if lacks_projector(directory, adapter.tensors):
        refuse_unless(
            force is True,
            f"{directory.path} has an adapter but no {NON_LORA_BIN}: the projector that was trained with it is "
            "missing, and without it the adapter gives wrong answers.",
            "Original LLaVA leaves the file out of its intermediate checkpoints. `llava-ft consolidate` gets it out of "
            "DeepSpeed's files; or use the output directory of the finished run.",
        )
    return [adapter]


def lacks_projector(directory: ModelDirectory, adapter_keys: Iterable[str]) -> bool:
    """Whether a projector was trained beside an adapter and is not in its file.

    LLaVA and this program train it, and write it to a file of its own; PEFT by itself writes all it trains to one file.
    So what counts is who wrote the directory: one with the names of transformers' own layout comes from PEFT, as does
    one that holds nothing that a run of LLaVA leaves - its configuration, its state, DeepSpeed's files.
    """
    if any(module_part(plain_name(key)) == "projector" or is_transformers_spelling(key) for key in adapter_keys):
        return False
    leftovers = (TRAINER_STATE, MANIFEST, "latest")
    return (
        is_llava_config(directory.config)
        or any((directory.path / name).is_file() for name in leftovers)
        or any(directory.path.glob("global_step*"))
    )


_SHAPE_SETTINGS = ("r", "use_dora")
_SCALE_SETTINGS = frozenset({"lora_alpha", "use_rslora"})
"""Settings of an adapter that say how much its matrices weigh; with others their shapes or meaning differ."""

PutValue = Callable[[str, nn.Parameter, torch.Tensor], None]
"""Gives a parameter its value: plain name, parameter, whole value."""


def put_value(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Copy a value into a parameter that is whole."""
    with torch.no_grad():
        parameter.copy_(value)


def restore_trained(
    model: nn.Module,
    path: Path,
    *,
    as_start: bool = False,
    put: PutValue = put_value,
    force: Force = False,
    is_needed: Callable[[str], bool] = lambda _: True,
) -> None:
    """Copy the trained weights of a directory into a model with the same trainable parameters.

    Args:
        model: The model of the run; a PEFT model for LoRA.
        path: A checkpoint or the output directory of a run.
        as_start: Whether a new run starts from these weights, so that it may freeze what the earlier one trained.
        put: How a parameter gets its value, where several ranks share the model. It is called in the same order on all
            of them.
        force: Whether files that were not written together, and an adapter of another scale, are taken as they are.
        is_needed: Whether a trained parameter, by plain name, has to be in the files; False for one that has its value.

    Raises:
        CheckpointError: A trainable parameter is not in the files, or the files hold something else.
    """
    directory = identify(path)
    trainable = {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    peft_config = getattr(model, "peft_config", None)
    if peft_config is None and directory.kind == "lora":
        raise CheckpointError(f"{path} holds a LoRA adapter, but this run trains no LoRA.")
    if peft_config is not None:
        if directory.kind != "lora":
            raise CheckpointError(f"{path} holds no LoRA adapter, but this run trains one (lora_enable).")
        settings = {key: getattr(peft_config["default"], key) for key in (*_SHAPE_SETTINGS, *_SCALE_SETTINGS)}
        check_adapter_settings(directory, settings, force=force)
    is_whole = directory.kind not in ("lora", "projector")
    may_be_frozen = {plain_name(name) for name, _ in model.named_parameters()} if is_whole or as_start else set[str]()
    restored: set[str] = set()
    unexpected: list[str] = []
    for files in trained_files(directory, force=force):
        names = {key: name for key in files.tensors if not is_derived(name := plain_name(key))}
        for key, name in list(names.items()):
            rows_name = name.removesuffix(".weight") + NEW_ROWS_SUFFIX
            if rows_name in names.values():
                del names[key]  # a matrix that is whole for other programs; the rows themselves are there too
            elif rows_name in trainable:
                names[key] = rows_name  # the original's file has the matrix alone, and the rows at its end
        unexpected += [key for key, name in names.items() if name not in trainable and name not in may_be_frozen]
        wanted = {key: name for key, name in names.items() if name in trainable}
        wrong: list[str] = []
        for key, name in wanted.items():
            shape, needed = files.tensors[key].shape, whole_shape(trainable[name])
            has_rows_at_its_end = name.endswith(NEW_ROWS_SUFFIX) and shape[0] > needed[0] and shape[1:] == needed[1:]
            if shape != needed and not has_rows_at_its_end:
                wrong.append(f"{name} is {tuple(shape)} in the file and {needed} here")
        if wrong:
            raise CheckpointError(
                f"{files.path} does not fit this run: {some_of(wrong, 2)}. Was it made with another rank or another "
                "model?"
            )
        for key, tensor in files.stream(wanted):
            parameter = trainable[wanted[key]]
            value = tensor[-whole_shape(parameter)[0] :] if wanted[key].endswith(NEW_ROWS_SUFFIX) else tensor
            put(wanted[key], parameter, value)
            restored.add(wanted[key])
    missing = [name for name in trainable if name not in restored and is_needed(name)]
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit this run. "
            + (f"Trained here but not in it: {some_of(missing)}. " if missing else "")
            + (f"In it but not trained here: {some_of(unexpected)}. " if unexpected else "")
            + "Was it made with another model, another adapter or other flags for what is trained?"
        )


def check_base(path: Path, fingerprint: str, base: str, *, force: Force = False) -> str | None:
    """Check that the trained weights in `path` are put on the language model they were trained on.

    `fingerprint` is that of the language model at hand; its path, `base`, is for messages. With `force` another base is
    used all the same.

    Returns:
        What is wrong and was passed over, which has been logged; None if nothing is.

    Raises:
        CheckpointError: They do not fit.
    """
    manifest = read_manifest(path)
    if manifest is None or not manifest.base_fingerprint:
        # Nothing but a name tells which base weights without a fingerprint belong to.
        named = base_of_adapter(path)
        if named and Path(named).name != Path(base).name:
            logger.warning(
                "%s was trained on %s, by its %s, and is put on %s. It has no fingerprint of its base, so only shapes "
                "can be compared. See that it is the same model.",
                path,
                named,
                ADAPTER_CONFIG,
                base,
            )
        return None
    if manifest.base_fingerprint == fingerprint:
        return None
    problem = (
        f"{path} was trained on {manifest.base} ({manifest.base_fingerprint}), but the model given is {base} "
        f"({fingerprint}), whose weights differ."
    )
    advice = "Give the original base model, or pass --allow_base_mismatch true or --force if you know that it fits."
    return refuse_unless(force is not False, problem, advice)


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, also where DeepSpeed's ZeRO-3 has divided it and left an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_adapter_settings(directory: ModelDirectory, settings: Mapping[str, Any], *, force: Force = False) -> None:
    """Check that an adapter was made with the settings of the run that is to train on it, under PEFT's names.

    One that is absent from `settings` is not compared. With `force`, the matrices are scaled anew where only the scale
    differs.

    Raises:
        CheckpointError: They differ, or are set module by module in it.
    """
    on_disk = read_json(directory.path / ADAPTER_CONFIG, AdapterFields)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if on_disk.get(key)]
    if patterns:
        raise CheckpointError(
            f"The adapter in {directory.path} has settings of its own for some modules ({', '.join(patterns)}), and "
            "training gives all modules the same. Use --adapter_mode merge_first or new."
        )
    different = {
        key: f"{key} is {on_disk.get(key)} in it and {here} here"
        for key, here in settings.items()
        if key in on_disk and on_disk[key] != here
    }
    if not different:
        return
    problem = f"The adapter in {directory.path} was made with other settings: {', '.join(different.values())}."
    is_scale_alone = set(different) <= _SCALE_SETTINGS
    advice = "Use the same" + (", or pass --force to scale its matrices anew." if is_scale_alone else ".")
    refuse_unless(force is True and is_scale_alone, problem, advice)
