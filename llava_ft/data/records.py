"""From a raw record to a sample: the only place that knows how records are written.

A record is one conversation about any number of images. Three forms are told apart by their keys: LLaVA's
`conversations`, the `messages` of OpenAI and Hugging Face, and the `texts` of The Cauldron.
`docs/reference/data-format.md` describes every variation that is accepted. What is not accepted raises; nothing is
repaired silently.
"""

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Final, Literal, NoReturn, TypeGuard
from urllib.parse import unquote, urlsplit

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.errors import BadSampleError, ImageError

Role = Literal["human", "gpt"]
Speaker = Literal["human", "gpt", "system"]

EMBEDDED: Final = "embedded:"
"""How the name of an image starts whose content is in the source of the record: `embedded:{index}/{position}`."""

_EMBEDDED_NAME: Final = re.compile(re.escape(EMBEDDED) + r"(\d+)/(\d+)")
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI: Final = re.compile(r"data:image/[\w.+-]+(;[\w.=-]+)*;base64,", re.IGNORECASE)
_LEADING_IMAGES: Final = re.compile(rf"(?:\s*{re.escape(IMAGE_TOKEN)})*\s*")
_SHOWN_CHARACTERS: Final = 60
"""How much of a wrong value an error message repeats."""

_PART_KEYS: Final = ("image", "path", "url", "image_url", "bytes")
"""Where a part of a message's content may hold its image."""

MEDIA_KEYS: Final = ("video", "videos", "audio", "audios", "speech", "point_cloud")
"""Where other programs' records have media that no model here takes."""

_MEDIA: Final = "video|audio|speech"
_MEDIA_PARTS: Final = frozenset(
    f"{before}{name}{after}" for name in _MEDIA.split("|") for before in ("", "input_") for after in ("", "_url")
)
_MEDIA_MARK: Final = re.compile(
    rf"(?<![`'\"])<({_MEDIA})>(?![`'\"]|\s*(?:tags?|elements?|blocks?)\b)"  # not what is said about HTML
    r"|<img>[^<>]+</img>"  # Qwen-VL's; HTML's own has no end
    r"|<\|(?:image|vision|video|audio)\w*\|>",
    re.IGNORECASE,
)
"""What stands for a picture, video or sound in questions of other programs' records."""

_MEDIA_END: Final = re.compile(rf"</({_MEDIA})>", re.IGNORECASE)  # its element is HTML

_TOOL_ROLES: Final = frozenset(
    ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation", "ipython")
)
_TOOL_KEYS: Final = ("tool_calls", "function_call")
_SPEAKERS: Final[Mapping[str, Speaker]] = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""What other programs call the speakers; only used for hints."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says once."""

    role: Role
    text: str
    weight: Literal[0, 1] = 1  # 0 takes an assistant's turn out of what is learnt


@dataclass(frozen=True, slots=True)
class Sample:
    """One checked record, whatever form it was written in.

    Images are in the order of their placeholders: paths as written in the record, and `embedded_name` for images whose
    content is in the source.
    """

    index: int  # position in the source, counted from 0
    id: str  # the record's own as text, "" when it has none
    turns: tuple[Turn, ...]  # at least one, the roles alternating; an assistant's turn may come first
    images: tuple[str, ...]
    system: str | None = None  # text of a leading system turn


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """Stands in a source for a record that could not even be read, while its neighbours can; see `BadSampleError`."""

    id: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """Stands in a raw record for the content of an image, which the source reads when it is needed."""

    address: tuple[str | int, ...]  # the source that made it knows how to follow it


@dataclass(frozen=True, slots=True)
class DataUri:
    """An image written into the record as `data:image/...;base64,...`."""

    text: str


ImageValue = str | bytes | DataUri | EmbeddedImage  # one image of a record: a path, or where its content is


def embedded_name(index: int, position: int) -> str:
    """Name an image whose content is in the source, by its record and its place among the record's images."""
    return f"{EMBEDDED}{index}/{position}"


def parse_embedded(image: str) -> tuple[int, int] | None:
    """Undo `embedded_name`; None for a path."""
    found = _EMBEDDED_NAME.fullmatch(image)
    return (int(found[1]), int(found[2])) if found else None


def parse_record(record: object, index: int, prompt_prefix: str = "") -> Sample:
    """Check the raw record at a position of its source and give it its type.

    Whether placeholders and images fit each other is left to the tokenisation, which knows the template. The prefix is
    put in front of the text of the first question, behind the image placeholders that lead it.

    Raises:
        BadSampleError: The record cannot be used. Kinds: "not-an-object", "bad-id", "bad-image", "image-is-url",
            "missing-conversations", "bad-conversations", "empty-conversation", "bad-turn", "unknown-role",
            "tool-turn", "unknown-media", "roles-not-alternating", "misplaced-system", "no-human-turn", "bad-text",
            "bad-part", "bad-weight", "image-in-answer", "image-in-system", "placeholder-mismatch", those of
            `BrokenRecord`.
    """
    sample = _Parser(index).parse(record)[0]
    if not prompt_prefix:
        return sample
    turns = list(sample.turns)
    place = next(place for place, turn in enumerate(turns) if turn.role == "human")
    text = turns[place].text
    found = _LEADING_IMAGES.match(text) if IMAGE_TOKEN in text else None
    start = found.end() if found and IMAGE_TOKEN in found[0] else 0
    turns[place] = replace(turns[place], text=text[:start] + prompt_prefix + text[start:])
    return replace(sample, turns=tuple(turns))


def image_values(record: object, index: int) -> list[ImageValue]:
    """Give the images of a record in the order of `Sample.images`, with the content of those it holds itself."""
    return _Parser(index).parse(record)[1]


def decode_content(value: bytes | DataUri, name: str) -> bytes:
    """Give the file content of an image that is written in the record itself; `name` is for messages.

    Raises:
        ImageError: The base64 text is damaged ("image-corrupt").
    """
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value.text.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(name, "image-corrupt", f"is not base64 text: {error}") from None


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a value is an object in JSON."""
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list in JSON."""
    return isinstance(value, (list, tuple))


def shown(value: object) -> str:
    """Repeat a value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def kind_of(value: object) -> str:
    """Name a JSON value's type for a message, with the value itself where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {shown(value)}"
    if is_list(value):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class _Form:
    """The names that one way of writing conversations uses."""

    turns: str  # key of the list of turns
    role: str  # key of the speaker, in a turn
    text: str  # key of what is said, in a turn
    names: Mapping[Speaker, str]  # of each speaker


_LLAVA: Final = _Form("conversations", "from", "value", {"human": "human", "gpt": "gpt", "system": "system"})
_OPENAI: Final = _Form("messages", "role", "content", {"human": "user", "gpt": "assistant", "system": "system"})
_CAULDRON: Final = _Form("texts", "from", "text", _LLAVA.names)
"""Pairs under `user` and `assistant`, which are brought into turns first."""


class _Parser:
    """Checks one record; its position and id are in every message."""

    def __init__(self, index: int):
        self._index = index
        self._id = ""
        self._columns: list[ImageValue] = []  # images under the record's own `image` or `images`
        self._unused: dict[int, None] = {}  # places of those that no placeholder of a message has taken
        self._taken: list[ImageValue] = []  # images of messages in the order of their placeholders

    def parse(self, record: object) -> tuple[Sample, list[ImageValue]]:
        """Give the sample, and its images with the content of those that the record holds itself."""
        if isinstance(record, BrokenRecord):
            raise BadSampleError(self._index, record.id, record.kind, record.reason)
        if not is_mapping(record):
            self._fail("not-an-object", f"the record is {kind_of(record)}, not an object with 'conversations'.")
        self._id = self._parse_id(record.get("id"))
        self._refuse_media(record, "the record")
        self._columns = self._column_images(record)
        self._unused = dict.fromkeys(range(len(self._columns)))
        form = self._form_of(record)
        value = record[form.turns]
        if form is _CAULDRON and is_list(value):
            turns_of_pairs: list[object] = []
            for position, pair in enumerate(value):
                if not is_mapping(pair) or "user" not in pair or "assistant" not in pair:
                    self._fail("bad-turn", f"'texts'[{position}] is not an object with 'user' and 'assistant'.")
                turns_of_pairs += [{"from": "human", "text": pair["user"]}, {"from": "gpt", "text": pair["assistant"]}]
            value = turns_of_pairs
        turns, system = self._parse_turns(value, form)
        values = self._columns
        if form is _OPENAI:
            # Columns that no placeholder took stand last, so that their number is seen to be wrong.
            values = [*self._taken, *(self._columns[place] for place in self._unused)]
        if form is _CAULDRON and values and not any(IMAGE_TOKEN in turn.text for turn in turns):
            turns = (Turn("human", f"{IMAGE_TOKEN}\n" * len(values) + turns[0].text), *turns[1:])
        images = tuple(
            value if isinstance(value, str) else embedded_name(self._index, place) for place, value in enumerate(values)
        )
        return Sample(self._index, self._id, turns, images, system), values

    def _fail(self, kind: str, reason: str) -> NoReturn:
        raise BadSampleError(self._index, self._id, kind, reason)

    def _check_text(self, text: str, where: str, kind: str = "bad-text") -> None:
        """Refuse half a surrogate pair, such as a lone escape `ud83d`: no tokenizer can encode it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"half of a character (a lone surrogate) at position {error.start}"
            self._fail(kind, f"{where} holds {found}. Write the whole character.")

    def _parse_id(self, value: object) -> str:
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            self._fail("bad-id", f"'id' is {kind_of(value)}. Give a string or a number, or leave it out.")
        if isinstance(value, float) and not math.isfinite(value):
            self._fail("bad-id", f"'id' is {value}, which is not a finite number.")
        return str(value)

    def _form_of(self, record: Mapping[str, object]) -> _Form:
        """Find the key that holds the turns; one without value, as tables have it, counts as absent beside another."""
        present = [form for form in (_LLAVA, _OPENAI, _CAULDRON) if form.turns in record]
        given = [form for form in present if record[form.turns] is not None]
        if len(given) > 1:
            both = f"both {given[0].turns!r} and {given[1].turns!r}"
            self._fail("bad-conversations", f"it has {both}. Leave in the one that is to be learnt.")
        if not present:
            known = ", ".join(sorted(str(key) for key in record)[:8]) or "none"
            rule = "The turns of a record stand there, or under 'messages' or 'texts'."
            self._fail("missing-conversations", f"there is no 'conversations' (keys found: {known}). {rule}")
        return (given or present)[0]

    def _parse_turns(self, value: object, form: _Form) -> tuple[tuple[Turn, ...], str | None]:
        """Check a list of turns; give them without a leading system turn, and the text of that."""
        if not is_list(value):
            self._fail("bad-conversations", f"'{form.turns}' is {kind_of(value)}, not a list of turns.")
        if not value:
            self._fail("empty-conversation", f"'{form.turns}' is an empty list. It needs at least one question.")
        turns: list[Turn] = []
        system: str | None = None
        for position, item in enumerate(value):
            speaker, text, weight = self._parse_turn(item, f"turn {position}", form)
            if speaker == "system":
                if position:
                    self._fail("misplaced-system", f"turn {position} is a 'system' turn; only the first may be.")
                system = text
                continue
            if turns and turns[-1].role == speaker:
                found = f"turns {position - 1} and {position} are both from {form.names[speaker]!r}"
                rule = "Questions and answers have to alternate; join the two or leave one out."
                self._fail("roles-not-alternating", f"{found}. {rule}")
            turns.append(Turn(speaker, text, weight))
        if not any(turn.role == "human" for turn in turns):
            human = form.names["human"]
            self._fail("no-human-turn", f"no turn is from {human!r}. A conversation needs a question.")
        return tuple(turns), system

    def _parse_turn(self, item: object, where: str, form: _Form) -> tuple[Speaker, str, Literal[0, 1]]:
        if not is_mapping(item):
            self._fail("bad-turn", f"{where} is {kind_of(item)}, not an object with {form.role!r} and {form.text!r}.")
        for key in (form.role, form.text):
            if key not in item:
                other = _LLAVA if form is _OPENAI else _OPENAI
                hint = f" Turns with {other.role!r} belong into {other.turns!r}." if other.role in item else ""
                rule = f"Each turn needs {form.role!r} and {form.text!r}.{hint}"
                self._fail("bad-turn", f"{where} has no {key!r}. {rule}")
        speaker = self._parse_speaker(item[form.role], where, form)
        self._refuse_media(item, where)
        if any(item.get(key) for key in _TOOL_KEYS):
            self._refuse_tools(f"{where} calls a tool")
        text, place = item[form.text], f"the {form.text!r} of {where}"
        if form is _OPENAI and not isinstance(text, str):
            text = self._parse_parts(text, speaker, place)
        elif not isinstance(text, str):
            self._fail("bad-text", f"{place} is {kind_of(text)}, not a string.")
        elif form is _OPENAI:
            self._take_placeholders(text, speaker, place)
        else:
            self._check_text(text, place)
        if speaker == "human" and "<" in text and _MEDIA_MARK.search(text):
            closed = {name.lower() for name in _MEDIA_END.findall(text)}
            mark = next((m[0] for m in _MEDIA_MARK.finditer(text) if (m[1] or "").lower() not in closed), None)
            if mark:
                rule = f"Write {IMAGE_TOKEN} for a picture and its path under 'image'"
                self._fail_media(f"{place} holds {shown(mark)}, which would be learnt as text", rule)
        return speaker, text, self._parse_weight(item.get("weight"), speaker, where, form)

    def _parse_speaker(self, role: object, where: str, form: _Form) -> Speaker:
        for speaker, name in form.names.items():
            if role == name:
                return speaker
        if isinstance(role, str) and role in _TOOL_ROLES:
            self._refuse_tools(f"{where} is from {role!r}")
        known = ", ".join(repr(name) for name in form.names.values())
        meant = _SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
        hint = f" Write {form.names[meant]!r}." if meant else ""
        told = shown(role) if isinstance(role, str) else kind_of(role)
        self._fail("unknown-role", f"{where} is from {told}; allowed are {known}.{hint}")

    def _refuse_tools(self, what: str) -> NoReturn:
        self._fail("tool-turn", f"{what}. No template writes calls of tools; take such turns or the whole record out.")

    def _refuse_media(self, item: Mapping[str, object], where: str) -> None:
        """Refuse what has a video or a sound; a column without value, as tables have it, counts as absent."""
        for key in MEDIA_KEYS:
            value = item.get(key)
            if value and not (is_mapping(value) and not any(value.values())):
                self._fail_media(f"{where} has a value under {key!r}", "Only its pictures could be learnt")

    def _fail_media(self, found: str, rule: str) -> NoReturn:
        self._fail("unknown-media", f"{found}. {rule}; leave out records with video or sound.")

    def _parse_weight(self, value: object, speaker: Speaker, where: str, form: _Form) -> Literal[0, 1]:
        if value is None:
            return 1
        if speaker != "gpt":
            rule = f"Only turns from {form.names['gpt']!r} may have one; leave it out."
            self._fail("bad-weight", f"{where} has a 'weight', but is not an answer. {rule}")
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            allowed = "Allowed are 1 (learnt) and 0 (only read)."
            self._fail("bad-weight", f"the 'weight' of {where} is {kind_of(value)}. {allowed}")
        return 1 if value else 0

    # The content of a message: text and images in turn. A part that holds its image brings it along; a part without
    # one, and an `<image>` written in the text, takes the next image of the record's own columns.

    def _parse_parts(self, content: object, speaker: Speaker, where: str) -> str:
        if not is_list(content) or not content:
            told = "an empty list" if is_list(content) else kind_of(content)
            self._fail("bad-text", f"{where} is {told}, not a string or a list of parts.")
        text = ""
        for number, part in enumerate(content):
            piece = self._parse_part(part, speaker, f"part {number} of {where}")
            is_after_image = text.endswith(IMAGE_TOKEN) and not piece.startswith("\n")
            text += f"\n{piece}" if is_after_image and piece else piece
        return text

    def _parse_part(self, part: object, speaker: Speaker, where: str) -> str:
        if not is_mapping(part):
            self._fail("bad-part", f"{where} is {kind_of(part)}, not an object with a 'type'.")
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                self._fail("bad-text", f"the 'text' of {where} is {kind_of(text)}, not a string.")
            self._take_placeholders(text, speaker, f"the 'text' of {where}")
            return text
        if isinstance(kind, str) and kind in _MEDIA_PARTS:
            self._fail_media(f"{where} is of type {kind!r}", "Parts are text or images")
        if kind not in ("image", "image_url"):
            told = shown(kind) if isinstance(kind, str) else kind_of(kind)
            self._fail("bad-part", f"{where} is of type {told}; allowed are 'text', 'image' and 'image_url'.")
        if speaker != "human":
            found = "image-in-system" if speaker == "system" else "image-in-answer"
            self._fail(found, f"{where} is an image. Images are only allowed in messages from 'user'.")
        for key in _PART_KEYS:
            value = part.get(key)
            if key == "image_url" and is_mapping(value):
                value = value.get("url")
            if value is not None:
                self._taken.append(self._parse_image(value, where))
                return IMAGE_TOKEN
        if kind == "image_url":
            self._fail("bad-image", f"{where} has no address. Write {{'url': ...}} under 'image_url'.")
        place = part.get("index")
        if place is None:
            place = next(iter(self._unused), None)
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(self._columns):
            found = f"{where} stands for an image of the record's 'images', which has {len(self._columns)}"
            rule = "Each such part needs one; add it there, or write its path under 'image'."
            self._fail("placeholder-mismatch", f"{found}. {rule}")
        self._take(place)
        return IMAGE_TOKEN

    def _take_placeholders(self, text: str, speaker: Speaker, where: str) -> None:
        self._check_text(text, where)
        if speaker == "human":
            for place in list(self._unused)[: text.count(IMAGE_TOKEN)]:
                self._take(place)

    def _take(self, place: int) -> None:
        self._taken.append(self._columns[place])
        self._unused.pop(place, None)

    # Images, in any of the ways they can be written.

    def _column_images(self, record: Mapping[str, object]) -> list[ImageValue]:
        given = {name: record[name] for name in ("image", "images") if record.get(name) is not None}
        if len(given) == 2:
            first, second = (list(value) if is_list(value) else [value] for value in given.values())
            if first and second and first != second:
                self._fail("bad-image", "it has both 'image' and 'images', and they differ. Leave one of the two out.")
            given = {"image": given["image"]} if first else {"images": given["images"]}
        for name, value in given.items():
            if is_list(value):
                return [self._parse_image(item, f"'{name}'[{place}]") for place, item in enumerate(value)]
            return [self._parse_image(value, f"'{name}'")]
        return []

    def _parse_image(self, value: object, where: str) -> ImageValue:
        """Check a path, a `file://` or `data:` address, content as bytes, or an object with `bytes` and `path`."""
        if isinstance(value, EmbeddedImage):
            return value
        if isinstance(value, bytes):
            if not value:
                self._fail("bad-image", f"{where} holds no bytes. For a record without image leave it out.")
            return value
        if isinstance(value, str):
            return self._parse_path(value, where)
        if not is_mapping(value):
            self._fail("bad-image", f"{where} is {kind_of(value)}. Give the path of a file as a string.")
        # What the image column of a Hugging Face data set holds; its bytes come before its path.
        if not value or not set(value) <= {"bytes", "path"}:
            rule = "Give the path of a file as a string, or an object with 'bytes' and 'path'."
            self._fail("bad-image", f"{where} is an object. {rule}")
        content, path = value.get("bytes"), value.get("path")
        if content is None and path is None:
            hint = "For a record without image leave it out."
            self._fail("bad-image", f"{where} has neither 'bytes' nor a 'path'. {hint}")
        if content is None:
            return self._parse_image(path, f"the 'path' of {where}")
        if not isinstance(content, (bytes, EmbeddedImage)):
            rule = "In a text file write the image as 'data:image/jpeg;base64,...' instead."
            self._fail("bad-image", f"the 'bytes' of {where} are {kind_of(content)}. {rule}")
        return self._parse_image(content, where)

    def _parse_path(self, path: str, where: str) -> ImageValue:
        if path[:5].lower() == "data:":
            if not _DATA_URI.match(path):
                allowed = "'data:image/TYPE;base64,' followed by the image"
                self._fail("bad-image", f"{where} is {shown(path)}; allowed is {allowed}.")
            return DataUri(path)
        if not path.strip():
            self._fail("bad-image", f"{where} is an empty path. For a record without image leave it out.")
        if path[:7].lower() == "file://":
            parts = urlsplit(path)
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
                allowed = "a file on this machine is written 'file:///absolute/path'"
                self._fail("bad-image", f"{where} is {shown(path)}; {allowed}.")
            path = unquote(path[len("file://") + len(parts.netloc) :])
        elif _ADDRESS.match(path):
            rule = "download it and give the path of the file."
            self._fail("image-is-url", f"{where} is {shown(path)}, which is an address; {rule}")
        if path.startswith(EMBEDDED):
            reserved = f"names that start with {EMBEDDED!r} are reserved. Write './' first"
            self._fail("bad-image", f"{where} is {shown(path)}; {reserved}.")
        if "\0" in path or PurePosixPath(path).name in ("", "..") or PureWindowsPath(path).name == "":
            self._fail("bad-image", f"{where} is {shown(path)}, which does not name a file.")
        self._check_text(path, where, "bad-image")
        return path
