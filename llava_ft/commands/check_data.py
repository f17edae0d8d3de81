"""`llava-ft check-data`."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_ft.commands.parser import DONE, FAILED, Parser
from llava_ft.errors import UserError
from llava_ft.training.log_setup import set_up_ranks


def check_data(argv: Sequence[str]) -> int:
    """Check the records and images of a run."""
    parser = Parser(
        "llava-ft check-data",
        "Check every record and decode every image of a run's data. Takes the flags of `llava-ft train`, --config "
        "among them, and those below. Exits with 1 if something would stop or spoil a run.",
    )
    parser.add_argument("--fix", metavar="OUT", help="write the usable records of --data_path to this .json or .jsonl")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page too, with charts and thumbnails")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.add_argument("--workers", type=int, help="processes; when absent, one for each core")
    options, flags = parser.parse_known_args(argv)
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers is {options.workers}; it must be at least 1.")
    set_up_ranks(0)
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # some libraries write to it when they are imported
        from llava_ft.args import parse_args
        from llava_ft.data.preparation.processes import num_cores
        from llava_ft.inspection.check_data import run_check_data
        from llava_ft.resolve import resolve_model

        args = parse_args(flags, required=("model_name_or_path", "data_path"))
        passed = run_check_data(
            args,
            resolve_model(args, need="tokenizer").data_plan(options.workers or num_cores()),
            output,
            fix=Path(options.fix) if options.fix else None,
            html=Path(options.html) if options.html else None,
            as_json=options.json,
        )
    return DONE if passed else FAILED
