"""A model in original LLaVA's layout, from transformers' own or from a native one and what was trained on it.

The names are the native ones, the vision tower is inside, and the vocabulary is without the rows that transformers'
layout adds. A model that was exported from the native layout comes back as it was, file by file, if nothing has
changed: `native_record.py` says how.
"""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import torch

from llava_ft.checkpoint.full_model import FullModel, ModelTensor
from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.names import CONFIG, EMBEDDINGS, HEAD, PREPROCESSOR_CONFIG, is_vision, native_name
from llava_ft.checkpoint.save import config_fields, save_tensors, write_json
from llava_ft.checkpoint.shard_files import ShardFiles, check_space, layout_bytes
from llava_ft.checkpoint.weights import read_json
from llava_ft.convert.completed import CompletedFiles
from llava_ft.convert.export_hf import GENERATION_CONFIG
from llava_ft.convert.native_record import (
    NATIVE_FOLDER,
    TensorDigest,
    WeightRecord,
    config_is_as_exported,
    copy_native_files,
    read_weight_record,
)
from llava_ft.convert.native_tokenizer import num_native_rows, write_native_tokenizer
from llava_ft.convert.options import ExportOptions
from llava_ft.convert.proof import ConversionReport, prove_tensors
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.errors import CheckpointError

_VOCABULARY: Final = (EMBEDDINGS, HEAD)


def export_llava(whole: FullModel, target: Path, options: ExportOptions) -> ConversionReport:
    """Write a model in original LLaVA's layout.

    Args:
        whole: The model.
        target: An empty directory.
        options: How it is written.

    Returns:
        The report, without logits and answers.

    Raises:
        UserError: There is nothing to convert.
        RunError: What is on disk afterwards is not what was to be written.
    """
    if whole.config.image_geometry is None:
        raise CheckpointError(f"{whole.directory.path} is a text-only model. Give it a tower with --vision-tower.")
    report = ConversionReport("export llava", str(whole.directory.path), str(target))
    source = whole.base.directory.path
    record = read_weight_record(source) if whole.base.directory.layout == "hf" else None
    num_rows = _num_rows(whole, record, report)
    without_tower = record is not None and not record.has_tower and _tower_is_as_exported(whole, record)
    names = [name for name in whole.names(with_tower=True) if not (without_tower and is_vision(name))]
    _write_weights(whole, target, options, _Wanted(set(names), num_rows, record), report)
    tokenizer = write_native_tokenizer(whole.tokenizer, num_rows, target, source)
    _write_configs(whole, target, options, (num_rows, cast("int | None", tokenizer.pad_token_id), not without_tower))
    if without_tower:
        report.notes.append(
            f"the vision tower is left out, as before the export it came from: its values are those of "
            f"{whole.config.mm_vision_tower}"
        )
    if whole.config.mm_vision_tower is None:
        report.notes.append(
            "mm_vision_tower is null: nothing says which CLIP the tower was. This program needs no name, original "
            "LLaVA does: write it into config.json"
        )
    prove_tensors(report, whole, CompletedFiles(target, whole), with_tower=True)
    return report


def _num_rows(whole: FullModel, record: WeightRecord | None, report: ConversionReport) -> int:
    """Count the rows to be written, and say which are not."""
    num_rows = whole.config.vocab_size
    if whole.base.directory.layout != "hf":
        return num_rows
    kept = num_native_rows(whole.tokenizer, num_rows, record.num_rows if record is not None else 0)
    if kept == num_rows:
        return num_rows
    trained = [name for name in _VOCABULARY if name in whole.shapes and whole.origin(name) != "frozen"]
    if trained:
        report.notes.append(
            f"{num_rows - kept} rows at the end of the vocabulary (<image>, <pad>, padding) are kept: {trained[0]} was "
            "trained"
        )
        return num_rows
    report.notes.append(f"{num_rows - kept} rows at the end of the vocabulary (<image>, <pad>, padding) are left out")
    return kept


def _tower_is_as_exported(whole: FullModel, record: WeightRecord) -> bool:
    """Whether the tower has the values that it had when it was put in by the export."""
    digest = TensorDigest()
    base = whole.base.sources[0]
    vision = {key: name for key, name in base.names.items() if is_vision(name)}
    if not vision or any(whole.origin(name) != "frozen" for name in vision.values()):
        return False
    for key, value in base.files.stream(vision):
        digest.add(vision[key], value)
    return digest.hexdigest() == record.tower


class _Wanted:
    """What is to be written.

    Attributes:
        names: Native names.
        num_rows: Rows of the vocabulary.
        record: The files that it came from, if they are known.
    """

    def __init__(self, names: set[str], num_rows: int, record: WeightRecord | None):
        self.names = names
        self.num_rows = num_rows
        self.record = record

    def cut(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a value without the rows that are left out."""
        return value[: self.num_rows].clone() if name in _VOCABULARY and len(value) > self.num_rows else value


def _write_weights(
    whole: FullModel, target: Path, options: ExportOptions, wanted: _Wanted, report: ConversionReport
) -> None:
    layout = {
        name: ((min(shape[0], wanted.num_rows), *shape[1:]) if name in _VOCABULARY else shape, dtype)
        for name, (shape, dtype) in whole.layout(options.dtype, with_tower=True).items()
        if name in wanted.names
    }
    check_space(target, layout_bytes(layout))
    if wanted.record is not None and _is_as_recorded(whole, options, wanted, wanted.record):
        source = whole.base.sources[0]
        for file, keys in wanted.record.files.items():
            pieces = list(_read_in_order(source, keys))
            for piece in pieces:
                report.count(piece)
            tensors = {key: wanted.cut(piece.name, piece.value) for key, piece in zip(keys, pieces, strict=True)}
            save_tensors(tensors, target / file)
        folder = whole.base.directory.path / NATIVE_FOLDER
        for index in folder.glob("*.index.json"):
            shutil.copyfile(index, target / index.name)
        report.notes.append("the weight files are those that the model was exported from: same names, order and types")
        return
    writer = ShardFiles(target, layout, max_shard_bytes=options.max_shard_bytes)
    for piece in whole.stream(options.dtype, with_tower=True):
        if piece.name in wanted.names:
            report.count(piece)
            writer.add(piece.name, wanted.cut(piece.name, piece.value))
    writer.finish()


def _is_as_recorded(whole: FullModel, options: ExportOptions, wanted: _Wanted, record: WeightRecord) -> bool:
    """Whether the same tensors, in the same types, can be put into the same files."""
    if whole.directory.kind != "llava" or options.dtype is not None or wanted.num_rows != record.num_rows:
        return False
    source = whole.base.sources[0]
    infos = {name: source.files.tensors[key] for key, name in source.names.items()}
    recorded = {native_name(key): dtype for keys in record.files.values() for key, dtype in keys.items()}
    if set(recorded) != wanted.names:
        return False
    if any(str(infos[name].dtype) != f"torch.{dtype}" for name, dtype in recorded.items()):
        return False
    sizes = (sum(infos[native_name(key)].num_bytes for key in keys) for keys in record.files.values() if len(keys) > 1)
    return max(sizes, default=0) <= options.max_shard_bytes


def _read_in_order(source: WeightSource, keys: dict[str, str]) -> Iterator[ModelTensor]:
    by_name = {name: key for key, name in source.names.items()}
    for key in keys:
        name = native_name(key)
        value = source.files.read([by_name[name]])[by_name[name]]
        yield ModelTensor(name, value, "frozen", f"{source.label} {source.files.path}")


def _write_configs(
    whole: FullModel, target: Path, options: ExportOptions, vocabulary: tuple[int, int | None, bool]
) -> None:
    """Write configuration, generation settings and image settings.

    Args:
        whole: The model.
        target: Where to.
        options: The type of the weights.
        vocabulary: Rows of the vocabulary, id of the padding token, and whether the tower is inside.
    """
    source = whole.base.directory.path
    num_rows, pad_token_id, has_tower = vocabulary
    is_unchanged = whole.directory.kind == "llava" and whole.base.directory.layout == "hf" and options.dtype is None
    if not (is_unchanged and config_is_as_exported(source) and copy_native_files(source, target, [CONFIG])):
        config = copy.deepcopy(whole.config)
        config.vocab_size = num_rows
        if config.pad_token_id is not None and config.pad_token_id >= num_rows:
            config.pad_token_id = pad_token_id
        fields = config_fields(config, options.dtype or whole.dtype)
        if has_tower:
            fields["unfreeze_mm_vision_tower"] = True  # original LLaVA reads the tower's weights only with it
        write_json(target / CONFIG, dict(sorted(fields.items())))
    if not copy_native_files(source, target, [GENERATION_CONFIG]) and (source / GENERATION_CONFIG).is_file():
        settings = read_json(source / GENERATION_CONFIG)
        if isinstance(settings.get("pad_token_id"), int) and settings["pad_token_id"] >= num_rows:
            settings["pad_token_id"] = pad_token_id
        write_json(target / GENERATION_CONFIG, settings)
    is_kept = copy_native_files(source, target, [PREPROCESSOR_CONFIG])
    if not is_kept and has_tower and whole.base.vision_directory is not None:
        images = ImageProcessorSettings.from_pretrained(whole.base.vision_directory)
        write_json(target / PREPROCESSOR_CONFIG, images.to_dict())
