"""Where a chat's answers go: into a pipe, one under the other on a terminal, or side by side.

Nothing but answers is written to `output`; notices go to `messages`. On a terminal control characters of an answer are
shown as escapes.
"""

import os
import shutil
import unicodedata
from collections.abc import Sequence
from typing import Final, Protocol, TextIO

from llava_ft.terminal import has_color, visible

MIN_WIDTH_FOR_COLUMNS: Final = 100
"""Width of a terminal, in characters, from which two answers stand side by side."""

_COLORS: Final = ("\x1b[36m", "\x1b[33m")
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
_GAP: Final = " | "


class Screen(Protocol):
    """Shows the answers to one question after the other."""

    def begin(self, names: Sequence[str]) -> None:
        """Begin with the answers of those who have these names."""
        ...

    def write(self, voice: int, text: str) -> None:
        """Write the next piece of the answer of one of them; the first one answers first."""
        ...

    def end(self) -> None:
        """End the answers to a question."""
        ...

    def notice(self, text: str) -> None:
        """Say something that is no answer."""
        ...


class PipeScreen:
    """Answers and nothing else, each ended by a line break; with several, the name stands in front of each."""

    def __init__(self, output: TextIO, messages: TextIO):
        """Set up.

        Args:
            output: Gets the answers.
            messages: Gets the notices.
        """
        self._output = output
        self._messages = messages
        self._names: Sequence[str] = ()
        self._voice = -1

    def begin(self, names: Sequence[str]) -> None:
        """See `Screen`."""
        self._names = names
        self._voice = -1

    def write(self, voice: int, text: str) -> None:
        """See `Screen`."""
        self._go_to(voice)
        self._put(text)

    def end(self) -> None:
        """See `Screen`."""
        self._go_to(len(self._names) - 1)
        self._put("\n")

    def notice(self, text: str) -> None:
        """See `Screen`."""
        self._messages.write(visible(text) + "\n")
        self._messages.flush()

    def _go_to(self, voice: int) -> None:
        while self._voice < voice:
            if self._voice >= 0:
                self._put("\n")
            self._voice += 1
            if len(self._names) > 1:
                self._put(self._heading(self._voice))

    def _heading(self, voice: int) -> str:
        return f"{self._names[voice]}: "

    def _put(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()


class TerminalScreen(PipeScreen):
    """Answers one under the other on a terminal."""

    def __init__(self, output: TextIO, messages: TextIO):
        """See `PipeScreen`."""
        super().__init__(output, messages)
        self._color = has_color(output)

    def write(self, voice: int, text: str) -> None:
        """See `Screen`."""
        super().write(voice, visible(text))

    def notice(self, text: str) -> None:
        """See `Screen`."""
        text = visible(text)
        self._messages.write(f"{_DIM}{text}{_RESET}\n" if has_color(self._messages) else text + "\n")
        self._messages.flush()

    def _heading(self, voice: int) -> str:
        heading = f"{self._names[voice]}:"
        return f"{_COLORS[voice % 2]}{heading}{_RESET} " if self._color else heading + " "


class ColumnScreen(TerminalScreen):
    """Two answers side by side. Rows that have left the screen are not touched again."""

    def __init__(self, output: TextIO, messages: TextIO, size: tuple[int, int] | None = None):
        """Set up.

        Args:
            output: The terminal.
            messages: Gets the notices.
            size: Columns and rows of the terminal; asked for at each question when absent.
        """
        super().__init__(output, messages)
        self._fixed_size = size
        self._height = self._width = 0
        self._lines: list[list[str]] = []
        self._row = 0
        self._num_rows = 0

    def begin(self, names: Sequence[str]) -> None:
        """See `Screen`."""
        columns, self._height = self._fixed_size or tuple(shutil.get_terminal_size())
        self._width = max(10, (columns - 1 - len(_GAP) * (len(names) - 1)) // len(names))
        self._lines = [[""] for _ in names]
        self._row, self._num_rows = 0, 1
        for voice, name in enumerate(names):
            heading = fit(visible(name), self._width)
            self._draw(voice, 0, f"{_COLORS[voice % 2]}{heading}{_RESET}" if self._color else heading)

    def write(self, voice: int, text: str) -> None:
        """See `Screen`."""
        lines = self._lines[voice]
        first = len(lines) - 1
        # What was broken into lines stays so; only the last line can still change.
        lines[first:] = wrap(lines[first] + visible(text), self._width)
        for number in range(first, len(lines)):
            self._draw(voice, number + 1, fit(lines[number], self._width))

    def end(self) -> None:
        """See `Screen`."""
        self._move_to(self._num_rows - 1)
        self._put("\r\n")

    def _draw(self, voice: int, row: int, text: str) -> None:
        if row < self._num_rows - (self._height - 1):
            return  # it has left the screen
        self._move_to(row)
        left = voice * (self._width + len(_GAP)) - len(_GAP)
        self._put("\r" + (f"\x1b[{left}C{_GAP}" if voice else "") + text)

    def _move_to(self, row: int) -> None:
        if row < self._row:
            self._put(f"\x1b[{self._row - row}A")
        below = min(row, self._num_rows - 1) - self._row
        if below > 0:
            self._put(f"\x1b[{below}B")
        if row >= self._num_rows:
            self._put("\r\n" * (row - self._num_rows + 1))
            self._num_rows = row + 1
        self._row = row


def choose_screen(output: TextIO, messages: TextIO, *, num_voices: int, is_interactive: bool) -> Screen:
    """Choose how answers are shown.

    Args:
        output: Gets the answers.
        messages: Gets the notices.
        num_voices: How many answer.
        is_interactive: Whether somebody types the questions.
    """
    if not is_interactive or not output.isatty():
        return PipeScreen(output, messages)
    is_wide = shutil.get_terminal_size().columns >= MIN_WIDTH_FOR_COLUMNS
    if num_voices == 2 and is_wide and os.environ.get("TERM", "dumb") != "dumb":
        return ColumnScreen(output, messages)
    return TerminalScreen(output, messages)


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` columns, between words where that is possible."""
    lines: list[str] = []
    for paragraph in text.expandtabs(4).split("\n"):
        line, used = "", 0
        for word in _words(paragraph):
            if used + display_width(word.rstrip()) > width and line.strip():
                lines.append(line.rstrip())
                line, used, word = "", 0, word.lstrip()
            for character in word:
                columns = display_width(character)
                if used + columns > width and not character.isspace():
                    lines.append(line)
                    line, used = "", 0
                line += character
                used += columns
        lines.append(line.rstrip())
    return lines


def fit(text: str, width: int) -> str:
    """Return a line cut or filled up with blanks to `width` columns."""
    while display_width(text) > width:
        text = text[:-1]
    return text + " " * (width - display_width(text))


def display_width(text: str) -> int:
    """Count the columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _words(text: str) -> list[str]:
    """Split a line into words, each with the blanks in front of it; a wide character ends its word."""
    words = [""]
    for character in text:
        last = words[-1]
        starts_word = character == " " and not last.endswith(" ")
        if last and (starts_word or display_width(character) == 2 or display_width(last[-1]) == 2):
            words.append("")
        words[-1] += character
    return words
