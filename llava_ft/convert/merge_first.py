"""Merging an adapter into its base before a run trains on from there (`--adapter_mode merge_first`)."""

import logging
from pathlib import Path

from llava_ft.checkpoint.base_and_adapters import quantization_in_training
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.merge import MergeOptions, merge
from llava_ft.convert.proof import ConversionReport
from llava_ft.convert.verify import compare_merged

logger = logging.getLogger(__name__)


def merge_first(adapter: Path, base: str, target: Path, *, vision_tower: str | None, force: Force) -> None:
    """Merge as `llava-ft merge` does without flags: with float32 arithmetic, in the base's dtype, and with its proof.

    Args:
        adapter: A LoRA directory.
        base: Its base model.
        target: Where the merged model is written; it appears there when it is complete and proven.
        vision_tower: The vision tower, if it is not where the adapter says.
        force: What is passed over.

    Raises:
        UserError: Something is missing, damaged or does not fit.
        RunError: The result is not the adapter on its base, or the disk is full; nothing is left behind.
    """
    directory = identify(adapter)

    def verify(staging: Path, report: ConversionReport) -> None:
        compare_merged(
            staging,
            str(adapter),
            base,
            vision_tower=vision_tower,
            merged_dtype=next(iter(WeightFiles.open(staging).tensors.values())).dtype,
            force=force,
            report=report,
        )

    report = merge(directory, base, target, MergeOptions(force=force), vision_tower=vision_tower, verify=verify)
    for line in report.lines():
        logger.info("%s", line)
    in_training = quantization_in_training(adapter)
    if in_training is not None:
        logger.info("The adapter was trained on weights in %s and is merged into the base's own.", in_training)
