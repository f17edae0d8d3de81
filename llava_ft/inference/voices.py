"""Who answers in a chat: one model, a base and its adapter on the same weights, or two models.

Base and adapter share one set of base weights. The adapter lies beside them and is switched off for the base's answers;
what was trained beside it - projector, `image_newline`, embeddings with rows of added tokens, anything else that was
not frozen - is kept twice, and one or the other is put in. Each voice has a memory and a history of its own.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from llava_ft.checkpoint.load import WeightSource, fit_rows
from llava_ft.checkpoint.model import ModelSpec, find_model
from llava_ft.checkpoint.names import EMBEDDINGS, HEAD
from llava_ft.conversation import Template, get_template
from llava_ft.data.images import ImageTransform
from llava_ft.errors import UserError
from llava_ft.inference.load import LoadedModel
from llava_ft.inference.responder import Responder
from llava_ft.models.builder import is_llava_config

logger = logging.getLogger(__name__)

_WITH_ROWS = (EMBEDDINGS, HEAD)


@dataclass(frozen=True)
class Voice:
    """One of those who answer."""

    name: str
    responder: Responder
    template: Template
    mm_use_im_start_end: bool  # whether `<im_start>` and `<im_end>` go around each image
    speaking: Callable[[], AbstractContextManager[None]] = nullcontext  # makes the weights its own while it answers


def single_voice(loaded: LoadedModel, name: str, template: Template | None) -> Voice:
    """Return the voice of a model; `template` stands in for the one it was trained with."""
    wraps = bool(loaded.model.config.mm_use_im_start_end)
    return Voice(name, Responder(loaded), template or get_template(loaded.template), wraps)


def base_and_trained(loaded: LoadedModel, template: Template | None) -> list[Voice]:
    """Return the voices of a base model and of the adapter or projector trained on it; see above.

    A `template` is for both; when absent each has the one it was trained with.

    Raises:
        UserError: Nothing was trained on another model, or the base has no projector of its own to compare with.
    """
    is_adapter = isinstance(loaded.model, PeftModel)
    own = find_model(str(loaded.base.directory.path), vision_tower=loaded.base.config.mm_vision_tower)
    ours, theirs = _origins(loaded.base), _origins(own)
    trained = [
        name
        for name, (source, _) in ours.items()
        if name not in theirs or theirs[name][0].files.path.resolve() != source.files.path.resolve()
    ]
    replaced, missing = [name for name in trained if name in theirs], [name for name in trained if name not in theirs]
    if not is_adapter and (missing or not replaced):
        raise UserError(
            f"--compare needs a base and an adapter trained on it. {loaded.base.directory.path} "
            + ("has no projector of its own to compare with." if missing else "is a whole model.")
            + " Give a second model with --compare-with."
        )
    if missing:
        logger.warning(
            "The base %s has no %s of its own; it answers with what was trained beside the adapter.",
            own.directory.path,
            "projector" if any("mm_projector" in name for name in missing) else missing[0],
        )
    values = _own_values(loaded.plain_model, replaced, own)
    parameters = dict(loaded.plain_model.named_parameters())
    trained_values = {name: parameters[name].data for name in values}

    def put(tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            parameters[name].data = tensor

    @contextmanager
    def as_base() -> Generator[None]:
        with loaded.model.disable_adapter() if isinstance(loaded.model, PeftModel) else nullcontext():
            try:
                put(values)
                yield
            finally:
                put(trained_values)

    @contextmanager
    def as_trained() -> Generator[None]:
        # Ctrl-C may have come while the base's values were taken out.
        put(trained_values)
        if isinstance(loaded.model, PeftModel):
            cast("Any", loaded.model.base_model).enable_adapter_layers()
        yield

    own_template = own.directory.config.get("conversation_template")
    base_template = template or (get_template(own_template) if own_template else get_template(loaded.template))
    wraps = bool(own.config.mm_use_im_start_end)
    return [
        Voice("base", Responder(_with_own_images(loaded, own)), base_template, wraps, as_base),
        replace(single_voice(loaded, "adapter" if is_adapter else "projector", template), speaking=as_trained),
    ]


def _origins(base: ModelSpec) -> dict[str, tuple[WeightSource, str]]:
    """Return where each weight is read from, by its name in the model."""
    return {name: (source, key) for source in base.sources for key, name in source.names.items()}


def _own_values(model: nn.Module, replaced: Sequence[str], own: ModelSpec) -> dict[str, torch.Tensor]:
    """Read the base's own values of what was trained, rows of added tokens too, and keep those that differ."""
    parameters, theirs = dict(model.named_parameters()), _origins(own)
    values: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys([*replaced, *_WITH_ROWS]):
        if name not in parameters or name not in theirs:
            continue
        parameter, (source, key) = parameters[name], theirs[name]
        shape = tuple(parameter.shape)
        for _, tensor in source.files.stream([key]):
            if tensor.shape[1:] != shape[1:] or (tensor.shape != shape and name not in _WITH_ROWS):
                raise UserError(
                    f"{name} has the shape {tuple(tensor.shape)} in {own.directory.path} and {shape} beside what was "
                    "trained on it, so they cannot share one model. Give the base with --compare-with instead."
                )
            value = fit_rows(tensor.to(device=parameter.device, dtype=parameter.dtype), shape)
            if not torch.equal(value, parameter.data):
                values[name] = value.clone()  # what a stream gives is only valid until the next one
    return values


def _with_own_images(loaded: LoadedModel, own: ModelSpec) -> LoadedModel:
    """Prepare images as the base was trained with, as far as one model can: padded or not is free, tiles are not."""
    if not is_llava_config(own.directory.config):
        return loaded
    ours, theirs = loaded.base.config.image_geometry, own.config.image_geometry
    names = ["mm_vision_select_layer"]
    if ours is not None and theirs is not None and own.vision_directory is not None:
        is_tiled = ours.needs_image_sizes or theirs.needs_image_sizes
        if not is_tiled and replace(ours, aspect_ratio=theirs.aspect_ratio) == theirs:
            transform = ImageTransform.from_pretrained(own.vision_directory, geometry=theirs)
            loaded = replace(loaded, image_transform=transform)
        else:
            names += ["image_aspect_ratio", "mm_patch_merge_type", "mm_vision_select_feature", "s2"]
    different = [
        f"{name} {getattr(loaded.base.config, name)} instead of {getattr(own.config, name)}"
        for name in names
        if getattr(loaded.base.config, name) != getattr(own.config, name)
    ]
    if different:
        logger.warning("The base answers with the image settings of what was trained on it: %s.", ", ".join(different))
    return loaded
