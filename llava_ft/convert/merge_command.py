"""`llava-ft merge`: merging, its verification, and the report."""

import argparse
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from llava_ft.checkpoint.base_and_adapters import quantization_in_training
from llava_ft.checkpoint.directory import ModelDirectory, identify, resolve_model_path
from llava_ft.checkpoint.names import RUN_CONFIG
from llava_ft.checkpoint.overrides import force_from_flags
from llava_ft.checkpoint.save import parse_size
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.merge import MergeOptions, merge_all
from llava_ft.convert.proof import ConversionReport
from llava_ft.convert.verify import compare_merged
from llava_ft.errors import UserError
from llava_ft.tuning.quant import Quantization, check_quantization

logger = logging.getLogger(__name__)


def run_merge(options: argparse.Namespace) -> ConversionReport:
    """Carry out a merge as the command line describes it."""
    try:
        max_shard_bytes = parse_size(options.max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {error}") from None
    shares = _shares(options)
    in_training = _quantization_in_training(shares)
    quantization = _base_to_merge_into(shares, in_training) if options.base_as_trained else None
    force = force_from_flags(options.force, options.allow_base_mismatch)

    def verify(staging: Path, report: ConversionReport) -> None:
        if in_training is not None and quantization is None:
            report.notes.append(
                f"it was trained on weights in {in_training} and is merged into the base's own, which answer slightly "
                "differently; --base-as-trained merges into the weights it was trained on"
            )
        if options.no_verify:
            report.notes.append("logits and answers were not compared (--no-verify)")
            return
        compare_merged(
            staging,
            shares,
            options.model_base,
            vision_tower=options.vision_tower,
            merged_dtype=next(iter(WeightFiles.open(staging).tensors.values())).dtype,
            force=force,
            quantization=quantization,
            report=report,
        )

    report = merge_all(
        shares,
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
    return report


def _shares(options: argparse.Namespace) -> list[tuple[float, ModelDirectory]]:
    """Return the directories of a command line and the weight of each."""
    paths, weights = options.model_path, options.weight or [1.0] * len(options.model_path)
    if len(weights) != len(paths):
        raise UserError(
            f"--weight is given {len(weights)} times and --model-path {len(paths)} times. Give one weight for each "
            "adapter, in the same order, or none: each then counts with 1."
        )
    wrong = [weight for weight in weights if not math.isfinite(weight)]
    if wrong:
        raise UserError(f"--weight is {wrong[0]}; it must be a number.")
    directories = [identify(resolve_model_path(path)) for path in paths]
    twice = [
        path for path, count in Counter(directory.path.resolve() for directory in directories).items() if count > 1
    ]
    if twice:
        raise UserError(f"--model-path names {twice[0]} twice. Give it once, with the sum of the weights.")
    return list(zip(weights, directories, strict=True))


def _quantization_in_training(shares: Sequence[tuple[float, ModelDirectory]]) -> Quantization | None:
    """Return how the base was held while all of these were trained; None for 16 bits or where they differ."""
    found = {quantization_in_training(directory.path) for _, directory in shares}
    return found.pop() if len(found) == 1 else None


def _base_to_merge_into(
    shares: Sequence[tuple[float, ModelDirectory]], in_training: Quantization | None
) -> Quantization:
    if in_training is None:
        paths = " and ".join(str(directory.path) for _, directory in shares)
        raise UserError(
            f"--base-as-trained: {paths} was not trained on quantised weights, or its {RUN_CONFIG} is gone, or several "
            "were trained on different ones. Leave the flag out to merge into the base's own weights."
        )
    check_quantization(in_training)
    return in_training
