"""What was trained, put together with the base it belongs to: the reading counterpart of `save.py`."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llava_ft.checkpoint.adapter import LoraAdapter
from llava_ft.checkpoint.blend import Adapters, beside_source, blended_rows, check_adapters, check_directories
from llava_ft.checkpoint.directory import ModelDirectory, base_of_adapter
from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.manifest import read_manifest
from llava_ft.checkpoint.model import ModelSpec, find_model
from llava_ft.checkpoint.names import IMAGE_NEWLINE
from llava_ft.checkpoint.overrides import Force, refuse_unless
from llava_ft.checkpoint.quantized import note_on_quantized, refuse_quantized
from llava_ft.checkpoint.restore import check_base
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import checkpoint_wishes

logger = logging.getLogger(__name__)

BESIDE = "what was trained beside the adapter"
"""Label of the source with the whole tensors that were trained with an adapter."""


def open_base_and_adapters(
    shares: Sequence[tuple[float, ModelDirectory]],
    model_base: str | None,
    *,
    vision_tower: str | None = None,
    force: Force = False,
) -> ModelSpec:
    """Open a model: a whole one, or what was trained with the base that it belongs to.

    Args:
        shares: One directory, or several adapters; and the weight of each.
        model_base: The base; when absent, the one that the adapters name.
        vision_tower: The vision tower, if it is not where the model says.
        force: What is passed over, such as a base other than the one that an adapter was trained on.

    Raises:
        UserError: Something is missing, damaged, or does not fit.
    """
    directories = tuple(directory for _, directory in shares)
    first, notes = directories[0], list[str]()
    adapters: Adapters = []
    if len(shares) > 1 or shares[0][0] != 1.0 or first.kind == "lora":
        described = check_directories(directories)
        name = model_base or _common_base(directories, force)
        adapters = [(share, LoraAdapter.read(directory, force=force)) for share, directory in shares]
        check_adapters(adapters)
        named = [directory.config.get("conversation_template") for directory in directories]
        templates = dict.fromkeys(str(template) for template in named if template)
        if len(templates) > 1:
            notes.append(f"trained with the conversation templates {', '.join(templates)}; the first is written")
        if len(adapters) == 1:
            lora = adapters[0][1]
            files_and_names = zip(lora.beside, lora.replaced, strict=True)
            beside = [WeightSource(BESIDE, files, names, must_fit=True) for files, names in files_and_names if names]
        else:
            alone = _base_of(described, name, vision_tower, is_whole=False)
            blended = beside_source(adapters, alone.sources[0], BESIDE, notes)
            beside = [blended] if blended is not None else []
        base = _base_of(described, name, vision_tower, extra_sources=beside)
    elif first.kind in ("llava", "language model"):
        if model_base is not None:
            logger.warning("%s is a whole model; the base %s is not used.", first.path, model_base)
        base = find_model(str(first.path), vision_tower=vision_tower)
    elif first.kind == "projector":
        if model_base is None:
            raise CheckpointError(f"{first.path} holds a projector alone. Give its language model with --model-base.")
        base = _base_of(first, model_base, vision_tower, projector_file=str(first.projector_file))
    else:
        raise CheckpointError(f"{first.path} holds a {first.kind}, which cannot answer by itself.")
    for directory in directories:
        if directory.kind in ("lora", "projector"):
            check_base(directory.path, base.fingerprint, str(base.directory.path), force=force)
            notes += note_on_quantized(directory, base.directory)
    rows = blended_rows(adapters, notes)
    model = replace(base, given=directories, adapters=tuple(adapters), rows=rows, notes=(*base.notes, *notes))
    _ = model.tokenizer  # refuses different vocabularies
    return model


def _base_of(
    directory: ModelDirectory, name: str, vision_tower: str | None, *, is_whole: bool = True, **more: Any
) -> ModelSpec:
    """Find a base as something trained on it wants it."""
    wishes = checkpoint_wishes(directory.config)
    refuse_quantized(name, directory)
    tower = vision_tower or directory.config.get("mm_vision_tower")
    base = find_model(name, vision_tower=tower, wishes=wishes, **more)
    # A projector or `image_newline` that is nowhere would start from random values and give wrong answers.
    if is_whole and base.projector_is_new:
        raise CheckpointError(
            f"{directory.path} asks for the vision tower {base.config.mm_vision_tower}, but neither its files nor "
            f"{base.directory.path} hold a projector, so every image would be noise. Give the LLaVA model that it was "
            "trained on with --model-base, or put the run's non_lora_trainables.bin beside it."
        )
    if is_whole and base.newline_is_new:
        raise CheckpointError(
            f"The configuration of {directory.path} says mm_patch_merge_type={base.config.mm_patch_merge_type}, which "
            f"needs {IMAGE_NEWLINE}, but neither its files nor {base.directory.path} hold it. Use the directory of a "
            "run that saved it; original LLaVA leaves it out of mm_projector.bin."
        )
    template = directory.config.get("conversation_template")
    base.config.conversation_template = template or base.config.conversation_template
    return base


def _common_base(directories: Sequence[ModelDirectory], force: Force) -> str:
    """Return the base that adapters name; the same weights under two paths are found by their fingerprint."""
    names: list[str] = []
    for path in (directory.path for directory in directories):
        name = base_of_adapter(path)
        if not name:
            raise CheckpointError(f"The adapter {path} does not name its base model. Give it with --model-base.")
        names.append(name)
    manifests = [read_manifest(directory.path) for directory in directories]
    fingerprints = {manifest.base_fingerprint if manifest is not None else "" for manifest in manifests}
    if len(set(names)) > 1 and (len(fingerprints) > 1 or fingerprints == {""}):
        refuse_unless(
            force is not False,
            f"{directories[0].path} was trained on {names[0]} and "
            f"{next(d.path for d, name in zip(directories, names, strict=True) if name != names[0])} on "
            f"{next(name for name in names if name != names[0])}.",
            "Only adapters of the same base can be put together; if both paths hold the same model, give it with "
            "--model-base.",
        )
    return names[0]
