"""`llava-ft merge`: merging, its verification, and the report."""

import argparse
import logging
from pathlib import Path

import torch

from llava_ft.checkpoint.directory import ModelDirectory, identify, resolve_model_path
from llava_ft.checkpoint.merge import MergeOptions, merge
from llava_ft.checkpoint.names import RUN_CONFIG
from llava_ft.checkpoint.overrides import force_from_flags
from llava_ft.checkpoint.proof import ConversionReport
from llava_ft.checkpoint.save import parse_size
from llava_ft.checkpoint.trained import quantization_in_training
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import UserError
from llava_ft.inference.verify import compare_merged
from llava_ft.tuning.quant import Quantization, check_quantization

logger = logging.getLogger(__name__)


def run_merge(options: argparse.Namespace) -> ConversionReport:
    """Carry out a merge as the command line describes it."""
    try:
        max_shard_bytes = parse_size(options.max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {error}") from None
    directory = identify(resolve_model_path(options.model_path))
    in_training = quantization_in_training(directory.path)
    quantization = _base_to_merge_into(directory, in_training) if options.base_as_trained else None
    force = force_from_flags(options.force, options.allow_base_mismatch)

    def verify(staging: Path, report: ConversionReport) -> None:
        if options.no_verify:
            report.notes.append("The logits were not compared (--no-verify).")
            return
        compare_merged(
            staging,
            str(directory.path),
            options.model_base,
            vision_tower=options.vision_tower,
            merged_dtype=next(iter(WeightFiles.open(staging).tensors.values())).dtype,
            force=force,
            quantization=quantization,
            report=report,
        )

    report = merge(
        directory,
        options.model_base,
        Path(options.save_model_path),
        MergeOptions(
            dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
            max_shard_bytes=max_shard_bytes,
            weights_format=options.format,
            save_vision_tower=options.save_vision_tower,
            force=force,
            quantization=quantization,
        ),
        vision_tower=options.vision_tower,
        verify=verify,
    )
    logger.info("Merged into %s.", options.save_model_path)
    for line in report.lines():
        logger.info("%s", line)
    if in_training is not None and quantization is None:
        logger.info(
            "It was trained on weights in %s and is merged into the base's own, which answer slightly differently; "
            "--base-as-trained merges into the weights it was trained on.",
            in_training,
        )
    return report


def _base_to_merge_into(directory: ModelDirectory, in_training: Quantization | None) -> Quantization:
    if in_training is None:
        raise UserError(
            f"--base-as-trained: {directory.path} was not trained on quantised weights, or its {RUN_CONFIG} is gone. "
            "Leave the flag out to merge into the base's own weights."
        )
    check_quantization(in_training)
    return in_training
