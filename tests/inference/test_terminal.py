"""What is shown of a chat: in columns, in a pipe, to somebody who types."""

import io
import shutil
import sys
import time
from pathlib import Path

import pytest

from llava_ft import cli
from llava_ft.inference import console
from llava_ft.inference.console import Screen
from llava_ft.inference.load import load_model
from llava_ft.inference.responder import Sampling
from llava_ft.inference.voices import base_and_trained, single_voice
from llava_ft.terminal import visible
from tests.conftest import RECORDINGS
from tests.inference.terminal import PaintedScreen, Typist
from tests.inference.typed_chat import LANDSCAPE, LORA, Typed

pytestmark = pytest.mark.usefixtures("in_recordings")

PROMPT = "\x1b[?2004h"
"""What prompt_toolkit begins each prompt with: pasted text is to be marked as such."""


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A screen of 44 columns and 10 rows, which is wide enough for two answers."""
    monkeypatch.setattr(console, "MIN_WIDTH_FOR_COLUMNS", 40)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "44", "LINES": "10"}.items():
        monkeypatch.setenv(name, value)
    return Screen(io.StringIO(), io.StringIO(), is_interactive=True)


def painted(screen: Screen) -> list[str]:
    """What a screen shows."""
    terminal = PaintedScreen(44, 10)
    terminal.feed(screen._output.getvalue())
    return terminal.text()


def wait_until_shown(screen: Screen, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in screen._output.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_answers_stand_side_by_side(narrow: Screen):
    with narrow.answers(["base", "adapter"]) as write:
        for piece in ("It is a small", " red", " hou", "se by the sea.\nYes."):
            write(0, piece)
        wait_until_shown(narrow, "Yes.")
        for piece in ("A", " house.\x1b[2J"):
            write(1, piece)
    with narrow.answers(["base", "adapter"]) as write:
        write(1, "漢字かな" * 6)
    assert painted(narrow) == [
        "base                  adapter",
        "It is a small red     A house.\\x1b[2J",
        "house by the sea.",
        "Yes.",
        "base                  adapter",
        "                      漢字かな漢字かな漢字か",  # a wide character takes two columns
        "                      な漢字かな漢字かな漢字",
        "                      かな",
        "",
    ]


def test_answers_longer_than_the_screen_show_their_ends_and_then_all(narrow: Screen):
    with narrow.answers(["base", "adapter"]) as write:
        write(0, "\n".join(f"left {number}" for number in range(20)))
        wait_until_shown(narrow, "left 19")
        assert painted(narrow)[-1] == "left 19"
        write(1, "\n".join(f"right {number}" for number in range(22)))
    lines = painted(narrow)
    assert lines[:2] == ["base                  adapter", "left 0                right 0"]
    assert lines[20] == "left 19               right 19"
    assert lines[22] == "                      right 21"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_interactive", [True, False])
def test_nothing_in_an_answer_steers_a_terminal(is_interactive: bool):
    output, messages = _Terminal(), _Terminal()
    screen = Screen(output, messages, is_interactive=is_interactive)
    with screen.answers(["model"]) as write:
        write(0, "a\x1b[2Jb\x07\x9b")
    screen.notice("name\x1b]0;title\x07")
    assert output.getvalue() == "a\\x1b[2Jb\\x07\\x9b\n"
    assert "name\\x1b]0;title\\x07" in messages.getvalue()


def test_a_pipe_gets_an_answer_as_it_is():
    output = io.StringIO()
    with Screen(output, io.StringIO(), is_interactive=True).answers(["model"]) as write:
        write(0, "a [bold]b[/bold]\x1b " + "long " * 40)
    assert output.getvalue() == "a [bold]b[/bold]\x1b " + "long " * 40 + "\n"


def run(lines: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return cli.main(["chat", "--model-path", "ckpt/llava15-tiny", "--max-new-tokens", "6", *arguments])


def test_a_pipe_gets_answers_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("What is this?\nAnd why?\n", ["--image-file", LANDSCAPE], monkeypatch) == 0
    printed = capsys.readouterr()
    loaded = load_model("ckpt/llava15-tiny")
    expected = Typed([single_voice(loaded, "model", None)], Sampling(max_new_tokens=6))
    assert printed.out.split("\n")[:-1] == expected.take(f"/image {LANDSCAPE}", "What is this?", "And why?")
    assert "cut after 6 tokens" in printed.err


def test_a_pipe_ends_at_the_first_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("Hello\n/image nowhere.png\nAnd why?\n", [], monkeypatch) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "Image 'nowhere.png' does not exist" in printed.err


def test_two_models_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("Hello\n", ["--compare-with", "ckpt/llava15-tiny-imse"], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["ckpt/llava15-tiny", "ckpt/llava15-tiny-imse"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "--compare needs an adapter, and ckpt/llava15-tiny is a whole model"),
        (["--compare", "--compare-with", "x"], "--compare and --compare-with exclude each other"),
        (["--compare-with-base", "x"], "--compare-with-base is the base of the model that --compare-with names"),
        (["--conv-mode", "v9"], "Unknown conversation template 'v9'"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--image-file", "nowhere.png"], "Image 'nowhere.png' does not exist"),
    ],
)
def test_wrong_requests_are_refused_before_weights_are_read(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run("Hello\n", arguments, monkeypatch) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Weights:" not in printed.err


def test_somebody_types(tmp_path: Path):
    arguments = ["chat", "--model-path", "ckpt/llava15-tiny", "--max-new-tokens", "1500"]
    shutil.copy(LANDSCAPE, tmp_path / "two words.jpg")
    with Typist(arguments, RECORDINGS, NO_COLOR="1") as terminal:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for(PROMPT)
        terminal.type("\n/image nowhere.png\n")
        terminal.wait_for("does not exist")
        terminal.type("/image README.md\n")
        terminal.wait_for("is not an image")
        terminal.type(f"/image '{tmp_path}/two words.jpg'\n")
        terminal.wait_for(f"Images: {tmp_path}/two words.jpg.")
        terminal.wait_for(PROMPT)
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.press_ctrl_c()
        terminal.wait_for("Ctrl-D or /exit ends.")
        terminal.wait_for(PROMPT)
        terminal.type("What is this?\n")
        terminal.wait_for("\x1b[?2004l")  # the prompt has ended, and Ctrl-C is no key any more
        terminal.wait_for_more()
        terminal.press_ctrl_c()
        terminal.press_ctrl_c()
        terminal.wait_for("Stopped. ")
        terminal.wait_for(PROMPT)
        terminal.type("/clear\n")
        terminal.wait_for(PROMPT)
        terminal.type("/undo\n/retry\n")
        terminal.wait_for("Nothing has been asked yet")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.end() == 0


def test_answers_stand_in_columns_on_a_wide_terminal():
    arguments = ["chat", "--model-path", LORA, "--compare", "--max-new-tokens", "24"]
    with Typist(arguments, RECORDINGS, NO_COLOR="1", COLUMNS="120", LINES="30") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("Hello\n")
        terminal.wait_for("Hello")
        terminal.wait_for("\x1b[?25l")  # where rich begins
        written = terminal.wait_for("\x1b[?25h")
        terminal.type("/exit\n")
        assert terminal.end() == 0
    screen = PaintedScreen(120, 30)
    screen.feed(written)
    lines = screen.text()
    assert lines[0].split() == ["base", "adapter"]
    pipe = Typed(base_and_trained(load_model(LORA, adapter="beside"), None), Sampling(max_new_tokens=24)).take("Hello")
    for column, answer in zip((slice(0, 59), slice(60, 120)), pipe, strict=True):
        shown = "".join(line[column] for line in lines[1:-1])
        assert shown.replace(" ", "") == visible(answer.split(": ", 1)[1]).replace(" ", "")
