"""What the commands share: how a command line is read, and exit statuses."""

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from llava_ft.errors import UserError

DONE, FAILED, WRONG_REQUEST = 0, 1, 2
"""Exit statuses: done, the run failed, the request was wrong."""
DTYPES = ("float32", "float16", "bfloat16")
FORCE_HELP = "go on with another base, and with files of different runs; warnings say what is ignored"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line, with where to read about it."""
        raise UserError(f"{message}. See `{self.prog} --help`.")


def rank() -> int:
    """Number of this process among those of the run; 0 is alone or the first."""
    return int(os.environ.get("RANK") or 0)


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the flags are asked for."""
    return any(argument in ("-h", "--help") for argument in argv)
