"""What a chat reads and where its answers go: a terminal, or pipes.

Nothing but answers is written to the output; notices go to `messages`. prompt_toolkit reads what is typed, and rich
places two answers side by side. On a terminal, control characters of an answer are shown as escapes.
"""

import os
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.input import create_input
from prompt_toolkit.output import create_output
from rich.console import Console
from rich.live import Live
from rich.segment import SegmentLines
from rich.table import Table
from rich.text import Text

from llava_ft.errors import UserError
from llava_ft.terminal import visible

MIN_WIDTH_FOR_COLUMNS: Final = 100
"""Width of a terminal, in characters, from which two answers stand side by side."""

_COLORS: Final = ("cyan", "yellow")


def typed_lines(stdin: TextIO, output: TextIO, messages: TextIO) -> Iterator[str]:
    """Yield what somebody types, line by line, until Ctrl-D. Ctrl-C gives up the line.

    What is typed is shown on `output` if that is the terminal, or else on `messages`.
    """
    session: PromptSession[str] = PromptSession(
        input=create_input(stdin), output=create_output(output if output.isatty() else messages)
    )

    def read(is_first: bool) -> str | None:
        try:
            return session.prompt("> " if is_first else ". ")
        except KeyboardInterrupt:
            messages.write("(Ctrl-D or /exit ends.)\n")
            messages.flush()
            return None

    return _joined(read)


def piped_lines(stdin: TextIO) -> Iterator[str]:
    """Yield the lines of a pipe or file.

    Raises:
        UserError: It is not text in the encoding of the terminal, which is UTF-8 nearly everywhere.
    """

    def read(_: bool) -> str:
        try:
            line = stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(
                f"Standard input is not {error.encoding} ({error.reason}). Convert it to {error.encoding} first."
            ) from None
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    return _joined(read)


def _joined(read: Callable[[bool], str | None]) -> Iterator[str]:
    """Join each line that ends with a backslash with the next one.

    `read` is told whether a question begins, and gives the next line, or None to give up what was typed so far.
    """
    parts: list[str] = []
    while True:
        try:
            line = read(not parts)
        except EOFError:
            break
        if line is None:
            parts = []
        elif line.endswith("\\"):
            parts.append(line[:-1])
        else:
            yield "\n".join([*parts, line])
            parts = []
    if parts:
        yield "\n".join(parts)


def find_typed_path(typed: str) -> str:
    """Return the path that somebody typed, dragged into the terminal or quoted; `~` is the home directory."""
    candidates = [typed]
    try:
        parts = shlex.split(typed)
        candidates += parts if len(parts) == 1 else []
    except ValueError:  # a quotation mark that is part of the name
        pass
    expanded = [os.path.expanduser(candidate) for candidate in candidates]
    return next((path for path in expanded if os.path.exists(path)), expanded[-1])


class Screen:
    """Shows answers to `output` and notices to `messages`.

    Answers come one after the other, with several the name of who answers in front of each. Two stand side by side
    where somebody types and the terminal is wide enough.
    """

    def __init__(self, output: TextIO, messages: TextIO, *, is_interactive: bool = False):
        self._output = output
        self._console = console = Console(file=output, highlight=False)
        self._messages = Console(file=messages, highlight=False)
        is_wide = console.is_terminal and not console.is_dumb_terminal and console.width >= MIN_WIDTH_FOR_COLUMNS
        self._has_columns = is_interactive and is_wide

    def notice(self, text: str) -> None:
        """Say something that is no answer."""
        self._messages.print(Text(visible(text), style="dim"), soft_wrap=True)

    @contextmanager
    def answers(self, names: Sequence[str]) -> Generator[Callable[[int, str], object]]:
        """Show the answers to a question of those who have these names.

        Yields:
            Writes the next piece of the answer of one of them, by number; the first one answers first.
        """
        headings = [Text(visible(name), style=_COLORS[number % 2]) for number, name in enumerate(names)]
        if len(names) == 2 and self._has_columns:
            texts = [Text(overflow="fold") for _ in names]
            table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True)
            for heading in headings:
                table.add_column(heading, ratio=1)
            table.add_row(*texts)
            is_complete = False

            def ends() -> SegmentLines:
                lines = self._console.render_lines(table)  # while they are written, as much of their ends as has room
                return SegmentLines(lines if is_complete else lines[1 - self._console.height :], new_lines=True)

            with Live(get_renderable=ends, console=self._console, refresh_per_second=10):
                try:
                    yield lambda number, text: texts[number].append(visible(text))
                finally:
                    is_complete = True
            return
        shown = 0  # headings

        def write(number: int, text: str) -> None:
            nonlocal shown
            while shown <= number:
                if shown > 0:
                    self._output.write("\n")
                if len(names) > 1:
                    self._console.print(headings[shown], end=": ", soft_wrap=True)
                shown += 1
            self._output.write(visible(text) if self._output.isatty() else text)
            self._output.flush()

        try:
            yield write
        finally:
            write(len(names) - 1, "\n")
