"""Who says what on the terminal: this program and its libraries, on the first rank and on the others."""

import io
import logging
import warnings
from collections.abc import Iterator

import pytest

from llava_ft.training.log_setup import LIBRARIES, adopt_libraries, set_up_ranks

OWN = "llava_ft.training.somewhere"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the root logger writes, as the command line sets it up."""
    # pytest's own handlers, which it adds again for the test itself, so that they are set up as well
    looks = [(given, list(given.filters), given.formatter) for given in logging.getLogger().handlers]
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(message)s"))
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr("sys.warnoptions", [])
    for library in map(logging.getLogger, LIBRARIES):
        for name in ("handlers", "propagate", "level"):
            monkeypatch.setattr(library, name, getattr(library, name))
        monkeypatch.setattr(library, "handlers", list(library.handlers))
    yield text
    logging.captureWarnings(False)
    for given, filters, formatter in looks:
        given.filters[:] = filters
        given.setFormatter(formatter)


def say(name: str) -> None:
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), level)(f"{name.split('.')[0]} {level}")


@pytest.mark.parametrize(
    ("rank", "levels", "heard"),
    [
        (0, {}, ["llava_ft info", "llava_ft warning", "llava_ft error", "library warning", "library error"]),
        (3, {}, ["[rank 3] llava_ft warning", "[rank 3] llava_ft error", "[rank 3] library error"]),
        (0, {"log_level": "passive"}, ["llava_ft info", "llava_ft warning", "llava_ft error"]),
        (0, {"log_level": "error"}, ["llava_ft error", "library error"]),
        (0, {"log_level": "info"}, ["llava_ft info", "library info", "library warning"]),
        (0, {"log_level_replica": "debug"}, ["llava_ft info"]),
        (1, {"log_level": "debug"}, ["[rank 1] llava_ft warning", "[rank 1] library error"]),
        (1, {"log_level_replica": "info"}, ["[rank 1] llava_ft info", "[rank 1] library info"]),
    ],
)
def test_levels(rank: int, levels: dict[str, str], heard: list[str], terminal: io.StringIO):
    set_up_ranks(rank, **levels)
    say(OWN)
    say("library.part")
    said = terminal.getvalue().splitlines()
    assert set(heard) <= set(said)
    lowest = levels.get("log_level" if rank == 0 else "log_level_replica", "passive")
    if lowest == "error":
        assert said == heard
    if lowest != "debug":
        assert not [line for line in said if line.endswith("debug")]
    if lowest == "passive":
        assert not [line for line in said if line.endswith("library info")]
        assert (rank == 0) == any(line.endswith("library warning") for line in said)


def test_the_second_call_replaces_the_first(terminal: io.StringIO):
    set_up_ranks(0)
    set_up_ranks(0, "debug")
    say(OWN)
    say("library")
    assert len(terminal.getvalue().splitlines()) == 8


@pytest.mark.parametrize(("level", "heard"), [(None, False), ("info", True)])
def test_what_nobody_can_act_upon_is_not_said(level: str | None, heard: bool, terminal: io.StringIO):
    set_up_ranks(0, level)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load a kernel")
    with warnings.catch_warnings(record=True) as caught:
        set_up_ranks(0, level)
        warnings.warn("this will change", FutureWarning, stacklevel=1)
        warnings.warn("this is wrong", UserWarning, stacklevel=1)
    assert ("Failed to load a kernel" in terminal.getvalue()) == heard
    assert [str(w.message) for w in caught if w.category is FutureWarning] == (["this will change"] if heard else [])
    assert [w for w in caught if w.category is UserWarning]


def test_warnings_of_other_ranks_are_those_of_the_first(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]):
    set_up_ranks(2)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("said by every rank", UserWarning, stacklevel=1)
    assert "said by every rank" not in terminal.getvalue() + capsys.readouterr().err


def test_libraries_write_nothing_of_their_own(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch):
    own_output = io.StringIO()
    library = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler(own_output)])
    monkeypatch.setattr(library, "propagate", False)
    monkeypatch.setattr(library, "level", logging.INFO)
    set_up_ranks(1)
    adopt_libraries()
    library.info("a line of progress")
    library.warning("something every rank says")
    library.error("something that went wrong here")
    assert terminal.getvalue() == "[rank 1] something that went wrong here\n"
    assert own_output.getvalue() == ""
