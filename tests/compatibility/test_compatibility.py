"""Every cell of the compatibility table is tried, and the page in `docs/` says what came of it."""

import inspect
import os

import pytest

from llava_ft.errors import UserError
from tests.compatibility import page
from tests.compatibility.cells import COLUMNS, Case
from tests.compatibility.rows import ROWS, Row

pytestmark = pytest.mark.usefixtures("in_recordings")

CELLS = [pytest.param(row, column, id=f"{row.name}-{column}") for row in ROWS for column in COLUMNS]
RESULTS: page.Results = {}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {}


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_cell(
    row: Row,
    column: str,
    cases: dict[str, Case],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
):
    if row.name not in cases:
        cases.clear()  # one row in memory at a time
        folder = tmp_path_factory.mktemp("row")
        cases[row.name] = Case(row.write(folder / "checkpoint"), folder, row.flags, row.own)
    attempt = COLUMNS[column]
    given = [cases[row.name], capsys] if "capsys" in inspect.signature(attempt).parameters else [cases[row.name]]
    if column in row.refused:
        with pytest.raises(UserError, match=row.refused[column].message):
            attempt(*given)
    else:
        attempt(*given)
    RESULTS[row.name, column] = row.refused[column].why if column in row.refused else None


def test_the_page_says_what_was_tried():
    names = [row.name for row in ROWS]
    if os.environ.get("LLAVA_FT_WRITE_PAGES"):
        page.PAGE.write_text(page.render(RESULTS, names, COLUMNS), encoding="utf-8")
    text = page.PAGE.read_text(encoding="utf-8")
    said = page.read(text)
    assert list(said) == [(name, column) for name in names for column in COLUMNS]
    assert {cell: said[cell] for cell in RESULTS} == RESULTS
    assert text == page.render(said, names, COLUMNS)
