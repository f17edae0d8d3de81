"""A terminal for tests: a screen that understands what programs write, and a program behind a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PIECES = re.compile(r"\x1b\[(?P<number>[?\d;]*)(?P<command>[A-Za-z])|(?P<text>[^\x1b])", re.S)


class PaintedScreen:
    """Rows of characters, painted as a terminal with scrolling does."""

    def __init__(self, columns: int, rows: int):
        self.columns = columns
        self.rows = rows
        self.lines = [[" "] * columns]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for piece in _PIECES.finditer(text):
            if piece["text"] is not None:
                self._put(piece["text"])
                continue
            match piece["command"]:
                case "A":
                    top = max(0, len(self.lines) - self.rows)
                    self.row = max(top, self.row - int(piece["number"] or 1))
                case "K":
                    self.lines[self.row] = [" "] * self.columns
                case "m" | "h" | "l":  # colours, and whether the cursor is seen
                    pass
                case other:
                    raise AssertionError(f"unknown command {other}")

    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0  # as a terminal does with what is written to it
            if self.row == len(self.lines):
                self.lines.append([" "] * self.columns)
        else:
            assert self.column < self.columns, "a line is longer than the terminal is wide"
            self.lines[self.row][self.column] = character
            self.column += 1


class Typist:
    """Runs `llava-ft` behind a pseudo-terminal and types."""

    def __init__(self, arguments: list[str], directory: Path, **environment: str):
        self.seen = ""
        leader, follower = pty.openpty()
        self._terminal = leader
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from llava_ft.cli import main; sys.exit(main())", *arguments],
            cwd=directory,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=os.environ
            | {
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "OMP_NUM_THREADS": "1",
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            }
            | environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(follower)

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def wait_for(self, text: str, *, seconds: float = 120) -> str:
        """Read until `text` appears; returns what was written up to and with it, and forgets that."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            chunk = self._read() if ready else b""
            if not chunk:
                raise AssertionError(f"{text!r} did not come. Seen: {self.seen!r}")
            self.seen += chunk.decode(errors="replace")
        end = self.seen.index(text) + len(text)
        before, self.seen = self.seen[:end], self.seen[end:]
        return before

    def wait_for_more(self, *, seconds: float = 120) -> None:
        """Read until there is something that was not seen yet."""
        if not self.seen:
            ready, _, _ = select.select([self._terminal], [], [], seconds)
            assert ready, "Nothing came."
            self.seen += self._read().decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def press_ctrl_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def end(self, *, seconds: float = 60) -> int:
        """Read until the program ends; returns its exit status."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self._terminal], [], [], 0.2)
            chunk = self._read() if ready else b""
            self.seen += chunk.decode(errors="replace")
            if not chunk and self.process.poll() is not None:
                return self.process.returncode
        raise AssertionError(f"The program has not ended. Seen: {self.seen!r}")

    def _read(self) -> bytes:
        try:
            return os.read(self._terminal, 4096)
        except OSError:  # Linux says so when the program has closed its end
            return b""


def _take_terminal() -> None:
    """Make the pseudo-terminal the one that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
