"""Finding where the records of a JSON file start, without having the file in memory.

Text is decoded as Latin-1 while a list is scanned: one character a byte, so that positions in the text are offsets in
the file. The decoder of the standard library then finds the end of each record, and everything that is not JSON.
"""

import json
import re
from array import array
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from llava_ft.data.records import kind_of
from llava_ft.errors import UserError

_BOM: Final = b"\xef\xbb\xbf"
_CHUNK_BYTES: Final = 1 << 22
_BLANK: Final = re.compile(r"[ \t\n\r]*")
_MAX_CUT: Final = 16
"""Longest piece that can be cut off a JSON value without leaving an open string: `-Infinity`, two `\\uXXXX`."""

_decoder = json.JSONDecoder()


def decode_value(data: bytes) -> object:
    """Decode the JSON value at the start of `data`; what follows it is passed over."""
    return _decoder.raw_decode(data.decode("utf-8"))[0]


def scan_list(file: BinaryIO, path: Path) -> "array[int]":
    """Find the records of a file that holds one JSON list.

    Args:
        file: The file, open for reading.
        path: Its name, for messages.

    Returns:
        The offset of each record in bytes, and that of the end of the last one.

    Raises:
        UserError: The file is empty, not UTF-8, not JSON or not a list.
    """
    window = _Window(file, path)
    if not window.skip_blank():
        raise UserError(f"Data file {path} is empty. It needs at least one record.")
    if window.character() != "[":
        _refuse_other_value(window)
    offsets = array("q", [window.offset])
    window.advance()
    window.skip_blank()
    offsets[0] = window.offset
    if window.character() == "]":
        window.advance()
    else:
        _scan_items(window, offsets)
    if window.skip_blank():
        window.refuse("Extra data", window.position)
    return offsets


def _scan_items(window: "_Window", offsets: "array[int]") -> None:
    """Append the start of every record after the first and the end of the last; stop behind the closing bracket."""
    while True:
        window.skip_value()
        end = window.offset
        window.skip_blank()
        mark = window.character()
        if mark not in (",", "]"):
            window.refuse("Expecting ',' delimiter", window.position)
        comma = window.offset
        window.advance()
        if mark == "]":
            offsets.append(end)
            return
        window.skip_blank()
        if window.character() == "]":
            window.refuse("No record follows this comma", comma - window.start)
        offsets.append(window.offset)


def _refuse_other_value(window: "_Window") -> NoReturn:
    """Say what a file holds that is not one list. A value of more than a few megabytes is not read to its end."""
    path = window.path
    advice = "Put the records into one JSON list, or one a line into a .jsonl file."
    begins = "an object" if window.character() == "{" else "a value"
    for _ in range(2):
        value, fault = window.try_value()
        if fault is None or window.at_end or not window.may_be_cut(fault):
            break
        window.fill()
    else:
        raise UserError(f"Data file {path} holds {begins}, not a list of records. {advice}")
    if fault is not None:
        window.refuse(fault.msg, fault.pos)
    if window.skip_blank():
        first_line = window.text[: window.position].rstrip()
        hint = "" if "\n" in first_line else " If it holds one record a line, name it .jsonl."
        window.refuse("Extra data", window.position, hint)
    raise UserError(f"Data file {path} holds {kind_of(value)}, not a list of records. {advice}")


class _Window:
    """The part of the file that is being looked at.

    Attributes:
        text: The part, as Latin-1.
        start: Offset of `text` in the file, in bytes.
        position: Where in `text` the next thing is.
        at_end: Whether the file has nothing after `text`.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.path = path
        self.text = ""
        self.start = 0
        self.position = 0
        self.at_end = False
        self._file = file
        self._pending = b""
        self.fill()
        if self.text.startswith(_BOM.decode("latin-1")):
            self.position = len(_BOM)

    @property
    def offset(self) -> int:
        """Offset of the next thing in the file, in bytes."""
        return self.start + self.position

    def fill(self) -> None:
        """Forget what is done with and read on; a window that is still full grows to twice its size."""
        kept = self.text[self.position :]
        self.start += self.position
        self.position = 0
        chunk = self._file.read(max(_CHUNK_BYTES, len(kept)))
        self.at_end = not chunk
        self._check_utf8(chunk)
        self.text = kept + chunk.decode("latin-1")

    def _check_utf8(self, chunk: bytes) -> None:
        data = self._pending + chunk
        try:
            data.decode("utf-8")
            self._pending = b""
        except UnicodeDecodeError as error:
            is_cut = error.reason == "unexpected end of data" and chunk and error.start >= len(data) - 3
            if not is_cut:
                at = self._file.tell() - len(data) + error.start
                raise UserError(f"Data file {self.path} is not UTF-8 text (byte {at}). Save it as UTF-8.") from None
            self._pending = data[error.start :]

    def skip_blank(self) -> bool:
        """Go to the next character that is not white space; False at the end of the file."""
        while True:
            found = _BLANK.match(self.text, self.position)
            assert found is not None
            self.position = found.end()
            if self.position < len(self.text):
                return True
            if self.at_end:
                return False
            self.fill()

    def character(self) -> str:
        """Give the next character, "" at the end of the file. Only valid after `skip_blank`."""
        return self.text[self.position : self.position + 1]

    def advance(self) -> None:
        """Go one character on."""
        self.position += 1

    def skip_value(self) -> None:
        """Go behind the next value.

        Raises:
            UserError: It is not JSON.
        """
        while True:
            before = self.position
            _, fault = self.try_value()
            if fault is None and (self.at_end or self.position < len(self.text) - _MAX_CUT):
                return
            if fault is not None and (self.at_end or not self.may_be_cut(fault)):
                self.refuse(fault.msg, fault.pos)
            self.position = before
            self.fill()

    def try_value(self) -> tuple[object, JSONDecodeError | None]:
        """Decode the next value and go behind it, or say why that is not possible with the text at hand."""
        try:
            value, self.position = _decoder.raw_decode(self.text, self.position)
        except JSONDecodeError as error:
            return None, error
        except (ValueError, RecursionError) as error:
            raise UserError(f"Data file {self.path} cannot be read as JSON: {error}.") from None
        return value, None

    def may_be_cut(self, fault: JSONDecodeError) -> bool:
        """Whether a fault can come from the window's end alone, so that reading on may heal it."""
        return fault.msg.startswith("Unterminated string") or fault.pos >= len(self.text) - _MAX_CUT

    def refuse(self, problem: str, position: int, hint: str = "") -> NoReturn:
        """Raise the error for what is wrong at `position` of the text."""
        if self.at_end and problem.startswith(("Expecting", "Unterminated")):
            is_last = position >= len(self.text.rstrip()) - 1
            hint = " It looks truncated." if is_last or problem.startswith("Unterminated") else hint
        line, column = _line_and_column(self.path, self.start + position)
        raise UserError(
            f"Data file {self.path} is not valid JSON (line {line}, column {column}): {problem}.{hint}"
        ) from None


def _line_and_column(path: Path, offset: int) -> tuple[int, int]:
    """Count lines and characters up to a byte, both from 1."""
    line, column = 1, 1
    with path.open("rb") as file:
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        while (left := offset - file.tell()) > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
            newlines = chunk.count(b"\n")
            if newlines:
                line += newlines
                column = 1
                chunk = chunk[chunk.rindex(b"\n") + 1 :]
            column += sum(byte & 0xC0 != 0x80 for byte in chunk)
    return line, column


def scan_lines(file: BinaryIO, path: Path) -> "array[int]":
    """Find the records of a file that holds one JSON value a line; blank lines are passed over.

    Args:
        file: The file, open for reading.
        path: Its name, for messages.

    Returns:
        The offset of each record in bytes, and that of the end of the file.

    Raises:
        UserError: The file is empty, not UTF-8, or a line of it is not JSON.
    """
    offsets = array("q")
    last: object = None
    end = 0
    for number, (offset, line) in enumerate(_lines(file, path), start=1):
        end = offset + len(line)
        if not line.strip():
            continue
        try:
            last = json.loads(line.removesuffix(b"\n").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"Data file {path} is not UTF-8 text (byte {offset + error.start}). Save it as UTF-8."
            ) from None
        except (ValueError, RecursionError) as error:
            where = f"{error.msg} at column {error.colno}" if isinstance(error, JSONDecodeError) else error
            hint = " If it holds one JSON list, name it .json." if line.lstrip().startswith(b"[") else ""
            raise UserError(f"Data file {path}, line {number}: not valid JSON: {where}.{hint}") from None
        offsets.append(offset)
    if not offsets:
        raise UserError(f"Data file {path} is empty. It needs at least one record.")
    if len(offsets) == 1 and isinstance(last, list):
        _refuse_list(path)
    offsets.append(end)
    return offsets


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Give each line with its offset, cut at line feeds alone: strings may hold any other line break as it is."""
    offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(offset)
    while line := file.readline(_CHUNK_BYTES):
        if not line.endswith(b"\n") and len(line) == _CHUNK_BYTES:
            if not offset and line.lstrip().startswith(b"["):
                _refuse_list(path)
            line += file.readline()
        yield offset, line
        offset += len(line)


def _refuse_list(path: Path) -> NoReturn:
    raise UserError(f"Data file {path} holds one JSON list, not one record a line. Name it .json.")
