"""A model in transformers' own layout: `LlavaForConditionalGeneration`, or `LlavaNextForConditionalGeneration`.

The tensors are written under the names of llava-hf's checkpoints on the hub, which every version of transformers reads,
and vLLM and SGLang too. One thing is added: a row for `<image>`, the mean of the others, at the end of the vocabulary;
there is no row where the tokenizer has fewer entries than the matrices. Everything else is as it was, to the bit.
"""

import copy
from pathlib import Path
from typing import Any, Final, cast

import torch

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.hf.config import hf_fields
from llava_ft.checkpoint.hf.names import hub_name
from llava_ft.checkpoint.load import fit_rows
from llava_ft.checkpoint.names import CONFIG, EMBEDDINGS, GENERATION_CONFIG, HEAD, is_vision
from llava_ft.checkpoint.save import write_json
from llava_ft.checkpoint.shard_files import Layout, ShardFiles, check_space, layout_bytes
from llava_ft.checkpoint.weights import WeightFiles, read_json
from llava_ft.convert.hf_processor import check_images, write_processor
from llava_ft.convert.hf_tokenizer import image_token_id, write_hf_tokenizer
from llava_ft.convert.native_record import TensorDigest, write_native_record
from llava_ft.convert.options import ExportOptions
from llava_ft.convert.proof import ConversionReport, prove_tensors
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.data.images import ImageTransform
from llava_ft.geometry import ImageGeometry
from llava_ft.models.config import LlavaLlamaConfig

DEFAULT_TEMPLATE: Final = "v1"
"""Conversation template of a model that does not say which it was trained with."""


def export_hf(whole: FullModel, target: Path, options: ExportOptions, report: ConversionReport) -> None:
    """Write a model in transformers' layout.

    Args:
        whole: The model.
        target: An empty directory.
        options: How it is written.
        report: Gets what is written and the proof of it, without logits and answers.

    Raises:
        UserError: The layout cannot hold the model, or the disk has no room for it.
        RunError: What is on disk afterwards is not what was to be written.
    """
    hf_config(whole, options.dtype or whole.dtype)  # what the layout cannot hold is refused before weights are read
    check_images(*image_settings(whole))
    num_rows = _num_rows(whole)
    tower = TensorDigest() if not whole.base.holds_vision_tower else None
    layout: Layout = {
        hub_name(name): ((num_rows, *shape[1:]) if name in (EMBEDDINGS, HEAD) else shape, dtype)
        for name, (shape, dtype) in whole.layout(options.dtype, with_tower=True).items()
    }
    check_space(target, layout_bytes(layout))
    writer = ShardFiles(target, layout, max_shard_bytes=options.max_shard_bytes)
    for piece in whole.stream(options.dtype, with_tower=True):
        value = piece.value
        if piece.name in (EMBEDDINGS, HEAD):
            value = fit_rows(value, (num_rows, *value.shape[1:]))
        if tower is not None and is_vision(piece.name):
            tower.add(piece.name, value)
        report.count(piece)
        writer.add(hub_name(piece.name), value)
    writer.finish()
    report.notes += write_hf_files(whole, target, options)
    write_native_record(target, whole, tower)
    prove_tensors(report, whole, WeightFiles.open(target), with_tower=True, key_of=hub_name)


def write_hf_files(whole: FullModel, target: Path, options: ExportOptions) -> list[str]:
    """Write everything that a model of transformers' layout has beside its weights.

    Args:
        whole: The model.
        target: Where to.
        options: The type of the weights.

    Returns:
        What a reader of the report should know.
    """
    write_json(target / CONFIG, hf_config(whole, options.dtype or whole.dtype))
    # The source's, or the ids of the special tokens, as the language model's configuration has them.
    file, config = whole.base.directory.path / GENERATION_CONFIG, cast("Any", whole.config)
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = read_json(file) if file.is_file() else {}
    write_json(target / GENERATION_CONFIG, {key: value for key, value in ids.items() if value is not None} | known)
    image_id = write_hf_tokenizer(whole.tokenizer, target)
    assert image_id == image_token_id(whole.tokenizer)
    settings, _ = image_settings(whole)
    template = whole.config.conversation_template or DEFAULT_TEMPLATE
    added = "a row for it was added, the mean of the others"
    is_added = _num_rows(whole) > whole.config.vocab_size
    assumed = (
        [] if whole.config.conversation_template else [f"the configuration names no template; {template} is taken"]
    )
    return [
        *assumed,
        *write_processor(target, whole.config, settings, whole.tokenizer, template),
        f"<image> is token {image_id}; {added if is_added else 'it has a row'}",
    ]


def image_settings(whole: FullModel) -> tuple[ImageProcessorSettings, ImageGeometry]:
    """Return how a model's images are prepared.

    Raises:
        UserError: The settings do not belong to the model's tower.
    """
    geometry, directory = whole.config.image_geometry, whole.base.vision_directory
    assert geometry is not None
    assert directory is not None
    ImageTransform.from_pretrained(directory, geometry=geometry)  # refuses what does not fit
    return ImageProcessorSettings.from_pretrained(directory), geometry


def _num_rows(whole: FullModel) -> int:
    """Rows of embeddings and head with the one of `<image>`."""
    return max(whole.config.vocab_size, image_token_id(whole.tokenizer) + 1)


def hf_config(whole: FullModel, dtype: torch.dtype) -> dict[str, Any]:
    """Return the `config.json` of a model in transformers' layout, the row of `<image>` counted.

    Raises:
        CheckpointError: The layout cannot hold the model.
    """
    config: LlavaLlamaConfig = copy.deepcopy(whole.config)
    config.vocab_size = _num_rows(whole)
    return hf_fields(config, image_token_id=image_token_id(whole.tokenizer), dtype=dtype)
