"""Several sources in one run, described by a YAML file.

    sources:
      - path: llava_mix.json
        image_folder: images
        weight: 3
      - path: captions/{000..012}.tar
        weight: 1
        prompt_prefix: "Answer briefly. "
    epoch_size: 100000

`docs/mixture.md` explains each key. Which records are taken is decided in `select_rows`.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import yaml

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.records import Sample, is_list, is_mapping, kind_of
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.open import is_mixture, open_source, resolve_source
from llava_ft.errors import UserError

_LEADING_IMAGES: Final = re.compile(rf"(?:\s*{re.escape(IMAGE_TOKEN)})*\s*")


@dataclass(frozen=True, slots=True)
class MixtureEntry:
    """One source of a mixture.

    Attributes:
        path: As in `open_source`, as written.
        name: For messages; `path` where none is given.
        split: Split of a data set that has several.
        image_folder: Folder of its images; None means the run's.
        weight: Its share of the epoch, in proportion to the other weights.
        count: Number of its records that are taken.
        repeat: How often each of its records is taken.
        held_out: What is kept for validation: a share below 1, or a number of records.
        prompt_prefix: Put in front of the text of the first question.
    """

    path: str
    name: str
    split: str | None = None
    image_folder: str | None = None
    weight: float | None = None
    count: int | None = None
    repeat: int = 1
    held_out: int | float | None = None
    prompt_prefix: str = ""


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a mixture file says.

    Attributes:
        path: The file. Paths in it count from its directory.
        entries: At least one. Either all have a weight, or none has.
        epoch_size: Records of an epoch, with weights; None means as many as the sources have.
    """

    path: Path
    entries: tuple[MixtureEntry, ...]
    epoch_size: int | None = None

    def open_sources(self) -> list[RecordSource]:
        """Open the source of each entry.

        Raises:
            UserError: A source is of no known kind.
        """
        return [self._open(number, entry) for number, entry in enumerate(self.entries, start=1)]

    def _open(self, number: int, entry: MixtureEntry) -> RecordSource:
        folder = None if entry.image_folder is None else str(self.path.parent / entry.image_folder)
        try:
            path = resolve_source(entry.path, self.path.parent)
            source = open_source(path, split=entry.split, image_folder=folder)
        except UserError as error:
            raise UserError(f"{self.path}, source {number}: {error}") from None
        if entry.name != entry.path:
            source.name = entry.name
        return source


def with_prompt_prefix(sample: Sample, prefix: str) -> Sample:
    """Put `prefix` in front of the text of the first question, behind the image placeholders that lead it."""
    if not prefix:
        return sample
    turns = list(sample.turns)
    place = next(place for place, turn in enumerate(turns) if turn.role == "human")
    text = turns[place].text
    found = _LEADING_IMAGES.match(text) if IMAGE_TOKEN in text else None
    start = found.end() if found and IMAGE_TOKEN in found[0] else 0
    turns[place] = replace(turns[place], text=text[:start] + prefix + text[start:])
    return replace(sample, turns=tuple(turns))


def open_mixture(path: str | Path) -> Mixture:
    """Read a mixture file. Its sources are not opened yet.

    Raises:
        UserError: The file cannot be read, or says something that is not allowed.
    """
    path = Path(path)
    value = _read_yaml(path)
    if not is_mapping(value):
        raise UserError(f"Mixture {path} is {kind_of(value)}, not a mapping. It needs 'sources:' with a list below.")
    _refuse_unknown(value, ("sources", "epoch_size"), str(path))
    items = value.get("sources")
    if not is_list(items) or not items:
        raise UserError(
            f"Mixture {path}: 'sources' is {'missing' if items is None else kind_of(items)}. Give a list of sources, "
            "each with a 'path'."
        )
    entries = tuple(_EntryReader(f"{path}, source {number}").read(item) for number, item in enumerate(items, start=1))
    reader = _EntryReader(str(path))
    mixture = Mixture(path, entries, reader.whole_number(value, "epoch_size"))
    _check_together(mixture)
    return mixture


def check_holds_out(path: str | Path) -> None:
    """Refuse a mixture that keeps no records to evaluate on; anything but a mixture is let through.

    Raises:
        UserError: No source of the mixture has `held_out`.
    """
    if is_mixture(path) and not any(entry.held_out for entry in open_mixture(path).entries):
        raise UserError(
            f"Mixture {path} holds out no records, and eval_strategy needs some. Give a source 'held_out', name "
            "records with --validation_data_path, or set --eval_strategy no."
        )


def _check_together(mixture: Mixture) -> None:
    path, entries = mixture.path, mixture.entries
    with_weight = [entry for entry in entries if entry.weight is not None]
    if with_weight and len(with_weight) < len(entries):
        bare = next(entry for entry in entries if entry.weight is None)
        raise UserError(
            f"Mixture {path}: {with_weight[0].name!r} has a weight and {bare.name!r} has none. Weights are shares of "
            "the epoch, so all sources need one; or use 'count' and 'repeat' everywhere."
        )
    if mixture.epoch_size is not None and not with_weight:
        raise UserError(
            f"Mixture {path}: 'epoch_size' is {mixture.epoch_size}, but no source has a weight. Give each a 'weight', "
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
    names = [entry.name for entry in entries if entry.name != entry.path]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Mixture {path}: two sources are named {name!r}. Give each a name of its own.")


@dataclass(frozen=True)
class _EntryReader:
    """Checks the values of one mapping.

    Attributes:
        where: Its place, for messages.
    """

    where: str

    def read(self, item: object) -> MixtureEntry:
        if not is_mapping(item):
            self._fail(f"it is {kind_of(item)}, not a mapping. Write 'path: ...' and what else is needed")
        _refuse_unknown(item, tuple(field.name for field in fields(MixtureEntry)), self.where)
        path = self._text(item, "path")
        if not path:
            self._fail("there is no 'path'. Each source needs one")
        entry = MixtureEntry(
            path=path,
            name=self._text(item, "name") or path,
            split=self._text(item, "split"),
            image_folder=self._text(item, "image_folder"),
            weight=self._weight(item),
            count=self.whole_number(item, "count"),
            repeat=self.whole_number(item, "repeat") or 1,
            held_out=self._held_out(item),
            prompt_prefix=self._text(item, "prompt_prefix") or "",
        )
        given = [key for key in ("weight", "count", "repeat") if item.get(key) is not None]
        if len(given) > 1:
            self._fail(f"it has both {given[0]!r} and {given[1]!r}. Give one of them: each says how much is taken")
        if IMAGE_TOKEN in entry.prompt_prefix:
            self._fail(f"'prompt_prefix' holds {IMAGE_TOKEN}, which stands for an image of the record. Leave it out")
        return entry

    def whole_number(self, item: Mapping[str, object], key: str) -> int | None:
        """Give a whole number of at least 1, None where there is none."""
        value = item.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self._fail(f"'{key}' is {kind_of(value)}. Allowed are whole numbers from 1 on")
        return value

    def _text(self, item: Mapping[str, object], key: str) -> str | None:
        value = item.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            self._fail(f"'{key}' is {kind_of(value)}, not a text. Put it into quotes")
        return value

    def _weight(self, item: Mapping[str, object]) -> float | None:
        value = item.get("weight")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self._fail(f"'weight' is {kind_of(value)}. Allowed are numbers above 0; leave out a source of no weight")
        return float(value)

    def _held_out(self, item: Mapping[str, object]) -> int | float | None:
        value = item.get("held_out")
        if isinstance(value, float) and 0 < value < 1:
            return value
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value or None
        self._fail(
            f"'held_out' is {kind_of(value)}. Allowed are a share between 0 and 1, and a whole number of records"
        )

    def _fail(self, reason: str) -> NoReturn:
        raise UserError(f"Mixture {self.where}: {reason}.")


def _refuse_unknown(item: Mapping[str, object], known: tuple[str, ...], where: str) -> None:
    for key in item:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(f"Mixture {where}: unknown key {key!r}. Known: {', '.join(known)}.{hint}")


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
        raise UserError(f"Mixture {path}{line}: not valid YAML: {problem}. See docs/mixture.md for examples.") from None


def _with_point_free_floats(rules: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Add `1e-2` to what YAML takes for a number; YAML 1.1 itself wants `1.0e-2`."""
    rule = ("tag:yaml.org,2002:float", re.compile(r"^[0-9]+[eE][-+]?[0-9]+$"))
    return {first: [rule, *some] if first in "0123456789" else some for first, some in rules.items()}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice."""

    yaml_implicit_resolvers = _with_point_free_floats(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping of which each key occurs once."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
