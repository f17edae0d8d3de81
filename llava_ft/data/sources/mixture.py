"""Several sources in one run, described by a YAML file.

    sources:
      - path: llava_mix.json
        image_folder: images
        weight: 3
      - path: captions/{000..012}.tar
        weight: 1
        prompt_prefix: "Answer briefly. "
    epoch_size: 100000

`docs/how-to/mixture.md` explains each key. Which records are taken is decided in `selection.py`.
"""

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeGuard, cast

import yaml

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.records import is_list, is_mapping, kind_of
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.open import open_source, resolve_source
from llava_ft.errors import UserError


@dataclass(frozen=True, slots=True)
class MixtureEntry:
    """One source of a mixture."""

    path: str  # as in `open_source`, as written
    name: str  # for messages; `path` where none is given
    split: str | None = None  # of a data set that has several
    image_folder: str | None = None  # None means the run's
    weight: float | None = None  # its share of the epoch, in proportion to the other weights
    count: int | None = None  # of its records that are taken
    repeat: int = 1  # how often each of its records is taken
    held_out: int | float | None = None  # kept for validation: a share below 1, or a number of records
    prompt_prefix: str = ""  # put in front of the text of the first question


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a mixture file says."""

    path: Path  # the file; paths in it count from its directory
    entries: tuple[MixtureEntry, ...]  # at least one; either all have a weight, or none has
    epoch_size: int | None = None  # records of an epoch, with weights; None means as many as the sources have

    def open_sources(self) -> list[RecordSource]:
        """Open the source of each entry; a `UserError` says which is of no known kind."""
        sources: list[RecordSource] = []
        for number, entry in enumerate(self.entries, start=1):
            folder = None if entry.image_folder is None else str(self.path.parent / entry.image_folder)
            try:
                path = resolve_source(entry.path, self.path.parent)
                source = open_source(path, split=entry.split, image_folder=folder)
            except UserError as error:
                raise UserError(f"{self.path}, source {number}: {error}") from None
            if entry.name != entry.path:
                source.name = entry.name
            sources.append(source)
        return sources


def open_mixture(path: str | os.PathLike[str]) -> Mixture:
    """Read a mixture file. Its sources are not opened yet.

    Raises:
        UserError: The file cannot be read, or says something that is not allowed.
    """
    path = Path(path)
    value = _read_yaml(path)
    if not is_mapping(value):
        raise UserError(f"Mixture {path} is {kind_of(value)}, not a mapping. It needs 'sources:' with a list below.")
    _check_keys(value, ("sources", "epoch_size"), str(path))
    items = value.get("sources")
    if not is_list(items) or not items:
        raise UserError(
            f"Mixture {path}: 'sources' is {'missing' if items is None else kind_of(items)}. Give a list of sources, "
            "each with a 'path'."
        )
    entries = tuple(_read_entry(item, f"{path}, source {number}") for number, item in enumerate(items, start=1))
    epoch_size = cast("int | None", value.get("epoch_size"))
    with_weight = [entry for entry in entries if entry.weight is not None]
    if with_weight and len(with_weight) < len(entries):
        bare = next(entry for entry in entries if entry.weight is None)
        raise UserError(
            f"Mixture {path}: {with_weight[0].name!r} has a weight and {bare.name!r} has none. Weights are shares of "
            "the epoch, so all sources need one; or use 'count' and 'repeat' everywhere."
        )
    if epoch_size is not None and not with_weight:
        raise UserError(
            f"Mixture {path}: 'epoch_size' is {epoch_size}, but no source has a weight. Give each a 'weight', "
            "or say with 'count' how many records to take of each."
        )
    seen: dict[tuple[str, str | None], MixtureEntry] = {}
    for entry in entries:
        place = (resolve_source(entry.path, path.parent), entry.split)
        other = seen.setdefault(place, entry)
        if other is not entry and (entry.held_out or other.held_out):
            raise UserError(
                f"Mixture {path}: {entry.path!r} is there twice, and one of the two has 'held_out'. What one holds out "
                "the other would train on; join the two entries."
            )
    for name, count in Counter(entry.name for entry in entries if entry.name != entry.path).items():
        if count > 1:
            raise UserError(f"Mixture {path}: two sources are named {name!r}. Give each a name of its own.")
    return Mixture(path, entries, epoch_size)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Rule = tuple[Callable[[object], bool], str]
_TEXT: Final[_Rule] = (lambda value: isinstance(value, str), "not a text. Put it into quotes")
_COUNT: Final[_Rule] = (
    lambda value: _is_number(value) and isinstance(value, int) and value >= 1,
    "Allowed are whole numbers from 1 on",
)
_ALLOWED: Final[Mapping[str, _Rule]] = {
    **dict.fromkeys(("path", "name", "split", "image_folder", "prompt_prefix"), _TEXT),
    **dict.fromkeys(("count", "repeat", "epoch_size"), _COUNT),
    "weight": (
        lambda value: _is_number(value) and 0 < value < math.inf,
        "Allowed are numbers above 0; leave out a source of no weight",
    ),
    "held_out": (
        lambda value: _is_number(value) and (0 < value < 1 if isinstance(value, float) else value >= 0),
        "Allowed are a share between 0 and 1, and a whole number of records",
    ),
}
"""What each key may be, and how that is said."""


def _check_keys(item: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key, value in item.items():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(f"Mixture {where}: unknown key {key!r}. Known: {', '.join(known)}.{hint}")
        if value is not None and key in _ALLOWED:
            is_allowed, allowed = _ALLOWED[key]
            if not is_allowed(value):
                joint = ", " if allowed.startswith("not") else ". "
                raise UserError(f"Mixture {where}: '{key}' is {kind_of(value)}{joint}{allowed}.")


def _read_entry(item: object, where: str) -> MixtureEntry:
    if not is_mapping(item):
        raise UserError(
            f"Mixture {where}: it is {kind_of(item)}, not a mapping. Write 'path: ...' and what else is needed."
        )
    _check_keys(item, [field.name for field in fields(MixtureEntry)], where)
    values: dict[str, Any] = {key: value for key, value in item.items() if value is not None}
    if not values.get("path"):
        raise UserError(f"Mixture {where}: there is no 'path'. Each source needs one.")
    given = [key for key in ("weight", "count", "repeat") if key in values]
    if len(given) > 1:
        raise UserError(
            f"Mixture {where}: it has both {given[0]!r} and {given[1]!r}. Give one of them: each says how much is "
            "taken."
        )
    if IMAGE_TOKEN in values.get("prompt_prefix", ""):
        raise UserError(
            f"Mixture {where}: 'prompt_prefix' holds {IMAGE_TOKEN}, which stands for an image of the record. Leave it "
            "out."
        )
    values["name"] = values.get("name") or values["path"]
    values["weight"] = float(values["weight"]) if "weight" in values else None
    values["held_out"] = values.get("held_out") or None
    return MixtureEntry(**values)


def _read_yaml(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"Mixture {path} does not exist. Check --data_path.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"Mixture {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"Mixture {path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        mark = cast("Any", getattr(error, "problem_mark", None))
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise UserError(f"Mixture {path}{line}: not valid YAML: {problem}. Examples: docs/how-to/mixture.md") from None


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, and refuse a key that is given twice."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes `1.0e-2` for a number, but not `1e-2`.
cast("Any", _Loader).add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[0-9]+[eE][-+]?[0-9]+$"), list("0123456789")
)
