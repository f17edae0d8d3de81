"""`llava-ft merge`: merging, its verification, and the report."""

import argparse
import logging
from pathlib import Path

import torch

from llava_ft.checkpoint.directory import identify, resolve_model_path
from llava_ft.checkpoint.merge import MergeOptions, MergeReport, merge
from llava_ft.checkpoint.save import parse_size
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import UserError
from llava_ft.inference.verify import compare_merged

logger = logging.getLogger(__name__)


def run_merge(options: argparse.Namespace) -> MergeReport:
    """Carry out a merge as the command line describes it."""
    try:
        max_shard_bytes = parse_size(options.max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {error}") from None
    directory = identify(resolve_model_path(options.model_path))

    def verify(staging: Path) -> None:
        if options.no_verify:
            logger.warning("The logits were not compared (--no-verify).")
            return
        dtype = next(iter(WeightFiles.open(staging).tensors.values())).dtype
        comparison = compare_merged(
            staging,
            str(directory.path),
            options.model_base,
            vision_tower=options.vision_tower,
            merged_dtype=dtype,
            allow_base_mismatch=options.allow_base_mismatch,
        )
        logger.info("Verified: %s.", comparison)

    report = merge(
        directory,
        options.model_base,
        Path(options.save_model_path),
        MergeOptions(
            dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
            max_shard_bytes=max_shard_bytes,
            weights_format=options.format,
            save_vision_tower=options.save_vision_tower,
            allow_base_mismatch=options.allow_base_mismatch,
        ),
        vision_tower=options.vision_tower,
        verify=verify,
    )
    frozen = "converted to another dtype" if report.converted else "bit-identical to the base"
    logger.info(
        "Merged into %s: %d tensors changed by the adapter, %d replaced by trained ones, %d %s.",
        options.save_model_path,
        report.changed,
        report.replaced,
        report.frozen,
        frozen,
    )
    return report
