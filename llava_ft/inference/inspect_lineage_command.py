"""`llava-ft inspect lineage`: what a directory was made from, back to the first base."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from llava_ft.checkpoint.lineage import LINEAGE, read_lineage
from llava_ft.checkpoint.lineage_text import lineage_lines
from llava_ft.errors import UserError


def run_inspect_lineage(path: Path, output: TextIO, *, as_json: bool) -> None:
    """Write the lineage of a directory.

    Args:
        path: The directory.
        output: Where to.
        as_json: Whether to write JSON instead of text to read.

    Raises:
        UserError: It has no lineage, or a damaged one.
    """
    if not path.is_dir():
        raise UserError(f"{path} {'is a file' if path.exists() else 'does not exist'}. Give a directory of weights.")
    lineage = read_lineage(path)
    if lineage is None:
        raise UserError(
            f"{path} has no {LINEAGE}: another program wrote it, or a version of this one that kept none. `llava-ft "
            "inspect weights` says what it holds."
        )
    record = asdict(lineage)
    output.write(json.dumps(record, indent=1) + "\n" if as_json else "\n".join(lineage_lines(path, record)) + "\n")
