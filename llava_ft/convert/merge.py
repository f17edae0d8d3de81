"""Merging an adapter into its base, and proving that nothing else changed.

The result is a whole LLaVA model. It is made on the CPU, tensor by tensor: each weight is read, the adapter's part is
added in float32, and the sum is rounded once and written at once; memory holds the adapter, and the largest tensor a
few times. Before the result gets its name it is proven: every tensor is compared with the files it comes from, and
logits and answers on fixed inputs with those of the adapter beside the base. See docs/how-to/merge.md.

What was trained on quantised weights is merged into the base's own, never into quantised ones: the sum would be rounded
to 4 or 8 bits once more. On request it is merged into what the quantised weights are worth, the weights it was trained
on.
"""

import argparse
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.directory import ModelDirectory, identify, resolve_model_path
from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.names import CONFIG, GENERATION_CONFIG, RUN_CONFIG
from llava_ft.checkpoint.overrides import Force, collect_ignored, force_from_flags
from llava_ft.checkpoint.quantized import quantization_in_training
from llava_ft.checkpoint.save import ShardWriter, check_space, config_fields, layout_bytes, shard_bytes, write_json
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.native_record import copy_files
from llava_ft.convert.proof import ConversionReport, check_target, prove_tensors, proven_directory
from llava_ft.convert.verify import NativeSpeaker, computing_dtype, prove_answers, relative_bound
from llava_ft.data.image_processor import copy_image_settings
from llava_ft.data.tokenizer import save_tokenizer
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.load import load_base_and_adapters, load_model
from llava_ft.tuning.quant import Quantization, check_quantization

logger = logging.getLogger(__name__)

Shares = Sequence[tuple[float, ModelDirectory]]
"""A projector directory, or LoRA directories; and the weight of each."""


@dataclass(frozen=True)
class MergeOptions:
    """How a merged model is written."""

    dtype: torch.dtype | None = None  # of the weights; that of the base's files when absent
    max_shard_bytes: int = 5 * 10**9
    weights_format: Literal["bin", "safetensors"] = "safetensors"
    save_vision_tower: bool = False  # also where the base does not hold it
    verify: bool = True  # compare logits and greedy answers; source and result are loaded for it
    force: Force = False  # what is passed over, such as a base other than the one the adapter was trained on
    quantization: Quantization | None = None  # merge into what the base's layers are worth when quantised like this
    vision_tower: str | None = None  # if it is not where the model says


def run_merge(request: argparse.Namespace) -> ConversionReport:
    """Carry out a merge as the command line describes it.

    Raises:
        UserError: The request is wrong, or something is missing, damaged or does not fit.
        RunError: The result is not what it should be, or could not be written; nothing is left behind.
    """
    paths, weights = request.model_path, request.weight or [1.0] * len(request.model_path)
    max_shard_bytes = shard_bytes(request.max_shard_size)
    if len(weights) != len(paths):
        raise UserError(
            f"--weight is given {len(weights)} times and --model-path {len(paths)} times. Give one weight for each "
            "adapter, in the same order, or none: each then counts with 1."
        )
    wrong = [weight for weight in weights if not math.isfinite(weight)]
    if wrong:
        raise UserError(f"--weight is {wrong[0]}; it must be a number.")
    directories = [identify(resolve_model_path(path)) for path in paths]
    for path, count in Counter(directory.path.resolve() for directory in directories).items():
        if count > 1:
            raise UserError(f"--model-path names {path} twice. Give it once, with the sum of the weights.")
    shares = list(zip(weights, directories, strict=True))
    quantization = None
    if request.base_as_trained:
        quantization = _quantization_in_training(shares)
        if quantization is None:
            raise UserError(
                f"--base-as-trained: {' and '.join(str(directory.path) for directory in directories)} was not trained "
                f"on quantised weights, or its {RUN_CONFIG} is gone, or several were trained on different ones. Leave "
                "the flag out to merge into the base's own weights."
            )
        check_quantization(quantization)
    options = MergeOptions(
        dtype=None if request.dtype == "auto" else getattr(torch, request.dtype),
        max_shard_bytes=max_shard_bytes,
        weights_format=request.format,
        save_vision_tower=request.save_vision_tower,
        verify=not request.no_verify,
        force=force_from_flags(request.force, request.allow_base_mismatch),
        quantization=quantization,
        vision_tower=request.vision_tower,
    )
    report = merge(shares, request.model_base, Path(request.save_model_path), options)
    logger.info("Merged into %s.", request.save_model_path)
    report.log()
    return report


def merge(shares: Shares, model_base: str | None, save_path: Path, options: MergeOptions) -> ConversionReport:
    """Merge what was trained into its base and write a whole model.

    Args:
        shares: What is merged.
        model_base: The base; when absent, the one that the adapters name.
        save_path: It must not exist or be an earlier result; the report is written into it too.
        options: How it is written.

    Raises:
        UserError: Something is missing, damaged or does not fit.
        RunError: The result is not what it should be; nothing is left behind.
    """
    for _, directory in shares:
        if directory.kind not in ("lora", "projector"):
            raise CheckpointError(f"{directory.path} holds a {directory.kind}; there is nothing in it to merge.")
    in_training = _quantization_in_training(shares)
    report = ConversionReport("merge", _named(shares), str(save_path))
    check_target(report, "--save-model-path")
    with collect_ignored() as report.ignored:
        trained = open_base_and_adapters(shares, model_base, vision_tower=options.vision_tower, force=options.force)
        full = FullModel(trained, options.quantization)
        report.notes += trained.notes
        details = {"weights": [share for share, _ in shares]}
        with proven_directory(report, full, "--save-model-path", manifest="full", details=details) as staging:
            _write_merged(staging, full, report, options)
            written = WeightFiles.open(staging).stream(may_be_nan=True)
            prove_tensors(report, full, written, full.names(with_tower=options.save_vision_tower))
            if in_training is not None and options.quantization is None:
                report.notes.append(
                    f"it was trained on weights in {in_training} and is merged into the base's own, which answer "
                    "slightly differently; --base-as-trained merges into the weights it was trained on"
                )
            if options.verify:
                compare_merged(staging, shares, model_base, options, report)
            else:
                report.notes.append("logits and answers were not compared (--no-verify)")
    return report


def compare_merged(
    merged: Path,
    shares: Shares,
    model_base: str | None,
    options: MergeOptions | None = None,
    report: ConversionReport | None = None,
) -> ConversionReport:
    """Compare a merged model with the adapter beside its base, quantised if it was merged into such weights.

    `report`, or a new one, gets `logits` and `answers`; the rest is as for `merge`.

    Raises:
        RunError: They differ by more than rounding explains.
    """
    options, report = options or MergeOptions(), report or ConversionReport("merge", _named(shares), str(merged))
    rounded_to = next(iter(WeightFiles.open(merged).tensors.values())).dtype
    dtype = computing_dtype(merged, rounded_to)
    source = open_base_and_adapters(shares, model_base, vision_tower=options.vision_tower, force=options.force)
    tower = options.vision_tower or source.config.mm_vision_tower
    prove_answers(
        report,
        lambda: load_base_and_adapters(
            source, dtype=dtype, device="cpu", adapter="beside", quantization=options.quantization
        ),
        lambda: NativeSpeaker(load_model(str(merged), vision_tower=tower, dtype=dtype, device="cpu")),
        relative_bound(dtype, rounded_to, quantization=options.quantization),
    )
    return report


def _quantization_in_training(shares: Shares) -> Quantization | None:
    """Return how the base was held while all of these were trained; None for 16 bits or where they differ."""
    found = {quantization_in_training(directory.path) for _, directory in shares}
    return found.pop() if len(found) == 1 else None


def _named(shares: Shares) -> str:
    """Name what is merged, with the weights if they matter."""
    if len(shares) == 1 and shares[0][0] == 1.0:
        return str(shares[0][1].path)
    return " + ".join(f"{share:g} x {directory.path}" for share, directory in shares)


def _write_merged(staging: Path, full: FullModel, report: ConversionReport, options: MergeOptions) -> None:
    layout = full.layout(options.dtype, with_tower=options.save_vision_tower)
    check_space(staging, layout_bytes(layout))
    writer = ShardWriter(
        staging, layout, max_shard_bytes=options.max_shard_bytes, weights_format=options.weights_format
    )
    for piece in full.stream(options.dtype, with_tower=options.save_vision_tower):
        report.count(piece)
        writer.add(piece.name, piece.value)
    writer.finish()
    write_json(staging / CONFIG, config_fields(full.config, options.dtype or full.dtype))
    save_tokenizer(full.tokenizer, staging)
    base = full.base
    if base.vision_directory is not None:
        copy_image_settings(base.vision_directory, staging)
    copy_files(base.directory.path, staging, [GENERATION_CONFIG])
