"""What the checks of a record share: telling kinds of values apart, and naming them in messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, TypeGuard

from llava_ft.errors import BadSampleError

_SHOWN_CHARACTERS: Final = 60
"""How much of a wrong value an error message repeats."""


@dataclass(frozen=True, slots=True)
class RecordChecks:
    """Refuses parts of one record; its position and id are in every message."""

    index: int
    sample_id: str

    def fail(self, kind: str, reason: str) -> NoReturn:
        """Raise the error for this record."""
        raise BadSampleError(self.index, self.sample_id, kind, reason)

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
    if isinstance(value, Mapping):
        return "an object"
    return f"a {type(value).__name__}"
