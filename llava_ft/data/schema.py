"""From a raw record to a sample: the only place that knows how records are written.

A record is one conversation about any number of images. Three forms are told apart by their keys: LLaVA's
`conversations`, the `messages` of OpenAI and Hugging Face, and the `texts` of The Cauldron. `docs/data_format.md`
describes every variation that is accepted. What is not accepted raises; nothing is repaired silently.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import cast

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.messages import ContentReader
from llava_ft.data.record_checks import RecordChecks, is_list, is_mapping, kind_of
from llava_ft.data.record_images import ImageValue, column_images
from llava_ft.data.sample import EMBEDDED, Role, Sample, Turn, embedded_name, parse_embedded
from llava_ft.data.turns import LLAVA, OPENAI, Form, Speaker, TextOf, TurnParser
from llava_ft.errors import BadSampleError, UserError

__all__ = [
    "EMBEDDED",
    "BrokenRecord",
    "Role",
    "Sample",
    "Turn",
    "embedded_name",
    "image_values",
    "load_records",
    "parse_embedded",
    "parse_record",
]


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """Stands in a source for a record that could not even be read, while its neighbours can.

    Attributes:
        id: What the source calls it.
        kind: As in `BadSampleError`.
        reason: As in `BadSampleError`.
    """

    id: str
    kind: str
    reason: str


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
            f"Data file {path} holds {kind_of(value)}, not a list of records. "
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
        record: What the source holds at this position.
        index: The position, for messages and for the names of embedded images.

    Raises:
        BadSampleError: The record cannot be used. Kinds: "not-an-object", "bad-id", "bad-image", "image-is-url",
            "missing-conversations", "bad-conversations", "empty-conversation", "bad-turn", "unknown-role",
            "tool-turn", "roles-not-alternating", "misplaced-system", "no-human-turn", "bad-text", "bad-part",
            "bad-weight", "image-in-answer", "image-in-system", "placeholder-mismatch", those of `BrokenRecord`.
    """
    sample_id, turns, system, values = _parse(record, index)
    images = tuple(
        value if isinstance(value, str) else embedded_name(index, position) for position, value in enumerate(values)
    )
    return Sample(index, sample_id, turns, images, system)


def image_values(record: object, index: int) -> list[ImageValue]:
    """Give the images of a record in the order of `Sample.images`, with the content of those it holds itself.

    Raises:
        BadSampleError: As in `parse_record`.
    """
    return _parse(record, index)[3]


_Parsed = tuple[str, tuple[Turn, ...], str | None, list[ImageValue]]


def _parse(record: object, index: int) -> _Parsed:
    if isinstance(record, BrokenRecord):
        raise BadSampleError(index, record.id, record.kind, record.reason)
    if not is_mapping(record):
        raise BadSampleError(
            index, "", "not-an-object", f"the record is {kind_of(record)}, not an object with 'conversations'."
        )
    sample_id = _parse_id(record.get("id"), index)
    checks = RecordChecks(index, sample_id)
    images = column_images(record, checks)
    form = _form_of(record, checks)
    if form == "texts":
        return sample_id, *_parse_texts(record["texts"], images, checks)
    if form == "messages":
        reader = ContentReader(images, checks)
        turns, system = TurnParser(OPENAI, checks, reader.text_of).parse(record[form])
        return sample_id, turns, system, reader.images()
    turns, system = TurnParser(LLAVA, checks, _string_of(LLAVA.text, checks)).parse(record[form])
    return sample_id, turns, system, images


def _parse_id(value: object, index: int) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadSampleError(
            index, "", "bad-id", f"'id' is {kind_of(value)}. Give a string or a number, or leave it out."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise BadSampleError(index, "", "bad-id", f"'id' is {value}, which is not a finite number.")
    return str(value)


def _form_of(record: Mapping[str, object], checks: RecordChecks) -> str:
    """Name the key that holds the turns; a key without value, as tables have it, counts as absent beside another."""
    present = [key for key in (LLAVA.turns, OPENAI.turns, "texts") if key in record]
    given = [key for key in present if record[key] is not None]
    if len(given) > 1:
        checks.fail(
            "bad-conversations", f"it has both {given[0]!r} and {given[1]!r}. Leave in the one that is to be learnt."
        )
    if not present:
        known = ", ".join(sorted(str(key) for key in record)[:8]) or "none"
        checks.fail(
            "missing-conversations",
            f"there is no 'conversations' (keys found: {known}). The turns of a record stand there, or under "
            "'messages' or 'texts'.",
        )
    return given[0] if given else present[0]


def _string_of(key: str, checks: RecordChecks) -> TextOf:
    def text_of(value: object, speaker: Speaker, where: str) -> str:
        del speaker
        if not isinstance(value, str):
            checks.fail("bad-text", f"the {key!r} of {where} is {kind_of(value)}, not a string.")
        checks.check_text(value, f"the {key!r} of {where}", "bad-text")
        return value

    return text_of


def _parse_texts(
    value: object, images: list[ImageValue], checks: RecordChecks
) -> tuple[tuple[Turn, ...], str | None, list[ImageValue]]:
    """Read pairs of `user` and `assistant`; images without placeholders stand before the first question."""
    turns: object = value
    if is_list(value):
        pairs: list[object] = []
        for position, pair in enumerate(value):
            if not is_mapping(pair) or "user" not in pair or "assistant" not in pair:
                checks.fail("bad-turn", f"'texts'[{position}] is not an object with 'user' and 'assistant'.")
            pairs.append({"from": "human", "value": pair["user"]})
            pairs.append({"from": "gpt", "value": pair["assistant"]})
        turns = pairs
    form = Form("texts", "from", "value", LLAVA.names)
    parsed, _ = TurnParser(form, checks, _string_of("text", checks)).parse(turns)
    if images and not any(IMAGE_TOKEN in turn.text for turn in parsed):
        first = f"{IMAGE_TOKEN}\n" * len(images) + parsed[0].text
        parsed = (Turn("human", first), *parsed[1:])
    return parsed, None, images
