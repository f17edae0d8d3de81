"""`llava-ft inspect data | weights | lineage`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from llava_ft.commands.parser import DONE, FAILED, Parser, wants_help
from llava_ft.errors import UserError


def inspect(argv: Sequence[str]) -> int:
    """Show what the model will see, what weight files hold, or what they were made from."""
    kinds = {"data": _inspect_data, "weights": _inspect_weights, "lineage": _inspect_lineage}
    if wants_help(argv[:1]):
        print("llava-ft inspect data | weights | lineage ...\n\n`llava-ft inspect data --help` lists flags.")  # noqa: T201 - asked for
        return DONE
    if not argv or argv[0] not in kinds:
        raise UserError(f"`llava-ft inspect` needs to know what to inspect. Known are {', '.join(kinds)}.")
    return kinds[argv[0]](argv[1:])


def _inspect_data(argv: Sequence[str]) -> int:
    parser = Parser(
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
    from llava_ft.inspection.record_view import Selection, run_inspect_data
    from llava_ft.resolve import resolve_model

    args = parse_args(flags, required=("model_name_or_path", "data_path"))
    all_usable = run_inspect_data(
        str(args.data.data_path),
        resolve_model(args, need="tokenizer").data_plan(),
        sys.stdout,
        as_json=options.json,
        html=Path(options.html) if options.html else None,
        selection=Selection(options.limit, tuple(options.index), tuple(options.id)),
    )
    return DONE if all_usable else FAILED


def _inspect_weights(argv: Sequence[str]) -> int:
    parser = Parser(
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
    from llava_ft.inspection.weights_report import run_inspect_weights

    paths = [Path(path) for path in options.paths]
    is_good = run_inspect_weights(paths, sys.stdout, as_json=options.json, all_keys=options.keys)
    return DONE if is_good else FAILED


def _inspect_lineage(argv: Sequence[str]) -> int:
    parser = Parser(
        "llava-ft inspect lineage",
        "Show what a directory was made from: base, data, and each earlier run or merge, back to the first base.",
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or the result of a run, a merge or an export")
    parser.add_argument("--json", action="store_true", help="write JSON")
    options = parser.parse_args(argv)
    from llava_ft.inspection.lineage_report import run_inspect_lineage

    run_inspect_lineage(Path(options.path), sys.stdout, as_json=options.json)
    return DONE
