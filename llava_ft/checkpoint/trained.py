"""What was trained, together with the base it belongs to: the reading counterpart of `save.py`."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from llava_ft.checkpoint.adapter import LoraAdapter
from llava_ft.checkpoint.base import BaseModel, find_base
from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.names import ADAPTER_CONFIG, EMBEDDINGS, HEAD, IMAGE_NEWLINE, NEW_ROWS_SUFFIX, RUN_CONFIG
from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.restore import plain_name
from llava_ft.checkpoint.weights import read_json
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import checkpoint_wishes
from llava_ft.tuning.quant import Quantization

logger = logging.getLogger(__name__)

BESIDE = "what was trained beside the adapter"
"""Label of the source with the whole tensors that were trained with an adapter."""


def find_trained(
    directory: ModelDirectory, model_base: str | None, *, vision_tower: str | None = None, force: Force = False
) -> tuple[BaseModel, LoraAdapter | None]:
    """Find the base of a directory and what was trained on it.

    Args:
        directory: A LLaVA model, a LoRA directory or a projector directory.
        model_base: The base; when absent, the one that an adapter names.
        vision_tower: The vision tower, if it is not where the model says.
        force: Whether files that were not written together are used as they are.

    Returns:
        The base, with what was trained beside an adapter among its sources, and the adapter.

    Raises:
        UserError: Something is missing or does not fit.
    """
    if directory.kind in ("llava", "language model"):
        if model_base is not None:
            logger.warning("%s is a whole model; the base %s is not used.", directory.path, model_base)
        return find_base(str(directory.path), vision_tower=vision_tower), None
    wishes = checkpoint_wishes(directory.config)
    tower = vision_tower or directory.config.get("mm_vision_tower")
    if directory.kind == "projector":
        if model_base is None:
            raise CheckpointError(
                f"{directory.path} holds a projector alone. Give its language model with --model-base."
            )
        projector = str(directory.projector_file)
        base = find_base(model_base, vision_tower=tower, projector_file=projector, wishes=wishes)
        _check_newline(directory, base)
        base.config.conversation_template = directory.config.get("conversation_template")
        return base, None
    if directory.kind != "lora":
        raise CheckpointError(f"{directory.path} holds a {directory.kind}, which cannot answer by itself.")
    base_name = model_base or read_json(directory.path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base_name:
        raise CheckpointError(f"The adapter {directory.path} does not name its base model. Give it with --model-base.")
    lora = LoraAdapter.read(directory, force=force)
    beside = [
        WeightSource(BESIDE, files, names, must_fit=True)
        for files, names in zip(lora.beside, lora.replaced, strict=True)
        if names
    ]
    base = find_base(base_name, vision_tower=tower, wishes=wishes, extra_sources=beside)
    _check_newline(directory, base)
    base.config.conversation_template = directory.config.get("conversation_template")
    return base, lora


def quantization_in_training(path: Path) -> Quantization | None:
    """Return how the language model was held while the contents of a directory were trained; None for 16 bits.

    It is read from the resolved configuration that every save holds. A directory without one, as the original writes
    it, says nothing and counts as 16 bits.

    Raises:
        CheckpointError: The configuration is damaged.
    """
    file = path / RUN_CONFIG
    if not file.is_file():
        return None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        settings = cast("dict[str, Any]", content if isinstance(content, dict) else {})
        bits, quant_type = settings.get("bits", 16), settings.get("quant_type", "nf4")
        if bits not in (4, 8, 16) or quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bits is {bits} and quant_type {quant_type}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read as a run's configuration ({error}). Copy it again.") from None
    return Quantization.from_flags(bits, quant_type, bool(settings.get("double_quant", True)))


def new_rows(lora: LoraAdapter | None) -> dict[str, torch.Tensor]:
    """Return the trained rows of added tokens, by the native name of the matrix whose last rows they are."""
    found: dict[str, torch.Tensor] = {}
    for files in lora.beside if lora is not None else ():
        keys = {plain_name(key): key for key in files.tensors}
        for name in (EMBEDDINGS, HEAD):
            key = keys.get(name.removesuffix(".weight") + NEW_ROWS_SUFFIX)
            if key is not None:
                found[name] = files.read([key])[key]
    return found


def _check_newline(directory: ModelDirectory, base: BaseModel) -> None:
    """Refuse a directory whose `image_newline` is nowhere: a random one would give wrong answers."""
    if base.newline_is_new:
        raise CheckpointError(
            f"The configuration of {directory.path} says mm_patch_merge_type={base.config.mm_patch_merge_type}, which "
            f"needs {IMAGE_NEWLINE}, but neither its files nor {base.directory.path} hold it. Use the directory of a "
            "run that saved it; original LLaVA leaves it out of mm_projector.bin."
        )
