"""What a chat reads and where its answers go: a terminal, or pipes.

Nothing but answers is written to the output; notices go to `messages`. prompt_toolkit reads what is typed, and rich
places two answers side by side. On a terminal, control characters of an answer are shown as escapes.
"""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.input import create_input
from prompt_toolkit.output import create_output
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llava_ft.errors import UserError
from llava_ft.terminal import visible

MIN_WIDTH_FOR_COLUMNS: Final = 100
"""Width of a terminal, in characters, from which two answers stand side by side."""

_COLORS: Final = ("cyan", "yellow")


def typed_lines(stdin: TextIO, output: TextIO, messages: TextIO, prompt: str = "> ") -> Iterator[str]:
    """Yield what somebody types, line by line, until Ctrl-D. Ctrl-C gives up the line.

    What is typed is shown on `output` if that is the terminal, or else on `messages`.
    """
    session: PromptSession[str] = PromptSession(
        input=create_input(stdin), output=create_output(output if output.isatty() else messages)
    )

    def read(is_first: bool) -> str | None:
        try:
            return session.prompt(prompt if is_first else "." * (len(prompt) - 1) + " ")
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
    """Shows answers one after the other, each ended by a line break; with several, its name stands in front of each."""

    def __init__(self, output: TextIO, messages: TextIO):
        self._output = output
        self._console = Console(file=output, highlight=False)
        self._messages = Console(file=messages, highlight=False)
        self._names: Sequence[str] = ()
        self._voice = -1

    def begin(self, names: Sequence[str]) -> None:
        """Begin the answers to a question, of those who have these names."""
        self._names = names
        self._voice = -1

    def write(self, voice: int, text: str) -> None:
        """Write the next piece of the answer of one of them; the first one answers first."""
        self._go_to(voice)
        self._put(visible(text) if self._output.isatty() else text)

    def end(self) -> None:
        """End the answers to a question."""
        self._go_to(len(self._names) - 1)
        self._put("\n")

    def notice(self, text: str) -> None:
        """Say something that is no answer."""
        self._messages.print(Text(visible(text), style="dim"), soft_wrap=True)

    def _go_to(self, voice: int) -> None:
        while self._voice < voice:
            if self._voice >= 0:
                self._put("\n")
            self._voice += 1
            if len(self._names) > 1:
                self._console.print(_heading(self._names, self._voice), end=": ", soft_wrap=True)

    def _put(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()


class ColumnScreen(Screen):
    """Shows two answers side by side on a terminal: while they are written as much of their ends as has room."""

    def begin(self, names: Sequence[str]) -> None:
        """See `Screen`."""
        super().begin(names)
        self._answers = [Text(overflow="fold") for _ in names]
        self._is_complete = False
        self._live = Live(self, console=self._console, refresh_per_second=10)
        self._live.start()

    def write(self, voice: int, text: str) -> None:
        """See `Screen`."""
        self._answers[voice].append(visible(text))

    def end(self) -> None:
        """See `Screen`."""
        self._is_complete = True
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Place the names and the answers in columns."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True)
        for voice in range(len(self._names)):
            table.add_column(_heading(self._names, voice), ratio=1)
        table.add_row(*self._answers)
        lines = console.render_lines(table, options, new_lines=True)
        for line in lines if self._is_complete else lines[1 - console.height :]:
            yield from line


def _heading(names: Sequence[str], voice: int) -> Text:
    return Text(visible(names[voice]), style=_COLORS[voice % 2])


def choose_screen(output: TextIO, messages: TextIO, *, num_voices: int, is_interactive: bool) -> Screen:
    """Choose how answers are shown: two in columns, where somebody types and the terminal is wide enough."""
    console = Console(file=output)
    has_columns = console.is_terminal and not console.is_dumb_terminal and console.width >= MIN_WIDTH_FOR_COLUMNS
    return (ColumnScreen if is_interactive and num_voices == 2 and has_columns else Screen)(output, messages)
