"""Every cell of the compatibility table is tried, and the page in `docs/` says what came of it."""

import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_ft.errors import UserError
from tests.compatibility import page
from tests.compatibility.cells import COLUMNS, Case
from tests.compatibility.rows import ROWS, Row

pytestmark = pytest.mark.usefixtures("in_recordings")

NAMES = [row.name for row in ROWS]


@pytest.fixture(scope="module")
def said() -> Iterator[page.Results]:
    """What the page says of each cell; to write the page, what came of each."""
    if not os.environ.get("LLAVA_FT_WRITE_PAGES"):
        yield page.read(page.PAGE.read_text(encoding="utf-8"))
        return
    found: page.Results = {}
    yield found
    in_order = {(name, column): found[name, column] for name in NAMES for column in COLUMNS}
    page.PAGE.write_text(page.render(in_order, NAMES, COLUMNS), encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, said: page.Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    case = Case(row.write(tmp_path / "checkpoint"), tmp_path, row.flags, row.own)
    for column, attempt in COLUMNS.items():
        given = [case, capsys] if "capsys" in inspect.signature(attempt).parameters else [case]
        refusal = row.refused.get(column)
        if refusal is not None:
            with pytest.raises(UserError, match=refusal.message):
                attempt(*given)
        else:
            attempt(*given)
        came = None if refusal is None else refusal.why
        if os.environ.get("LLAVA_FT_WRITE_PAGES"):
            said[row.name, column] = came
        assert said[row.name, column] == came, f"{column}: the page says otherwise"


def test_the_page_is_as_it_is_written():
    text = page.PAGE.read_text(encoding="utf-8")
    said = page.read(text)
    assert list(said) == [(name, column) for name in NAMES for column in COLUMNS]
    assert text == page.render(said, NAMES, COLUMNS)
