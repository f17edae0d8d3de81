"""A model in original LLaVA's layout, from transformers' own or from a native one and what was trained on it.

The names are the native ones, the vision tower is inside, and the vocabulary is without the rows that transformers'
layout adds. A model that was exported from the native layout comes back as it was, file by file, if nothing has
changed: `native_record.py` says how.
"""

import copy
import shutil
from pathlib import Path
from typing import Final, cast

import torch

from llava_ft.checkpoint.full_model import FullModel, ModelTensor
from llava_ft.checkpoint.names import (
    CONFIG,
    EMBEDDINGS,
    GENERATION_CONFIG,
    HEAD,
    PREPROCESSOR_CONFIG,
    native_name,
)
from llava_ft.checkpoint.save import ShardWriter, check_space, config_fields, layout_bytes, save_tensors, write_json
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.native_record import (
    NATIVE_FOLDER,
    WeightRecord,
    config_digest,
    copy_files,
    num_native_rows,
    read_weight_record,
    tensors_digest,
    write_native_tokenizer,
)
from llava_ft.convert.proof import ConversionReport, prove_tensors
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.errors import CheckpointError
from llava_ft.json_files import read_json
from llava_ft.models.parts import module_part

_VOCABULARY: Final = (EMBEDDINGS, HEAD)


def export_llava(
    whole: FullModel, target: Path, report: ConversionReport, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    """Write a model in original LLaVA's layout into an empty directory, and prove its tensors.

    Weights get the type `dtype`, or keep the base's when it is None.

    Raises:
        UserError: There is nothing to convert.
        RunError: What is on disk afterwards is not what was to be written.
    """
    if whole.config.image_geometry is None:
        raise CheckpointError(f"{whole.directory.path} is a text-only model. Give it a tower with --vision-tower.")
    source = whole.base.directory.path
    record = read_weight_record(source) if whole.base.directory.layout == "hf" else None
    num_rows = _num_rows(whole, record, report)
    leaves_tower_out = record is not None and record.tower is not None and _tower_is_as_exported(whole, record)
    layout = {
        name: ((min(shape[0], num_rows), *shape[1:]) if name in _VOCABULARY else shape, on_disk)
        for name, (shape, on_disk) in whole.layout(dtype, with_tower=True).items()
        if not (leaves_tower_out and module_part(name) == "vision tower")
    }
    check_space(target, layout_bytes(layout))
    if (
        record is not None
        and dtype is None
        and num_rows == record.num_rows
        and _fits_files(whole, record, set(layout), max_shard_bytes)
    ):
        _write_recorded_files(whole, target, record, report)
    else:
        writer = ShardWriter(target, layout, max_shard_bytes=max_shard_bytes)
        for piece in whole.stream(dtype, with_tower=True):
            if piece.name in layout:
                report.count(piece)
                writer.add(piece.name, _cut(piece, num_rows))
        writer.finish()
    tokenizer = write_native_tokenizer(whole.tokenizer, num_rows, target, source)
    pad_token_id = cast("int | None", tokenizer.pad_token_id)

    is_unchanged = whole.directory.kind == "llava" and dtype is None
    is_unchanged &= record is not None and record.config == config_digest(source)
    if not (is_unchanged and copy_files(source / NATIVE_FOLDER, target, [CONFIG])):
        config = copy.deepcopy(whole.config)
        config.vocab_size = num_rows
        if config.pad_token_id is not None and config.pad_token_id >= num_rows:
            config.pad_token_id = pad_token_id
        fields = config_fields(config, dtype or whole.dtype)
        if not leaves_tower_out:
            fields["unfreeze_mm_vision_tower"] = True  # original LLaVA reads the tower's weights only with it
        write_json(target / CONFIG, dict(sorted(fields.items())))
    if not copy_files(source / NATIVE_FOLDER, target, [GENERATION_CONFIG]) and (source / GENERATION_CONFIG).is_file():
        settings = read_json(source / GENERATION_CONFIG)
        if isinstance(settings.get("pad_token_id"), int) and settings["pad_token_id"] >= num_rows:
            settings["pad_token_id"] = pad_token_id
        write_json(target / GENERATION_CONFIG, settings)
    is_kept = copy_files(source / NATIVE_FOLDER, target, [PREPROCESSOR_CONFIG])
    if not is_kept and not leaves_tower_out and whole.base.vision_directory is not None:
        images = ImageProcessorSettings.from_pretrained(whole.base.vision_directory)
        write_json(target / PREPROCESSOR_CONFIG, images.to_dict())

    if leaves_tower_out:
        report.notes.append(
            f"the vision tower is left out, as before the export it came from: its values are those of "
            f"{whole.config.mm_vision_tower}"
        )
    if whole.config.mm_vision_tower is None:
        report.notes.append(
            "mm_vision_tower is null: nothing says which CLIP the tower was. This program needs no name, original "
            "LLaVA does: write it into config.json"
        )
    written = ((native_name(key), tensor) for key, tensor in WeightFiles.open(target).stream(may_be_nan=True))
    prove_tensors(report, whole, written, layout, num_rows=num_rows)


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
    base = whole.base.sources[0]
    vision = {key: name for key, name in base.names.items() if module_part(name) == "vision tower"}
    if not vision or any(whole.origin(name) != "frozen" for name in vision.values()):
        return False
    return tensors_digest((vision[key], value) for key, value in base.files.stream(vision)) == record.tower


def _cut(piece: ModelTensor, num_rows: int) -> torch.Tensor:
    """Return a value without the rows of the vocabulary that are left out."""
    is_longer = piece.name in _VOCABULARY and len(piece.value) > num_rows
    return piece.value[:num_rows].clone() if is_longer else piece.value


def _fits_files(whole: FullModel, record: WeightRecord, names: set[str], max_shard_bytes: int) -> bool:
    """Whether the same tensors, in the same types, can be put into the same files."""
    source = whole.base.sources[0]
    infos = {name: source.files.tensors[key] for key, name in source.names.items()}
    recorded = {native_name(key): dtype for keys in record.files.values() for key, dtype in keys.items()}
    if whole.directory.kind != "llava" or set(recorded) != names:
        return False
    if any(str(infos[name].dtype) != f"torch.{dtype}" for name, dtype in recorded.items()):
        return False
    sizes = (sum(infos[native_name(key)].num_bytes for key in keys) for keys in record.files.values() if len(keys) > 1)
    return max(sizes, default=0) <= max_shard_bytes


def _write_recorded_files(whole: FullModel, target: Path, record: WeightRecord, report: ConversionReport) -> None:
    """Write the weight files that the model was exported from, each with its tensors in their order."""
    for file, keys in record.files.items():
        tensors: dict[str, torch.Tensor] = {}
        for key in keys:
            piece = whole.tensor(native_name(key))
            report.count(piece)
            tensors[key] = _cut(piece, record.num_rows)
        save_tensors(tensors, target / file)
    for index in (whole.base.directory.path / NATIVE_FOLDER).glob("*.index.json"):
        shutil.copyfile(index, target / index.name)
    report.notes.append("the weight files are those that the model was exported from: same names, order and types")
