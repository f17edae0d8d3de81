"""Where values come from: the command line and a YAML file. Both give text, so that both are read alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from llava_ft.args.value_types import Raw
from llava_ft.errors import UserError

_FLOAT_WITHOUT_POINT: Final = re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One value as written, and where."""

    key: str  # without dashes, with underscores
    value: Raw
    where: str  # for messages: `--lora_r` or `lora.yaml, line 12: lora_r`
    is_bare: bool = False  # a flag on the command line without a value; `value` is None then


def read_command_line(argv: Sequence[str]) -> list[Entry]:
    """Split a command line into entries.

    A word that starts with two dashes is a flag; what follows up to the next one is its value, which may
    therefore be negative. `--key value`, `--key=value` and, for a switch, `--key` alone are understood, with
    dashes or underscores in the name.

    Raises:
        UserError: If there is a word before the first flag.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(
                f"Unexpected argument {word!r}. Every value belongs to a flag, as in --model_name_or_path "
                f"VALUE; for a configuration file write --config {word}."
            )
    return [
        Entry(
            key=name[2:].replace("-", "_"),
            value=None if not values else values[0] if len(values) == 1 else values,
            where=name,
            is_bare=not values,
        )
        for name, values in groups
    ]


def read_yaml(path: Path) -> list[Entry]:
    """Read a flat YAML mapping; scalars keep their text, so `2e-5` and `no` are whatever the flag needs.

    Raises:
        UserError: If the file cannot be read, is no mapping, or holds a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"Cannot read the configuration {path}: {error.strerror}. Give an existing YAML file."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. Give a YAML file.") from error
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    try:
        loader: Any = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode | None):
            raise UserError(f"{path} is a {root.id}, not a mapping. Write one `key: value` per line.")
        for key_node, value_node in root.value if root is not None else ():
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(
                    f"{path}, line {line}: the key is a {key_node.id}. Keys are flag names, such as lora_r."
                )
            key = str(key_node.value)
            if key in lines:
                raise UserError(
                    f"{path}, line {line}: {key} was given in line {lines[key]} already. Each key may occur once; "
                    "remove one of the two."
                )
            lines[key] = line
            entries.append(Entry(key, _node_value(path, value_node, loader), f"{path}, line {line}: {key}"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}{line}: not valid YAML: {problem}. Write one `key: value` per line.") from error
    return entries


def write_yaml(values: Mapping[str, object]) -> str:
    """Return a flat mapping as YAML that `read_yaml` reads back unchanged."""
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000))


def find_config(name: str, suffixes: Sequence[str] = (".yaml", ".yml"), *, anywhere: bool = False) -> Path | None:
    """Look up a configuration: as a path, in `./configs`, then in the source tree's `configs`.

    In these folders a bare file name is looked up, which may lack its suffix; with `anywhere`, that of any path is.
    None is returned if there is no such file.
    """
    path = Path(name).expanduser()
    candidates = [path]
    if anywhere or path.name == name:
        candidates += [folder / (path.name + suffix) for folder in _config_folders() for suffix in ("", *suffixes)]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def known_configs(suffix: str) -> list[str]:
    """Return the names of the configuration files that can be asked for by name."""
    return sorted({path.name for folder in _config_folders() for path in folder.glob(f"*{suffix}")})


def _config_folders() -> list[Path]:
    return [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]


def _with_point_free_floats(resolvers: dict[str, Any]) -> dict[str, Any]:
    """Add `2e-5` to what YAML takes for a number; YAML 1.1 itself wants `2.0e-5`."""
    rule = ("tag:yaml.org,2002:float", _FLOAT_WITHOUT_POINT)
    return resolvers | {first: [rule, *resolvers.get(first, [])] for first in "-+0123456789"}


class _Loader(yaml.SafeLoader):
    """Reads nested mappings; the values of flags are converted from their text instead."""

    yaml_implicit_resolvers = _with_point_free_floats(yaml.SafeLoader.yaml_implicit_resolvers)


def _represent_text(dumper: Any, text: str) -> Any:
    """Escape line breaks of every kind; YAML would fold them."""
    style = '"' if len(text.splitlines()) > 1 or text.strip(" ") != text.strip() else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class _Dumper(yaml.SafeDumper):
    """The counterpart of `_Loader`: puts quotes around a text that it would take for a number."""

    yaml_representers = yaml.SafeDumper.yaml_representers | {str: _represent_text}
    yaml_implicit_resolvers = _with_point_free_floats(yaml.SafeDumper.yaml_implicit_resolvers)


def _node_value(path: Path, node: Any, loader: Any) -> Raw:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise UserError(f"{path}, line {node.start_mark.line + 1}: a list may hold single values only.")
        return [str(item.value) for item in node.value]
    return dict(loader.construct_document(node))
