"""The command line: `llava-ft train | plan | check-data | inspect | merge | export | consolidate | generate | chat`.

Exit status: 0 done, 1 the run failed, 2 the request was wrong. Messages go to standard error; standard output holds
what was asked for and nothing else.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from llava_ft.commands.answer import chat, generate
from llava_ft.commands.check_data import check_data
from llava_ft.commands.consolidate import consolidate
from llava_ft.commands.export import export
from llava_ft.commands.inspect import inspect
from llava_ft.commands.merge import merge
from llava_ft.commands.parser import DONE, FAILED, WRONG_REQUEST, rank
from llava_ft.commands.plan import plan
from llava_ft.commands.train import train
from llava_ft.errors import RunError, UserError
from llava_ft.training.log_setup import set_up_ranks
from llava_ft.version import __version__

logger = logging.getLogger("llava_ft")


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


def _configure_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    set_up_ranks(rank())


def _overview() -> str:
    lines = [f"  {name:<13}{text}" for name, (_, text) in _commands().items()]
    return "llava-ft COMMAND ...\n\n" + "\n".join(lines) + "\n\n`llava-ft COMMAND --help` lists a command's flags."
