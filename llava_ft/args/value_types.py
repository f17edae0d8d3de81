"""The values that a flag takes: read from a type hint, said in words, and made from what was written.

pydantic's TypeAdapter was tried: it agrees on `true`, `yes` and `1`, but takes `true` for a text where a flag allows
both, refuses `4` for `Literal[4, 8, 16]`, knows no lists with commas, and words its errors for programmers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

Raw: TypeAlias = "str | list[str] | dict[str, object] | None"
"""A value as written: text, several texts, a mapping, or nothing at all (null)."""

_T = TypeVar("_T")

_IN_WORDS: Final = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list of texts",
    "dict": "a mapping",
}
_TRUE: Final = frozenset({"true", "yes", "on", "t", "y", "1"})
_FALSE: Final = frozenset({"false", "no", "off", "f", "n", "0"})


def flag(default: _T, text: str, *, switch: tuple[str, str] | None = None) -> _T:
    """Declare a flag: a dataclass field with its default, and what `--help` says. For `switch` see `ValueType`."""
    specifier: Any = field(default=default, metadata={"help": text} | ({"switch": switch} if switch else {}))
    return specifier


class ConversionError(ValueError):
    """The value is none that the flag takes. The message is a half sentence for the caller to complete."""


@dataclass(frozen=True, slots=True)
class ValueType:
    """The values that a flag takes."""

    kinds: frozenset[str]  # some of "bool", "int", "float", "str", "list", "dict"
    choices: tuple[str | int, ...] = ()  # the only values allowed, if they are listed
    optional: bool = False  # whether None is allowed
    switch: tuple[str, str] | None = None  # the choices that false and true stand for, if it may be used as a switch

    @classmethod
    def of(cls, hint: Any, switch: tuple[str, str] | None = None) -> ValueType:
        """Read a type hint made of basic types, `list`, `dict`, `Literal`, enumerations and unions of these.

        Raises:
            TypeError: It holds another type, whose values cannot be written as text.
        """
        kinds: set[str] = set()
        choices: list[Any] = []
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for option in options:
            origin = get_origin(option) or option
            if origin is Literal:
                choices.extend(get_args(option))
            elif origin in (bool, int, float, str, list, dict):
                kinds.add(origin.__name__)
            elif isinstance(origin, type) and issubclass(origin, Enum):
                choices.extend(member.value for member in origin)
            elif origin is not NoneType:
                raise TypeError(f"a flag cannot hold {option!r}")
        if choices == [False]:
            kinds, choices = kinds | {"bool"}, []
        if choices:  # of `SomeEnum | str` the values of the enumeration are meant
            kinds = {type(choices[0]).__name__}
        return cls(frozenset(kinds), tuple(choices), NoneType in options, switch)

    def describe(self) -> str:
        """Say in words which values are allowed."""
        words = [str(choice) for choice in self.choices]
        words = words or [text for kind, text in _IN_WORDS.items() if kind in self.kinds]
        if self.switch:
            words.append(f"true (which is {self.switch[1]}) | false ({self.switch[0]})")
        if self.optional:
            words.append("null")
        return " | ".join(words)

    def convert(self, raw: Raw) -> object:
        """Turn a value as written into one of this type.

        Numbers and booleans may be quoted or not, and `2e-5` is a number. A text that is a whole number is never
        taken for a boolean where both could be meant.

        Raises:
            ConversionError: It is none.
        """
        if raw is None:
            if self.optional:
                return None
            raise ConversionError("it has no value")
        if isinstance(raw, str):
            return self._convert_text(raw)
        if isinstance(raw, dict):
            if "dict" in self.kinds:
                return raw
            raise ConversionError("it is a mapping")
        if "list" in self.kinds:
            return list(raw)
        raise ConversionError(f"it has {len(raw)} values")

    def _convert_text(self, text: str) -> object:
        word = text.lower()
        # `none` stands for null unless it could be a name
        if self.optional and (text in ("None", "null") or (word == "none" and "str" not in self.kinds)):
            return None
        if self.choices:
            for choice in self.choices:
                if text == str(choice):
                    return choice
            if self.switch and word in _TRUE | _FALSE:
                return self.switch[word in _TRUE]
            raise ConversionError("it is not in the list")
        if "dict" in self.kinds and text.lstrip().startswith("{"):
            try:
                return dict(json.loads(text))
            except ValueError as error:
                raise ConversionError(f"it is no valid JSON ({error})") from error
        if "bool" in self.kinds:
            # where a text could be meant, yes, no, on, off, 1 and 0 are texts
            known = ({"true"}, {"false"}) if "str" in self.kinds else (_TRUE, _FALSE)
            if word in known[0] | known[1]:
                return word in known[0]
        for kind, number_type in (("int", int), ("float", float)):
            if kind in self.kinds:
                try:
                    number = number_type(text)
                except ValueError:
                    continue
                if math.isfinite(number):
                    return number
        if "str" in self.kinds:
            return text
        if "list" in self.kinds:
            return [part.strip() for part in text.split(",") if part.strip()]
        raise ConversionError(f"it is no {' or '.join(sorted(self.kinds))}")
