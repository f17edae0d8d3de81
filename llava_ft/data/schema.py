"""From a raw record to a sample: the only place that knows how records are written.

A record is one conversation about any number of images. Three forms are told apart by their keys: LLaVA's
`conversations`, the `messages` of OpenAI and Hugging Face, and the `texts` of The Cauldron. `docs/data_format.md`
describes every variation that is accepted. What is not accepted raises; nothing is repaired silently.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.record_checks import RecordChecks, is_list, is_mapping, kind_of
from llava_ft.data.record_images import ImageValue, column_images
from llava_ft.data.record_messages import ContentReader
from llava_ft.data.sample import EMBEDDED, Role, Sample, Turn, embedded_name, parse_embedded
from llava_ft.data.turns import LLAVA, OPENAI, Form, Speaker, TextOf, TurnParser
from llava_ft.errors import BadSampleError

__all__ = [
    "EMBEDDED",
    "BrokenRecord",
    "Role",
    "Sample",
    "Turn",
    "embedded_name",
    "image_values",
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
