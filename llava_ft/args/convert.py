"""From the text of a flag or a YAML value to a checked value."""

from __future__ import annotations

import json
import math
from typing import TypeAlias

from llava_ft.args.fields import ValueType

Raw: TypeAlias = "str | list[str] | dict[str, object] | None"
"""A value as written: text, several texts, a mapping, or nothing at all (null)."""

_TRUE = frozenset({"true", "yes", "on", "t", "y", "1"})
_FALSE = frozenset({"false", "no", "off", "f", "n", "0"})


class ConversionError(ValueError):
    """The value is none that the flag takes. The message is a half sentence for the caller to complete."""


def convert(raw: Raw, value_type: ValueType) -> object:
    """Turn a value as written into one of the flag's type.

    Numbers and booleans may be quoted or not, and `2e-5` is a number. A text that is a whole number is never
    taken for a boolean where both could be meant.

    Raises:
        ConversionError: If the flag does not take this value.
    """
    if raw is None:
        if value_type.optional:
            return None
        raise ConversionError("it has no value")
    if isinstance(raw, dict):
        if "dict" in value_type.kinds:
            return raw
        raise ConversionError("it is a mapping")
    if isinstance(raw, list):
        if "list" in value_type.kinds:
            return list(raw)
        raise ConversionError(f"it has {len(raw)} values")
    return _convert_text(raw, value_type)


def _convert_text(text: str, value_type: ValueType) -> object:
    kinds = value_type.kinds
    if value_type.optional and _means_none(text, value_type):
        return None
    if value_type.choices:
        for choice in value_type.choices:
            if text == str(choice):
                return choice
        if value_type.switch and text.lower() in _TRUE | _FALSE:
            return value_type.switch[text.lower() in _TRUE]
        raise ConversionError("it is not in the list")
    if "dict" in kinds and text.lstrip().startswith("{"):
        return _convert_json(text)
    for kind in ("bool", "int", "float", "str"):
        if kind in kinds:
            value = _convert_scalar(text, kind, is_alone="str" not in kinds)
            if value is not None:
                return value
    if "list" in kinds:
        return [part.strip() for part in text.split(",") if part.strip()]
    raise ConversionError(f"it is no {' or '.join(sorted(kinds))}")


def _means_none(text: str, value_type: ValueType) -> bool:
    """Whether a text stands for null: `none` does unless it could be a name."""
    return text in ("None", "null") or (text.lower() == "none" and "str" not in value_type.kinds)


def _convert_scalar(text: str, kind: str, *, is_alone: bool) -> object | None:
    """Return the value, or None if the text is none of that kind.

    Args:
        text: What was written.
        kind: "bool", "int", "float" or "str".
        is_alone: Whether the flag takes no text; only then yes, no, on, off, 1 and 0 are booleans.
    """
    if kind == "str":
        return text
    if kind == "bool":
        word = text.lower()
        if word in ("true", "false"):
            return word == "true"
        return (word in _TRUE) if is_alone and word in _TRUE | _FALSE else None
    try:
        if kind == "int":
            return int(text)
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _convert_json(text: str) -> dict[str, object]:
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise ConversionError(f"it is no valid JSON ({error})") from error
