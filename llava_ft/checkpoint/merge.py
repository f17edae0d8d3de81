"""Merging an adapter into its base, and proving that nothing else changed.

The result is a whole LLaVA model. It is made on the CPU, tensor by tensor: each weight is read, the adapter's part is
added in float32, and the sum is rounded once; memory holds one output shard and the adapter. Before the result gets
its name it is checked: frozen tensors must be bit-identical to the base's, and the logits on fixed inputs must agree
with those of the adapter beside the base.

What was trained on quantised weights is merged into the base's own, never into quantised ones: the sum would be rounded
to 4 or 8 bits once more. On request it is merged into what the quantised weights are worth, the weights it was trained
on.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerFast

from llava_ft.checkpoint.adapter import LoraAdapter
from llava_ft.checkpoint.base import BaseModel
from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.fingerprint import language_model_fingerprint
from llava_ft.checkpoint.load import Ledger, Plan, fit_rows, plan_sources, stream_planned
from llava_ft.checkpoint.manifest import Manifest
from llava_ft.checkpoint.names import CONFIG, PREPROCESSOR_CONFIG, is_vision
from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.restore import check_base
from llava_ft.checkpoint.save import ShardWriter, config_fields, staged_directory, write_json
from llava_ft.checkpoint.trained import find_trained, new_rows
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.data.tokenizer import load_tokenizer, save_tokenizer
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import build_skeleton
from llava_ft.models.llava import LlavaLlamaForCausalLM
from llava_ft.tuning.freeze import language_model_linears
from llava_ft.tuning.quant import Quantization

logger = logging.getLogger(__name__)

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class MergeOptions:
    """How a merged model is written.

    Attributes:
        dtype: Type of the weights; that of the base's files when absent.
        max_shard_bytes: Size of a shard in bytes.
        weights_format: Kind of files.
        save_vision_tower: Whether the tower is written although the base does not hold it.
        force: What is passed over, such as a base other than the one the adapter was trained on.
        quantization: Merge into the values that the base's linear layers have after being quantised like this; into
            the base's own when absent.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    weights_format: Literal["bin", "safetensors"] = "safetensors"
    save_vision_tower: bool = False
    force: Force = False
    quantization: Quantization | None = None


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        changed: Number of tensors that the adapter, or quantisation, changed.
        replaced: Number of tensors trained beside the adapter.
        frozen: Number of tensors taken from the base, bit for bit when the dtype is the base's.
        converted: Whether the frozen tensors were converted to another dtype.
    """

    changed: int
    replaced: int
    frozen: int
    converted: bool


def merge(
    directory: ModelDirectory,
    model_base: str | None,
    save_path: Path,
    options: MergeOptions,
    *,
    vision_tower: str | None = None,
    verify: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Merge what was trained into its base and write a whole model.

    Args:
        directory: A LoRA or projector directory.
        model_base: Its base; when absent, the one that the adapter names.
        save_path: Where the model is written; it must not exist or be an earlier result.
        options: How it is written.
        vision_tower: The vision tower, if it is not where the model says.
        verify: Called with the finished directory before it gets its name; raises if something is wrong.

    Raises:
        UserError: Something is missing, damaged or does not fit.
        RunError: The result is not what it should be; nothing is left behind.
    """
    if directory.kind not in ("lora", "projector"):
        raise CheckpointError(f"{directory.path} holds a {directory.kind}; there is nothing in it to merge.")
    _check_target(save_path)
    base, lora = find_trained(directory, model_base, vision_tower=vision_tower, force=options.force)
    fingerprint = language_model_fingerprint(base.sources[:1])
    check_base(directory.path, fingerprint, str(base.directory.path), force=options.force)
    has_tokenizer = (directory.path / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(directory.path if has_tokenizer else base.directory.path)
    with staged_directory(save_path) as staging:
        report = _write_merged(staging, base, lora, tokenizer, options)
        _check_frozen(staging, base, lora, report, options.quantization)
        manifest = Manifest("full", str(base.directory.path), fingerprint, 0, base.config.conversation_template or "")
        manifest.write(staging)
        if verify is not None:
            verify(staging)
    return report


def _check_target(save_path: Path) -> None:
    if save_path.is_file():
        raise CheckpointError(f"{save_path} is a file. Give a directory for the merged model.")
    if save_path.is_dir() and any(save_path.iterdir()) and not (save_path / CONFIG).is_file():
        raise CheckpointError(f"{save_path} holds files that are no model, and would be replaced. Give another place.")


def _write_merged(
    staging: Path,
    base: BaseModel,
    lora: LoraAdapter | None,
    tokenizer: PreTrainedTokenizerFast,
    options: MergeOptions,
) -> MergeReport:
    num_new_rows = max(0, len(tokenizer) - base.config.vocab_size)
    base.config.vocab_size += num_new_rows
    skeleton = build_skeleton(base.config)
    plan = plan_sources(skeleton, base.sources, Ledger(), num_new_rows=num_new_rows)
    _check_targets(plan, lora)
    rows = new_rows(lora)
    quantized = _quantized_names(skeleton) if options.quantization is not None else set[str]()
    dtype = options.dtype or _base_dtype(base)
    writer = ShardWriter(staging, max_shard_bytes=options.max_shard_bytes, weights_format=options.weights_format)
    counts = {"changed": 0, "replaced": 0, "frozen": 0}
    converted = False
    for name, source, tensor in stream_planned(base.sources, plan):
        if is_vision(name) and source.label == "vision tower" and not options.save_vision_tower:
            continue
        is_changed = name in quantized or (lora is not None and name in lora.factors)
        is_replaced = source.label not in ("base model", "vision tower") or name in rows
        counts["changed" if is_changed else "replaced" if is_replaced else "frozen"] += 1
        converted |= not (is_changed or is_replaced) and tensor.dtype != dtype
        value = options.quantization.round_trip(tensor) if options.quantization and name in quantized else tensor
        value = lora.apply(name, value) if lora is not None else value
        value = fit_rows(value.to(dtype=dtype, copy=True), tuple(skeleton.get_parameter(name).shape))
        if name in rows:
            value[-rows[name].shape[0] :] = rows[name].to(dtype)
        writer.add(name, value)
    writer.finish()
    write_json(staging / CONFIG, config_fields(base.config, dtype))
    save_tokenizer(tokenizer, staging)
    if base.vision_directory is not None:
        shutil.copyfile(base.vision_directory / PREPROCESSOR_CONFIG, staging / PREPROCESSOR_CONFIG)
    if (base.directory.path / _GENERATION_CONFIG).is_file():
        shutil.copyfile(base.directory.path / _GENERATION_CONFIG, staging / _GENERATION_CONFIG)
    return MergeReport(**counts, converted=converted)


def _quantized_names(model: LlavaLlamaForCausalLM) -> set[str]:
    return {f"{name}.weight" for name in language_model_linears(model)}


def _base_dtype(base: BaseModel) -> torch.dtype:
    """The type most of the base's weights have on disk."""
    by_dtype: dict[torch.dtype, int] = {}
    for info in base.sources[0].files.tensors.values():
        by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + info.num_bytes
    return max(by_dtype, key=lambda dtype: by_dtype[dtype])


def _check_targets(plan: Plan, lora: LoraAdapter | None) -> None:
    unknown = [name for name in (lora.factors if lora is not None else ()) if name not in plan]
    if unknown:
        assert lora is not None
        raise CheckpointError(
            f"The adapter {lora.path} changes {unknown[0]} and {len(unknown) - 1} other weights that the base model "
            "does not have. It belongs to another base model."
        )


def _check_frozen(
    staging: Path, base: BaseModel, lora: LoraAdapter | None, report: MergeReport, quantization: Quantization | None
) -> None:
    """Compare every frozen tensor on disk with the base's, bit for bit."""
    if report.converted:
        return
    written = WeightFiles.open(staging)
    changed = set(lora.factors if lora is not None else ()) | set(new_rows(lora))
    if quantization is not None:
        changed |= _quantized_names(build_skeleton(base.config))
    later = {name for source in base.sources[1:] for name in source.names.values() if source.label != "vision tower"}
    for key, name in base.sources[0].names.items():
        if name in changed or name in later or name not in written.tensors:
            continue
        before, after = base.sources[0].files.read([key])[key], written.read([name])[name]
        if not torch.equal(before, after[: before.shape[0]] if before.dim() else after):
            raise CheckpointError(f"{name} is frozen but was written with other values. The disk may be damaged.")
