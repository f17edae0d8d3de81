"""`llava-ft consolidate`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from llava_ft.commands.parser import DONE, DTYPES, Parser
from llava_ft.errors import UserError

logger = logging.getLogger(__name__)


def consolidate(argv: Sequence[str]) -> int:
    """Turn DeepSpeed's shards into an adapter, a projector or a model."""
    parser = Parser("llava-ft consolidate", "Get the weights out of DeepSpeed's files, on a CPU, without DeepSpeed.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint-N, or the global_stepN in it")
    parser.add_argument("--output", type=Path, help="where the result is written; CHECKPOINT-consolidated when absent")
    parser.add_argument("--tag", help="which global_stepN; when absent the one that the file `latest` names")
    parser.add_argument("--model-base", help="the base model, where the run's files do not name it or it has moved")
    parser.add_argument("--config", help="the YAML file the run was started with, where the run left none")
    parser.add_argument("--lora-alpha", type=int, help="lora_alpha of the run, where no file says it")
    parser.add_argument(
        "--format", choices=["bin", "safetensors"], help="when absent, bin; safetensors for a whole model"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of a whole model's weights")
    parser.add_argument("--max-shard-size", default="5GB", help="of a whole model's files, such as 5GB or 512MiB")
    parser.add_argument(
        "--from-model-states",
        action="store_true",
        help="where optimizer files of stage 1 or 2 are lost: take the weights in the precision the run computed in",
    )
    options = parser.parse_args(argv)
    import torch

    from llava_ft.args.sources import find_config
    from llava_ft.checkpoint.save import shard_bytes
    from llava_ft.checkpoint.zero.consolidate import consolidate as write_weights
    from llava_ft.checkpoint.zero.consolidate import next_commands

    config = None if options.config is None else Path(find_config(options.config) or options.config)
    if config is not None and not config.is_file():
        raise UserError(f"--config {config} does not exist. Give the YAML file the run was started with.")
    result = write_weights(
        options.checkpoint,
        options.output,
        tag=options.tag,
        model_base=options.model_base,
        config_file=config,
        lora_alpha=options.lora_alpha,
        weights_format=options.format,
        dtype=getattr(torch, options.dtype),
        max_shard_bytes=shard_bytes(options.max_shard_size),
        from_model_states=options.from_model_states,
    )
    for note in result.notes:
        logger.info("%s", note)
    logger.info(
        "The %s of step %d: %d tensors, %s values. Written to %s.",
        {"lora": "adapter and what was trained beside it", "projector": "projector", "full": "model"}[result.kind],
        result.step,
        result.num_trained,
        f"{result.num_values:,}",
        result.output,
    )
    if commands := next_commands(result):
        logger.info("Next, one of:\n%s", "\n".join(f"    {command}" for command in commands))
    return DONE
