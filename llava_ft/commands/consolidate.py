"""`llava-ft consolidate`."""

from collections.abc import Sequence

from llava_ft.commands.parser import DONE, DTYPES, Parser


def consolidate(argv: Sequence[str]) -> int:
    """Turn DeepSpeed's shards into an adapter, a projector or a model."""
    parser = Parser("llava-ft consolidate", "Get the weights out of DeepSpeed's files, on a CPU, without DeepSpeed.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint-N, or the global_stepN in it")
    parser.add_argument("--output", help="where the result is written; CHECKPOINT-consolidated when absent")
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
    from llava_ft.args.sources import find_config
    from llava_ft.inference.consolidate_command import run_consolidate

    if options.config is not None:
        options.config = str(find_config(options.config) or options.config)
    run_consolidate(options)
    return DONE
