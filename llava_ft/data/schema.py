r"""From a data file to samples: the only place that knows how a record is written.

A record is one conversation about any number of images, in the format of LLaVA:

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                    {"from": "gpt", "value": "A hat."}]}

`docs/data_format.md` describes every variation that is accepted. What is not accepted raises; nothing is
repaired silently.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final, Literal, NoReturn, TypeGuard, cast

from llava_ft.errors import BadSampleError, UserError

Role = Literal["human", "gpt"]

_ROLE_HINTS: Final = {"user": "human", "assistant": "gpt", "model": "gpt", "bot": "gpt", "chatgpt": "gpt"}
_SHOWN_CHARACTERS: Final = 60
"""How much of a wrong value an error message repeats."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says once.

    Attributes:
        role: Which side.
        text: What it says.
        weight: 0 takes an assistant's turn out of what is learnt, 1 leaves it in.
    """

    role: Role
    text: str
    weight: Literal[0, 1] = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One checked record.

    Attributes:
        index: Position in the data set, counted from 0.
        id: The record's own `id` as text, "" when it has none.
        turns: At least one, the roles alternating; an assistant's turn may come first.
        images: Paths as written in the record, in the order of their placeholders.
        system: Text of a leading system turn, None when the record has none.
    """

    index: int
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    system: str | None = None


def load_records(path: str | Path) -> list[object]:
    """Read the raw records of a `.json` file (one list) or a `.jsonl` file (one record a line).

    Blank lines of a `.jsonl` file are passed over. The records themselves are not checked here.

    Raises:
        UserError: The file is missing, unreadable, not UTF-8, not JSON, not a list, or empty.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"Data file {path} is a folder. Give the .json or .jsonl file itself (--data_path).")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"Data file {path} does not exist. Check --data_path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"Data file {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"Data file {path} cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise UserError(f"Data file {path} is empty. It needs at least one record.")
    records = _parse_lines(text, path) if path.suffix.lower() in (".jsonl", ".ndjson") else _parse_list(text, path)
    if not records:
        raise UserError(f"Data file {path} holds no record. It needs at least one.")
    return records


def _parse_list(text: str, path: Path) -> list[object]:
    try:
        value: object = json.loads(text)
    except JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data" and _is_json(text.splitlines()[0]):
            hint = " If it holds one record a line, name it .jsonl."
        elif error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - 1:
            hint = " It looks truncated."
        raise UserError(
            f"Data file {path} is not valid JSON (line {error.lineno}, column {error.colno}): {error.msg}.{hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"Data file {path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, list):
        raise UserError(
            f"Data file {path} holds {_kind_of(value)}, not a list of records. "
            "Put the records into one JSON list, or one a line into a .jsonl file."
        )
    return cast("list[object]", value)


def _parse_lines(text: str, path: Path) -> list[object]:
    records: list[object] = []
    # str.splitlines also splits at characters such as U+2028, which JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            where = f"{error.msg} at column {error.colno}" if isinstance(error, JSONDecodeError) else error
            hint = " If it holds one JSON list, name it .json." if line.lstrip().startswith("[") else ""
            raise UserError(f"Data file {path}, line {number}: not valid JSON: {where}.{hint}") from None
    if len(records) == 1 and isinstance(records[0], list):
        raise UserError(f"Data file {path} holds one JSON list, not one record a line. Name it .json.")
    return records


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def parse_record(record: object, index: int) -> Sample:
    """Check one raw record and give it its type.

    Whether placeholders and images fit each other is left to the tokenisation, which knows the template.

    Args:
        record: What the file holds at this position.
        index: The position, for messages.

    Raises:
        BadSampleError: The record cannot be used. Kinds: "not-an-object", "bad-id", "bad-image",
            "missing-conversations", "bad-conversations", "empty-conversation", "bad-turn", "unknown-role",
            "roles-not-alternating", "misplaced-system", "no-human-turn", "bad-text".
    """
    if not _is_mapping(record):
        raise BadSampleError(
            index,
            "",
            "not-an-object",
            f"the record is {_kind_of(record)}, not an object with 'conversations'.",
        )
    sample_id = _parse_id(record.get("id"), index)
    parser = _RecordParser(index, sample_id)
    images = parser.parse_images(record)
    turns, system = parser.parse_turns(record)
    return Sample(index, sample_id, turns, images, system)


def _parse_id(value: object, index: int) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadSampleError(
            index, "", "bad-id", f"'id' is {_kind_of(value)}. Give a string or a number, or leave it out."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise BadSampleError(index, "", "bad-id", f"'id' is {value}, which is not a finite number.")
    return str(value)


@dataclass(frozen=True, slots=True)
class _RecordParser:
    """Checks the parts of one record; its position and id are in every message."""

    index: int
    sample_id: str

    def fail(self, kind: str, reason: str) -> NoReturn:
        raise BadSampleError(self.index, self.sample_id, kind, reason)

    def parse_images(self, record: Mapping[str, object]) -> tuple[str, ...]:
        value = record.get("image")
        if value is None:
            return ()
        paths = list(value) if _is_list(value) else [value]
        for position, path in enumerate(paths):
            where = f"'image'[{position}]" if _is_list(value) else "'image'"
            if not isinstance(path, str):
                self.fail("bad-image", f"{where} is {_kind_of(path)}. Give the path of a file as a string.")
            if not path.strip():
                self.fail("bad-image", f"{where} is an empty path. For a record without image leave it out.")
            if "\0" in path or PurePosixPath(path).name in ("", "..") or PureWindowsPath(path).name == "":
                self.fail("bad-image", f"{where} is {_shown(path)}, which does not name a file.")
            self.check_text(path, where, "bad-image")
        return tuple(cast("list[str]", paths))

    def parse_turns(self, record: Mapping[str, object]) -> tuple[tuple[Turn, ...], str | None]:
        if "conversations" not in record:
            known = ", ".join(sorted(str(key) for key in record)[:8]) or "none"
            self.fail("missing-conversations", f"there is no 'conversations' (keys found: {known}).")
        value = record["conversations"]
        if not _is_list(value):
            self.fail("bad-conversations", f"'conversations' is {_kind_of(value)}, not a list of turns.")
        if not value:
            self.fail("empty-conversation", "'conversations' is an empty list. It needs at least one question.")
        turns: list[Turn] = []
        system: str | None = None
        for position, item in enumerate(value):
            role, text = self.parse_turn(item, position)
            if role == "system":
                if position:
                    self.fail("misplaced-system", f"turn {position} is a 'system' turn; only the first may be.")
                system = text
                continue
            if turns and turns[-1].role == role:
                self.fail(
                    "roles-not-alternating",
                    f"turns {position - 1} and {position} are both from {role!r}. Questions and answers have "
                    "to alternate; join the two or leave one out.",
                )
            turns.append(Turn(role, text))
        if not any(turn.role == "human" for turn in turns):
            self.fail("no-human-turn", "no turn is from 'human'. A conversation needs a question.")
        return tuple(turns), system

    def parse_turn(self, item: object, position: int) -> tuple[Literal["human", "gpt", "system"], str]:
        where = f"turn {position}"
        if not _is_mapping(item):
            self.fail("bad-turn", f"{where} is {_kind_of(item)}, not an object with 'from' and 'value'.")
        missing = [key for key in ("from", "value") if key not in item]
        if missing:
            self.fail("bad-turn", f"{where} has no {missing[0]!r}. Each turn needs 'from' and 'value'.")
        role, text = item["from"], item["value"]
        if role not in ("human", "gpt", "system"):
            shown = _shown(role) if isinstance(role, str) else _kind_of(role)
            lowered = role.strip().lower() if isinstance(role, str) else ""
            meant = lowered if lowered in ("human", "gpt", "system") else _ROLE_HINTS.get(lowered)
            hint = f" Write {meant!r}." if meant else ""
            self.fail("unknown-role", f"{where} is from {shown}; allowed are 'human', 'gpt', 'system'.{hint}")
        if not isinstance(text, str):
            self.fail("bad-text", f"the 'value' of {where} is {_kind_of(text)}, not a string.")
        self.check_text(text, f"the 'value' of {where}", "bad-text")
        return role, text

    def check_text(self, text: str, where: str, kind: str) -> None:
        """Refuse half a surrogate pair, such as a lone escape `ud83d`: no tokenizer can encode it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(
                kind,
                f"{where} holds half of a character (a lone surrogate) at position {error.start}. "
                "Write the whole character.",
            )


def _is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, (list, tuple))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _kind_of(value: object) -> str:
    """Name a JSON value's type for a message, with the value itself where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {_shown(value)}"
    if _is_list(value):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"
