"""`docs/reference/compatibility.md`: written from what the tests found, and read again to compare."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Results = dict[tuple[str, str], str | None]
"""For row and column None if it was done, else why it was refused."""

PAGE = Path(__file__).parents[2] / "docs/reference/compatibility.md"
COMMAND = "LLAVA_FT_WRITE_PAGES=1 python -m pytest tests/compatibility -n0"
_DONE = "yes"
_NOTE = re.compile(r"no \[(\d+)\]")

_HEAD = f"""# Which checkpoints can be used for what

Written by the tests: `{COMMAND}`. Each cell was tried on a tiny
checkpoint of that layout, and the result was compared by numbers. `yes` says that it was done and was right, `no` that
it is refused by design, with a message that gives the reason below.

"""
_TAIL = """
Logits and greedy answers are those to one question of text and one about a picture, in float32. They are compared with
a model made of the tensors that ought to be in the files, without reading these. The largest difference allowed is 1e-5
of the largest logit, and 1e-4 after an export to another program's layout. What is read is written by `tests/layouts`
and `tests/compatibility/runs.py`.
"""


def render(results: Results, rows: Iterable[str], columns: Mapping[str, Callable[..., None]]) -> str:
    """Return the page.

    Args:
        results: What came of each cell.
        rows: Names of the rows.
        columns: Names of the columns, each with the function that tries it and says in its first words what it does.
    """
    reasons = list(dict.fromkeys(why for why in results.values() if why is not None))
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for row in rows:
        cells = [results[row, column] for column in columns]
        written = [_DONE if why is None else f"no [{reasons.index(why) + 1}]" for why in cells]
        lines.append(f"| {row} | {' | '.join(written)} |")
    lines += ["", *(f"{number}. {why}" for number, why in enumerate(reasons, start=1))]
    lines += ["", "| column | what was done, and what had to hold |", "| --- | --- |"]
    lines += [f"| {name} | {' '.join((inspect.getdoc(attempt) or '').split())} |" for name, attempt in columns.items()]
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def read(text: str) -> Results:
    """Return what the page says of each cell."""
    table, notes, *_ = text.removeprefix(_HEAD).split("\n\n")
    reasons = dict(note.split(". ", 1) for note in notes.splitlines())
    columns, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return {
        (row[0], column): None if cell == _DONE else reasons[_number(cell)]
        for row in rows
        for column, cell in zip(columns[1:], row[1:], strict=True)
    }


def _number(cell: str) -> str:
    match = _NOTE.fullmatch(cell)
    assert match is not None, cell
    return match[1]
