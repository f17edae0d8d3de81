"""Records of a `.json` file (one list) or a `.jsonl` file (one record a line), in bounded memory.

A first pass over the file checks that all of it is JSON and notes at which byte each record starts. After it any
process can read any part of the file alone. No pass holds more than a few megabytes, or the longest record.

Why no library: those that read a list in pieces (ijson) give no offsets, the fast ones (simdjson, orjson, msgspec)
want the whole file in memory, and Arrow's reader wants lines of one schema. So the decoder of the standard library runs
over a window of the file; it is written in C and says where a value ends.
"""

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import pairwise
from json import JSONDecodeError
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import numpy as np

from llava_ft.data.sources.base import Array, IndexedSource
from llava_ft.errors import UserError

_LINES_SUFFIXES: Final = (".jsonl", ".ndjson")
_BLOCK_BYTES: Final = 1 << 22
_CHUNK_BYTES: Final = 1 << 22
_BOM: Final = b"\xef\xbb\xbf"
_BLANK: Final = re.compile(r"[ \t\n\r]*")
_MAX_CUT: Final = 16
"""Longest piece that can be cut off a JSON value without leaving an open string: `-Infinity`, two `\\uXXXX`."""

_decoder = json.JSONDecoder()


class JsonSource(IndexedSource):
    """Files of records. A suffix other than `.jsonl` and `.ndjson` means one JSON list."""

    def __init__(self, name: str, files: Sequence[Path], image_folder: str | None = None):
        super().__init__(name, files, image_folder)
        self._has_lines = [file.suffix.lower() in _LINES_SUFFIXES for file in self.files]
        kinds = hashlib.blake2b(bytes(self._has_lines), digest_size=4).hexdigest()  # of the files, in their order
        self.index_kind = f"json-{kinds}-2"
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """Give the hash of the files' content."""
        if not self._fingerprint:
            digests: list[str] = []
            for place in range(len(self.files)):
                with self._open(place) as file:
                    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
                digests.append(digest.hexdigest())
            several = hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()
            self._fingerprint = digests[0] if len(digests) == 1 else several
        return self._fingerprint

    def _read_file(self, place: int, file: BinaryIO, records: range) -> Iterator[object]:
        offsets = self._array("offsets")[place:]  # each file before this one has an end more than it has records
        start, stop = records.start, records.stop
        while start < stop:
            first = int(offsets[start])
            end = int(np.searchsorted(offsets[start : stop + 1], first + _BLOCK_BYTES, side="right")) - 1 + start
            end = max(end, start + 1)
            file.seek(first)
            block = file.read(int(offsets[end]) - first)
            bounds: list[int] = (offsets[start : end + 1] - first).tolist()
            for left, right in pairwise(bounds):
                yield _decoder.raw_decode(block[left:right].decode("utf-8"))[0]
            start = end

    def _find_records(self) -> dict[str, Array]:
        offsets, file_ends = array("q"), [0]
        for place, path in enumerate(self.files):
            with self._open(place) as file:
                found = scan_lines(file, path) if self._has_lines[place] else scan_list(file, path)
            if len(found) == 1:
                raise UserError(f"Data file {path} holds no record. It needs at least one.")
            offsets += found
            file_ends.append(file_ends[-1] + len(found) - 1)
        return {"offsets": np.asarray(offsets, dtype=np.int64), "file_ends": np.array(file_ends)}


def scan_lines(file: BufferedReader, path: Path) -> "array[int]":
    """Find the records of a file that holds one JSON value a line; blank lines are passed over.

    Returns:
        The offset of each record in bytes, and that of the end of the file.

    Raises:
        UserError: The file is empty, not UTF-8, or a line of it is not JSON.
    """
    if file.peek(1).removeprefix(_BOM).lstrip().startswith(b"["):
        raise UserError(f"Data file {path} holds one JSON list, not one record a line. Name it .json.")
    offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(offset)
    offsets = array("q")
    # Lines end at line feeds alone: strings may hold any other line break as it is.
    for number, line in enumerate(file, start=1):
        try:
            if line.strip():
                json.loads(line.removesuffix(b"\n").decode("utf-8"))
                offsets.append(offset)
        except UnicodeDecodeError as error:
            _refuse_encoding(path, offset + error.start)
        except (ValueError, RecursionError) as error:
            where = f"{error.msg} at column {error.colno}" if isinstance(error, JSONDecodeError) else error
            raise UserError(f"Data file {path}, line {number}: not valid JSON: {where}.") from None
        offset += len(line)
    if not offsets:
        raise UserError(f"Data file {path} is empty. It needs at least one record.")
    offsets.append(offset)
    return offsets


def scan_list(file: BinaryIO, path: Path) -> "array[int]":
    """Do the same for a file that holds one JSON list; the last offset is the end of the last record."""
    window = _Window(file, path)
    mark = window.next_mark()
    if not mark:
        raise UserError(f"Data file {path} is empty. It needs at least one record.")
    if mark != "[":
        raise UserError(
            f"Data file {path} begins with {mark!r}, so it does not hold a list of records. Put the records into one "
            "JSON list; if it holds one record a line, name it .jsonl."
        )
    window.position += 1
    mark = window.next_mark()
    offsets = array("q", [window.offset])
    while mark != "]":
        window.skip_value()
        end = window.offset
        mark = window.next_mark()
        if mark not in (",", "]"):
            window.refuse("Expecting ',' delimiter", window.offset)
        if mark == ",":
            comma = window.offset
            window.position += 1
            if window.next_mark() == "]":
                window.refuse("No record follows this comma", comma)
        offsets.append(window.offset if mark == "," else end)
    window.position += 1
    if window.next_mark():
        window.refuse("Extra data", window.offset)
    return offsets


class _Window:
    """The part of the file that is being looked at.

    It is decoded as Latin-1: one character a byte, so that positions in the text are offsets in the file.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.text = ""
        self.position = 0  # where in `text` the next thing is
        self._path = path
        self._file = file
        self._start = 0
        self._at_end = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._fill()
        if self.text.startswith(_BOM.decode("latin-1")):
            self.position = len(_BOM)

    @property
    def offset(self) -> int:
        """Offset of the next thing in the file, in bytes."""
        return self._start + self.position

    def _fill(self) -> None:
        """Forget what is done with and read on; a window that is still full grows to twice its size."""
        kept = self.text[self.position :]
        self._start += self.position
        self.position = 0
        chunk = self._file.read(max(_CHUNK_BYTES, len(kept)))
        self._at_end = not chunk
        try:
            self._utf8.decode(chunk, final=self._at_end)
        except UnicodeDecodeError as error:
            _refuse_encoding(self._path, self._file.tell() - len(error.object) + error.start)
        self.text = kept + chunk.decode("latin-1")

    def next_mark(self) -> str:
        """Go to the next character that is not white space, and give it; "" at the end of the file."""
        while True:
            found = _BLANK.match(self.text, self.position)
            assert found is not None
            self.position = found.end()
            if self.position < len(self.text) or self._at_end:
                return self.text[self.position : self.position + 1]
            self._fill()

    def skip_value(self) -> None:
        """Go behind the next value, or refuse it."""
        while True:
            try:
                end = _decoder.raw_decode(self.text, self.position)[1]
                if self._at_end or end < len(self.text) - _MAX_CUT:
                    self.position = end
                    return
            except JSONDecodeError as error:
                # A fault can come from the window's end alone, and reading on may heal it.
                may_be_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _MAX_CUT
                if self._at_end or not may_be_cut:
                    self.refuse(error.msg, self._start + error.pos)
            except (ValueError, RecursionError) as error:
                raise UserError(f"Data file {self._path} cannot be read as JSON: {error}.") from None
            self._fill()

    def refuse(self, problem: str, offset: int) -> NoReturn:
        """Raise the error for what is wrong at an offset."""
        is_last = offset - self._start >= len(self.text.rstrip()) - 1 or problem.startswith("Unterminated")
        is_cut = self._at_end and is_last and problem.startswith(("Expecting", "Unterminated"))
        line, column = 1, 1  # in characters up to the offset
        with self._path.open("rb") as file:
            if file.read(len(_BOM)) != _BOM:
                file.seek(0)
            while piece := file.readline(min(_CHUNK_BYTES, offset - file.tell())):
                column += int(np.count_nonzero(np.frombuffer(piece, np.uint8) & 0xC0 != 0x80))
                if piece.endswith(b"\n"):
                    line, column = line + 1, 1
        raise UserError(
            f"Data file {self._path} is not valid JSON (line {line}, column {column}): {problem}."
            + " It looks truncated." * is_cut
        ) from None


def _refuse_encoding(path: Path, offset: int) -> NoReturn:
    raise UserError(f"Data file {path} is not UTF-8 text (byte {offset}). Save it as UTF-8.") from None
