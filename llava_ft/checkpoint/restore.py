"""Putting trained weights back: what a resumed run, a run that starts from an adapter, and inference have in common.

Every trained tensor has to be restored and every tensor in the files has to find its place; anything else is an error
that lists the difference. A projector that silently starts anew is the mistake this module exists to prevent.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from llava_ft.checkpoint.directory import ModelDirectory, identify
from llava_ft.checkpoint.manifest import check_pairing, read_manifest
from llava_ft.checkpoint.names import (
    ADAPTER_ALL_BIN,
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    ADAPTER_SAFETENSORS,
    EMBEDDINGS,
    HEAD,
    MANIFEST,
    NEW_ROWS_SUFFIX,
    NON_LORA_BIN,
    TRAINER_STATE,
    is_derived,
    is_projector,
    is_transformers_spelling,
    native_name,
)
from llava_ft.checkpoint.overrides import Force, refuse_unless
from llava_ft.checkpoint.weights import WeightFiles, read_json
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import is_llava_config


def trained_files(directory: ModelDirectory, *, force: Force = False) -> list[WeightFiles]:
    """Return the weight files of a directory that a run wrote.

    Args:
        directory: The directory.
        force: Whether files that were not written together are used as they are, and an adapter without its projector.

    Returns:
        For an adapter its file, which may hold more than LoRA matrices, and `non_lora_trainables` if there is one.

    Raises:
        CheckpointError: One that belongs there is missing or damaged.
    """
    check_pairing(directory.path, force=force)
    if directory.kind == "lora":
        return _adapter_files(directory, force)
    if directory.kind == "projector":
        assert directory.projector_file is not None
        return [WeightFiles.open(directory.projector_file)]
    return [WeightFiles.open(directory.path)]


_SCALE_SETTINGS = frozenset({"lora_alpha", "use_rslora"})
"""Settings of an adapter that say how much its matrices weigh; with others their shapes or meaning differ."""

PutValue = Callable[[str, nn.Parameter, torch.Tensor], None]
"""Gives a parameter its value: plain name, parameter, whole value."""


def put_value(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Copy a value into a parameter that is whole."""
    with torch.no_grad():
        parameter.copy_(value)


def _is_needed(name: str) -> bool:
    return True


def restore_trained(
    model: nn.Module,
    path: Path,
    *,
    as_start: bool = False,
    put: PutValue = put_value,
    force: Force = False,
    is_needed: Callable[[str], bool] = _is_needed,
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
    _check_lora_config(model, directory, force)
    is_whole = directory.kind not in ("lora", "projector")
    may_be_frozen = {plain_name(name) for name, _ in model.named_parameters()} if is_whole or as_start else set[str]()
    restored: set[str] = set()
    unexpected: list[str] = []
    for files in trained_files(directory, force=force):
        names = _target_names(files, trainable, directory.kind)
        unexpected += [key for key, name in names.items() if name not in trainable and name not in may_be_frozen]
        wanted = {key: name for key, name in names.items() if name in trainable}
        _check_shapes(files, wanted, trainable)
        for key, tensor in files.stream(wanted):
            put(wanted[key], trainable[wanted[key]], tensor)
            restored.add(wanted[key])
    missing = [name for name in trainable if name not in restored]
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit this run. "
            + (f"Trained here but not in it: {_some(missing)}. " if missing else "")
            + (f"In it but not trained here: {_some(unexpected)}. " if unexpected else "")
            + "Was it made with another model, another adapter or other flags for what is trained?"
        )


def plain_name(name: str) -> str:
    """Return a parameter's native name without the adapter's name: the name it has in every kind of file."""
    return native_name(name).replace(".default.", ".").replace(".base_layer.", ".")


def check_base(path: Path, fingerprint: str, base: str, *, force: Force = False) -> str | None:
    """Check that trained weights are put on the language model they were trained on.

    Args:
        path: Directory of the trained weights.
        fingerprint: Fingerprint of the language model at hand.
        base: Its path, for messages.
        force: Whether another base is used all the same.

    Returns:
        What is wrong and was passed over, which has been logged; None if nothing is.

    Raises:
        CheckpointError: They do not fit.
    """
    manifest = read_manifest(path)
    if manifest is None or not manifest.base_fingerprint or manifest.base_fingerprint == fingerprint:
        return None
    problem = (
        f"{path} was trained on {manifest.base} ({manifest.base_fingerprint}), but the model given is {base} "
        f"({fingerprint}), whose weights differ."
    )
    advice = "Give the original base model, or pass --allow_base_mismatch true or --force if you know that it fits."
    return refuse_unless(force is not False, problem, advice)


def _target_names(files: WeightFiles, trainable: Mapping[str, nn.Parameter], kind: str) -> dict[str, str]:
    """Give each tensor of a file the name it has in the model, leaving out whole matrices kept for other programs."""
    names: dict[str, str] = {}
    for key in files.tensors:
        name = plain_name(key)
        if is_derived(name):
            continue
        rows_name = name.removesuffix(".weight") + NEW_ROWS_SUFFIX
        if name in (EMBEDDINGS, HEAD) and rows_name in trainable:
            if kind == "projector":
                names[key] = rows_name
            continue
        names[key] = name
    return names


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter, also where DeepSpeed's ZeRO-3 has divided it and left an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_shapes(files: WeightFiles, wanted: Mapping[str, str], trainable: Mapping[str, nn.Parameter]) -> None:
    wrong = [
        f"{name} is {tuple(files.tensors[key].shape)} in the file and {whole_shape(trainable[name])} here"
        for key, name in wanted.items()
        if tuple(files.tensors[key].shape) != whole_shape(trainable[name])
    ]
    if wrong:
        raise CheckpointError(
            f"{files.path} does not fit this run: {_some(wrong, 2)}. Was it made with another rank or another model?"
        )


def _check_lora_config(model: nn.Module, directory: ModelDirectory, force: Force) -> None:
    peft_config = getattr(model, "peft_config", None)
    if peft_config is None:
        if directory.kind == "lora":
            raise CheckpointError(f"{directory.path} holds a LoRA adapter, but this run trains no LoRA.")
        return
    if directory.kind != "lora":
        raise CheckpointError(f"{directory.path} holds no LoRA adapter, but this run trains one (lora_enable).")
    on_disk = read_json(directory.path / ADAPTER_CONFIG)
    here = peft_config["default"]
    different = {
        key: f"{key} is {on_disk.get(key)} in it and {getattr(here, key)} here"
        for key in ("r", "use_dora", *_SCALE_SETTINGS)
        if key in on_disk and on_disk[key] != getattr(here, key)
    }
    if not different:
        return
    problem = f"The adapter in {directory.path} was made with other settings: {', '.join(different.values())}."
    is_scale_alone = set(different) <= _SCALE_SETTINGS
    advice = "Use the same" + (", or pass --force to scale its matrices anew." if is_scale_alone else ".")
    refuse_unless(force is True and is_scale_alone, problem, advice)


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
