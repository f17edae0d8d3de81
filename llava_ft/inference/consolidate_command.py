"""`llava-ft consolidate`: the request, and the report with what to run next."""

import argparse
import logging
from pathlib import Path

import torch

from llava_ft.checkpoint.save import parse_size
from llava_ft.checkpoint.zero.consolidate import ConsolidateOptions, Consolidation, consolidate, next_commands
from llava_ft.errors import UserError

logger = logging.getLogger(__name__)

_KINDS = {"lora": "adapter and what was trained beside it", "projector": "projector", "full": "model"}


def run_consolidate(options: argparse.Namespace) -> Consolidation:
    """Carry out a consolidation as the command line describes it."""
    try:
        max_shard_bytes = parse_size(options.max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {error}") from None
    if options.config is not None and not Path(options.config).is_file():
        raise UserError(f"--config {options.config} does not exist. Give the YAML file the run was started with.")
    result = consolidate(
        ConsolidateOptions(
            checkpoint=Path(options.checkpoint),
            output=Path(options.output) if options.output is not None else None,
            tag=options.tag,
            model_base=options.model_base,
            config_file=Path(options.config) if options.config is not None else None,
            lora_alpha=options.lora_alpha,
            weights_format=options.format,
            dtype=getattr(torch, options.dtype),
            max_shard_bytes=max_shard_bytes,
            from_model_states=options.from_model_states,
        )
    )
    for note in result.notes:
        logger.info("%s", note)
    logger.info(
        "The %s of step %d: %d tensors, %s values. Written to %s.",
        _KINDS[result.kind],
        result.step,
        result.num_trained,
        f"{result.num_values:,}",
        result.output,
    )
    if commands := next_commands(result):
        logger.info("Next, one of:\n%s", "\n".join(f"    {command}" for command in commands))
    return result
