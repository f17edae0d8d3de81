"""The command line: `llava-ft train | plan | check-data | inspect | merge | export | consolidate | generate | chat`.

Exit status: 0 done, 1 the run failed, 2 the request was wrong. Messages go to standard error; standard output holds
what was asked for and nothing else.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from llava_ft.errors import RunError, UserError
from llava_ft.training.log_setup import set_up_ranks
from llava_ft.version import __version__

logger = logging.getLogger("llava_ft")

DONE, FAILED, WRONG_REQUEST = 0, 1, 2
_DTYPES = ("float32", "float16", "bfloat16")
_FORCE_HELP = "go on with another base, and with files of different runs; warnings say what is ignored"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = _commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())  # noqa: T201 - the answer to the request
        return DONE if arguments else WRONG_REQUEST
    if arguments[0] == "--version":
        print(__version__)  # noqa: T201 - the answer to the request
        return DONE
    _configure_logging()
    try:
        if arguments[0] not in commands:
            raise UserError(f"There is no command {arguments[0]!r}. Commands are {', '.join(commands)}.")
        return commands[arguments[0]][0](arguments[1:])
    except UserError as error:
        logger.error("%s", error)
        return WRONG_REQUEST
    except RunError as error:
        logger.error("%s", error)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        logger.error("Interrupted.")
        return FAILED


def _commands() -> dict[str, tuple[Callable[[Sequence[str]], int], str]]:
    return {
        "train": (train, "fine-tune a model: LoRA, full or projector only; the same command resumes"),
        "plan": (plan, "say what a run will take - memory, disk, steps - before any weight is loaded"),
        "check-data": (check_data, "find what would stop or spoil a run in its records and images; repair a copy"),
        "inspect": (
            inspect,
            "data: what the model will see; weights: what files hold; lineage: where they are from",
        ),
        "merge": (merge, "put an adapter, or a projector, into its base model and verify the result"),
        "export": (export, "write a model or an adapter as transformers, original LLaVA or llama.cpp read it"),
        "consolidate": (consolidate, "get the weights out of DeepSpeed's files, when nothing else is left of a run"),
        "generate": (generate, "answer one question about images"),
        "chat": (chat, "talk with a model about images; an adapter and its base side by side"),
    }


def train(argv: Sequence[str]) -> int:
    """Fine-tune a model."""
    from llava_ft.args import format_help, parse_args, to_yaml

    if _wants_help(argv):
        print(format_help("llava-ft train"))  # noqa: T201 - the answer to the request
        return DONE
    args = parse_args(argv)
    if args.print_config:
        print(to_yaml(args), end="")  # noqa: T201 - the answer to the request
        return DONE
    levels = (args.inherited.get(name) for name in ("log_level", "log_level_replica"))
    set_up_ranks(_rank(), *(str(level or "passive") for level in levels))
    from llava_ft.inference.merge_first import merge_first
    from llava_ft.training.train_command import run_training

    return DONE if run_training(args, merge_first) else FAILED


def plan(argv: Sequence[str]) -> int:
    """Say what a run will take, and whether it fits."""
    parser = _Parser(
        "llava-ft plan",
        "Say what a run will take - memory, disk, steps - before any weight is loaded. Takes the flags of "
        "`llava-ft train`, --config among them, and those below. Exits with 1 if the run does not fit.",
    )
    parser.add_argument(
        *("--gpus", "--gpus-per-node", "--gpus_per_node"),
        type=int,
        help="GPUs on each machine; those of this machine when absent, else one",
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpu-memory", "--gpu_memory", help="of each GPU, such as 24GiB; this machine's when absent")
    parser.add_argument("--gpu", help="kind of GPU: H200, H100, A100-80GB or RTX-4090; this machine's, else H100")
    parser.add_argument("--network", type=float, help="GB/s of each GPU's share of the network, in each direction")
    parser.add_argument("--mfu", type=float, help="share of the peak at which matrix products run; 0.4 when absent")
    parser.add_argument(
        "--tokens-per-sample", "--tokens_per_sample", type=int, help="their mean, for times, if the records are absent"
    )
    parser.add_argument("--json", action="store_true", help="write JSON, sizes in bytes")
    options, flags = parser.parse_known_args(argv)
    set_up_ranks(0)
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # some libraries write to it when they are imported
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that there is no GPU
        from llava_ft.args import parse_args
        from llava_ft.planning.plan_command import run_plan
        from llava_ft.planning.run_time import TimeWishes

        fits = run_plan(
            parse_args(flags, required=("model_name_or_path",)),
            output,
            gpus=options.gpus,
            nodes=options.nodes,
            gpu_memory=options.gpu_memory,
            as_json=options.json,
            time=TimeWishes(options.gpu, options.network, options.mfu, options.tokens_per_sample),
        )
    return DONE if fits else FAILED


def merge(argv: Sequence[str]) -> int:
    """Merge what was trained into its base model."""
    parser = _Parser("llava-ft merge", "Put a LoRA adapter, or a projector, into its base model and verify the result.")
    parser.add_argument(
        "--model-path", required=True, action="append", help="the adapter's (or projector's) directory; several add up"
    )
    parser.add_argument("--weight", type=float, action="append", help="of each adapter, in their order; 1 when absent")
    parser.add_argument("--model-base", help="its base model; when absent, the one that the adapter names")
    parser.add_argument("--save-model-path", required=True, help="where the merged model is written")
    parser.add_argument("--vision-tower", help="the vision tower, if it is not where the model says")
    parser.add_argument("--dtype", choices=["auto", *_DTYPES], default="auto", help="auto: that of the base's files")
    parser.add_argument("--max-shard-size", default="5GB", help="such as 5GB or 512MiB")
    parser.add_argument("--format", choices=["safetensors", "bin"], default="safetensors")
    parser.add_argument("--save-vision-tower", action="store_true", help="write the tower although the base has none")
    parser.add_argument("--allow-base-mismatch", action="store_true", help="merge into another base than the adapter's")
    parser.add_argument("--force", action="store_true", help=_FORCE_HELP)
    parser.add_argument(
        "--base-as-trained",
        action="store_true",
        help="for what was trained on quantised weights: merge into their values instead of the base's own",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the comparison of logits, which loads one model after the other"
    )
    options = parser.parse_args(argv)
    from llava_ft.inference.merge_command import run_merge

    run_merge(options)
    return DONE


def export(argv: Sequence[str]) -> int:
    """Write a model or an adapter in the layout of other programs."""
    parser = _Parser("llava-ft export", "Write a model or an adapter in the layout of other programs, and verify it.")
    parser.add_argument("--model-path", "--model_path", required=True, help="a model, LoRA or projector directory")
    parser.add_argument("--model-base", "--model_base", help="base of an adapter or projector, if it names none")
    parser.add_argument("--save-path", "--save_path", required=True, help="where the result is written")
    parser.add_argument("--format", choices=["llava", "hf", "gguf"], required=True, help="whose layout: see the docs")
    parser.add_argument("--dtype", choices=["auto", *_DTYPES], default="auto", help="auto: that of the base's files")
    parser.add_argument("--max-shard-size", "--max_shard_size", default="5GB", help="such as 5GB or 512MiB")
    parser.add_argument("--adapter-only", "--adapter_only", action="store_true", help="the adapter without its base")
    parser.add_argument("--vision-tower", "--vision_tower", help="the vision tower, if it is not where the model says")
    parser.add_argument("--no-verify", "--no_verify", action="store_true", help="skip the comparison of logits")
    parser.add_argument("--force", action="store_true", help=_FORCE_HELP)
    options = parser.parse_args(argv)
    from llava_ft.inference.export_command import run_export

    run_export(options)
    return DONE


def consolidate(argv: Sequence[str]) -> int:
    """Turn DeepSpeed's shards into an adapter, a projector or a model."""
    parser = _Parser("llava-ft consolidate", "Get the weights out of DeepSpeed's files, on a CPU, without DeepSpeed.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint-N, or the global_stepN in it")
    parser.add_argument("--output", help="where the result is written; CHECKPOINT-consolidated when absent")
    parser.add_argument("--tag", help="which global_stepN; when absent the one that the file `latest` names")
    parser.add_argument("--model-base", help="the base model, where the run's files do not name it or it has moved")
    parser.add_argument("--config", help="the YAML file the run was started with, where the run left none")
    parser.add_argument("--lora-alpha", type=int, help="lora_alpha of the run, where no file says it")
    parser.add_argument(
        "--format", choices=["bin", "safetensors"], help="when absent, bin; safetensors for a whole model"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of a whole model's weights")
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


def generate(argv: Sequence[str]) -> int:
    """Answer one question; the answer alone goes to standard output."""
    parser = _Parser("llava-ft generate", "Answer one question about images; the answer alone is on standard output.")
    parser.add_argument("--model-path", required=True, help="a LLaVA model, a LoRA directory or a projector directory")
    parser.add_argument("--model-base", help="base of an adapter or projector")
    parser.add_argument("--image-file", action="append", default=[], help="an image; give it several times for several")
    parser.add_argument("--query", required=True)
    _add_answering_flags(parser)
    options = parser.parse_args(argv)
    from llava_ft.inference.generate_command import run_generate

    run_generate(options, sys.stdout)
    return DONE


def chat(argv: Sequence[str]) -> int:
    """Talk with a model about images."""
    parser = _Parser(
        "llava-ft chat",
        "Talk with a model, turn by turn, about text and images; /help in the chat lists its commands. Where standard "
        "input is no terminal each of its lines is a turn, and standard output gets the answers alone.",
    )
    parser.add_argument("--model-path", required=True, help="a LLaVA model, a LoRA directory or a projector directory")
    parser.add_argument("--model-base", help="base of an adapter or projector")
    parser.add_argument(
        "--image-file", action="append", default=[], help="an image for the first question; may be given several times"
    )
    parser.add_argument("--compare", action="store_true", help="have an adapter's base answer beside it")
    parser.add_argument("--compare-with", metavar="MODEL", help="have a second model answer beside the first")
    parser.add_argument("--compare-with-base", metavar="BASE", help="its base, where it is an adapter or projector")
    _add_answering_flags(parser)
    options = parser.parse_args(argv)
    from llava_ft.inference.chat_command import run_chat

    run_chat(options, sys.stdin, sys.stdout, sys.stderr)
    return DONE


def check_data(argv: Sequence[str]) -> int:
    """Check the records and images of a run."""
    parser = _Parser(
        "llava-ft check-data",
        "Check every record and decode every image of a run's data. Takes the flags of `llava-ft train`, --config "
        "among them, and those below. Exits with 1 if something would stop or spoil a run.",
    )
    parser.add_argument("--fix", metavar="OUT", help="write the usable records of --data_path to this .json or .jsonl")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page too, with charts and thumbnails")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.add_argument("--workers", type=int, help="processes; when absent, one for each core")
    options, flags = parser.parse_known_args(argv)
    set_up_ranks(0)
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # some libraries write to it when they are imported
        from llava_ft.args import parse_args
        from llava_ft.training.check_data_command import CheckOptions, run_check_data

        wishes = CheckOptions(
            fix=Path(options.fix) if options.fix else None,
            html=Path(options.html) if options.html else None,
            as_json=options.json,
            num_workers=options.workers,
        )
        passed = run_check_data(parse_args(flags, required=("model_name_or_path", "data_path")), output, wishes)
    return DONE if passed else FAILED


def inspect(argv: Sequence[str]) -> int:
    """Show what the model will see, what weight files hold, or what they were made from."""
    kinds = {"data": _inspect_data, "weights": _inspect_weights, "lineage": _inspect_lineage}
    if _wants_help(argv[:1]):
        print("llava-ft inspect data | weights | lineage ...\n\n`llava-ft inspect data --help` lists flags.")  # noqa: T201 - asked for
        return DONE
    if not argv or argv[0] not in kinds:
        raise UserError(f"`llava-ft inspect` needs to know what to inspect. Known are {', '.join(kinds)}.")
    return kinds[argv[0]](argv[1:])


def _inspect_weights(argv: Sequence[str]) -> int:
    parser = _Parser(
        "llava-ft inspect weights",
        "Say what a weight file or a directory holds, which base it needs and what is missing, without reading values "
        "or running anything in a pickle. With two paths: how they differ. Exits with 1 if something is missing or "
        "damaged, or the two are not equal bit for bit.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help=".bin, .safetensors or index file, or a directory")
    parser.add_argument("--keys", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="write JSON, every tensor in it, sizes in bytes")
    options = parser.parse_args(argv)
    if len(options.paths) > 2:
        raise UserError(f"{len(options.paths)} paths are given. Give one to describe it, or two to compare them.")
    from llava_ft.inference.inspect_weights_command import run_inspect_weights

    paths = [Path(path) for path in options.paths]
    is_good = run_inspect_weights(paths, sys.stdout, as_json=options.json, all_keys=options.keys)
    return DONE if is_good else FAILED


def _inspect_data(argv: Sequence[str]) -> int:
    parser = _Parser(
        "llava-ft inspect data",
        "Show records as the model will see them: what is supervised, what is cut off, and what is wrong with those "
        "that cannot be used. Takes the flags of `llava-ft train`, --config among them, and those below. Exits with 1 "
        "if a record that is shown cannot be used.",
    )
    parser.add_argument("--limit", type=int, help="show at most so many records")
    parser.add_argument("--index", type=int, nargs="+", default=[], help="show the records at these positions, from 0")
    parser.add_argument("--id", nargs="+", default=[], help="show the records with these ids")
    parser.add_argument("--json", action="store_true", help="write one JSON object a line")
    parser.add_argument("--html", metavar="FILE", help="write a page with thumbnails instead")
    options, flags = parser.parse_known_args(argv)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}; it must be at least 1.")
    if options.json and options.html:
        raise UserError("--json and --html exclude each other. Give one of them.")
    from llava_ft.args import parse_args
    from llava_ft.data.inspection.records import Selection
    from llava_ft.training.inspect_command import run_inspect_data

    all_usable = run_inspect_data(
        parse_args(flags, required=("model_name_or_path", "data_path")),
        sys.stdout,
        as_json=options.json,
        html=Path(options.html) if options.html else None,
        selection=Selection(options.limit, tuple(options.index), tuple(options.id)),
    )
    return DONE if all_usable else FAILED


def _inspect_lineage(argv: Sequence[str]) -> int:
    parser = _Parser(
        "llava-ft inspect lineage",
        "Show what a directory was made from: base, data, and each earlier run or merge, back to the first base.",
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or the result of a run, a merge or an export")
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args(argv)
    from llava_ft.inference.inspect_lineage_command import run_inspect_lineage

    run_inspect_lineage(Path(options.path), sys.stdout, as_json=options.json)
    return DONE


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See `{self.prog} --help`.")


def _add_answering_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `generate` and `chat` share: how an answer is made, and how the model is held."""
    parser.add_argument("--conv-mode", help="conversation template; when absent, the one the model was trained with")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", "--top_p", type=float)
    parser.add_argument("--num-beams", "--num_beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--dtype", choices=_DTYPES, help="bfloat16 on a GPU, float32 on a CPU when absent")
    parser.add_argument("--bits", type=int, choices=[4, 8, 16], default=16, help="of the language model's layers")
    parser.add_argument("--device", help="such as cuda or cpu")
    parser.add_argument("--vision-tower", help="the vision tower, if it is not where the model says")
    parser.add_argument("--allow-base-mismatch", action="store_true", help="use another base than the adapter's")
    parser.add_argument("--force", action="store_true", help=_FORCE_HELP)


def _configure_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    set_up_ranks(_rank())


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _wants_help(argv: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in argv)


def _overview() -> str:
    lines = [f"  {name:<13}{text}" for name, (_, text) in _commands().items()]
    return "llava-ft COMMAND ...\n\n" + "\n".join(lines) + "\n\n`llava-ft COMMAND --help` lists a command's flags."
