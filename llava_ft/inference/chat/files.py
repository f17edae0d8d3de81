"""What a chat reads and writes besides the model: typed lines, paths as people type them, and saved conversations."""

import importlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from llava_ft.errors import UserError
from llava_ft.inference.chat.dialogue import Dialogue


def typed_lines(stdin: TextIO, output: TextIO, messages: TextIO, prompt: str = "> ") -> Iterator[str]:
    """Yield what somebody types, line by line, until Ctrl-D. Ctrl-C gives up the line.

    Args:
        stdin: The terminal.
        output: Where answers go.
        messages: Gets the prompt if answers go somewhere else.
        prompt: What is written in front of each line.
    """
    has_editing = output.isatty() and stdin is sys.stdin and output is sys.stdout and _load_editing()

    def read(is_first: bool) -> str | None:
        shown = prompt if is_first else "." * (len(prompt) - 1) + " "
        try:
            if has_editing:
                return input(shown)
            messages.write(shown)
            messages.flush()
            line = stdin.readline()
        except KeyboardInterrupt:
            messages.write("\n(Ctrl-D or /exit ends.)\n")
            return None
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    yield from _joined(read)
    messages.write("\n")


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

    yield from _joined(read)


def _joined(read: Callable[[bool], str | None]) -> Iterator[str]:
    """Join each line that ends with a backslash with the next one.

    Args:
        read: Gives the next line, or None to give up what was typed so far. It is told whether a question begins.
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


def _load_editing() -> bool:
    """Give `input` editing keys and a history, which this module brings by being imported."""
    try:
        importlib.import_module("readline")
    except ImportError:
        return False
    return True


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


def save_conversation(path: Path, names: Sequence[str], dialogues: Sequence[Dialogue]) -> Path:
    """Write the conversations of a chat.

    Args:
        path: Where to; must not exist. `.json` gets records of LLaVA's data format with whole paths of the images.
        names: Who answered, for each conversation.
        dialogues: The conversations.

    Raises:
        UserError: The file exists or cannot be written.
    """
    if path.suffix == ".json":
        ids = [path.stem if len(names) == 1 else f"{path.stem}-{name}" for name in names]
        records = [dialogue.record(name) for name, dialogue in zip(ids, dialogues, strict=True)]
        content = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    else:
        content = "\n".join(_as_text(name, dialogue) for name, dialogue in zip(names, dialogues, strict=True))
    try:
        with path.open("x", encoding="utf-8") as opened:
            opened.write(content)
    except FileExistsError:
        raise UserError(f"{path} exists. Choose another name.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Choose another place.") from None
    return path


def _as_text(name: str, dialogue: Dialogue) -> str:
    lines = [] if dialogue.system is None else [f"System: {dialogue.system}", ""]
    for question, answer in dialogue.exchanges:
        lines += [f"Image: {picture.path}" for picture in question.pictures]
        lines += [f"User: {question.text}", f"{name}: {answer}", ""]
    return "\n".join(lines)
