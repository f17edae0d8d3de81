"""`llava-ft train`."""

from collections.abc import Sequence

from llava_ft.commands.parser import DONE, FAILED, rank, wants_help
from llava_ft.training.log_setup import set_up_ranks


def train(argv: Sequence[str]) -> int:
    """Fine-tune a model."""
    from llava_ft.args import format_help, parse_args, to_yaml

    if wants_help(argv):
        print(format_help("llava-ft train"))  # noqa: T201 - the answer to the request
        return DONE
    args = parse_args(argv)
    if args.print_config:
        print(to_yaml(args), end="")  # noqa: T201 - the answer to the request
        return DONE
    levels = (args.inherited.get(name) for name in ("log_level", "log_level_replica"))
    set_up_ranks(rank(), *(str(level or "passive") for level in levels))
    from llava_ft.training.run import run_training

    return DONE if run_training(args) else FAILED
