"""Every flag there is: its name, its group and the values it takes.

The fields of `transformers.TrainingArguments` are read from the library's source text. Importing that class
takes several seconds (it loads torch, peft and bitsandbytes), which a mistyped flag or `--print-config`
should not cost, and it may touch the GPU. A test holds the result against the class itself.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llava_ft.args.data import DataArguments
from llava_ft.args.model import ModelArguments
from llava_ft.args.training import TrainingFlags

Group: TypeAlias = Literal["model", "data", "training"]

_OWN_CLASSES: Mapping[Group, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "training": TrainingFlags,
}
_ENUM_FILES = ("training_args.py", "trainer_utils.py", "debug_utils.py")
_UNSUPPORTED = frozenset({"parallelism_config"})
"""Inherited fields that take an object, which neither a flag nor YAML can express."""


@dataclass(frozen=True, slots=True)
class ValueType:
    """The values a flag takes, read from its annotation.

    Attributes:
        kinds: Some of "bool", "int", "float", "str", "list", "dict".
        choices: The only values allowed, if they are listed.
        optional: Whether None is allowed.
        switch: The choices that false and true stand for, if the flag may be used as a switch.
    """

    kinds: frozenset[str]
    choices: tuple[str | int, ...] = ()
    optional: bool = False
    switch: tuple[str, str] | None = None

    def describe(self) -> str:
        """Say in words which values are allowed."""
        if self.choices:
            words = [str(choice) for choice in self.choices]
        else:
            names = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
            names |= {"list": "a list of texts", "dict": "a mapping"}
            words = [text for kind, text in names.items() if kind in self.kinds]
        if self.switch:
            words.append(f"true (which is {self.switch[1]}) | false ({self.switch[0]})")
        if self.optional:
            words.append("null")
        return " | ".join(words)


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag, the same on the command line (`--name`) and in YAML (`name:`)."""

    name: str
    group: Group
    value_type: ValueType
    is_own: bool


def parse_annotation(annotation: str, enums: Mapping[str, tuple[str, ...]] | None = None) -> ValueType:
    """Read a type annotation such as `"Literal['a', 'b'] | None"`.

    Args:
        annotation: Source text made of `|`, `Literal`, `list`, `dict`, basic types and names in `enums`.
        enums: Values of the enumerations that may occur by name.

    Raises:
        TypeError: If it contains anything else.
    """
    kinds: set[str] = set()
    choices: list[str | int] = []
    optional = False
    pending: list[ast.expr] = [ast.parse(annotation, mode="eval").body]
    while pending:
        node = pending.pop(0)
        match node:
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                pending[:0] = [left, right]
            case ast.Constant(value=None):
                optional = True
            case ast.Name(id="bool" | "int" | "float" | "str" | "list" | "dict" as kind):
                kinds.add(kind)
            case ast.Name(id=name) if enums and name in enums:
                choices.extend(enums[name])
            case ast.Subscript(value=ast.Name(id="list" | "dict" as kind)):
                kinds.add(kind)
            case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
                choices.extend(_literal_values(values))
            case _:
                raise TypeError(f"annotation {annotation!r} contains {ast.unparse(node)!r}")
    if choices == [False]:
        return ValueType(frozenset(kinds | {"bool"}), optional=optional)
    if choices:
        kinds = {"int" if isinstance(choices[0], int) else "str"}
    return ValueType(frozenset(kinds), tuple(choices), optional)


def _literal_values(node: ast.expr) -> list[Any]:
    return [ast.literal_eval(item) for item in (node.elts if isinstance(node, ast.Tuple) else [node])]


@cache
def inherited_annotations() -> Mapping[str, str]:
    """Return the annotation of every field of `transformers.TrainingArguments`, without importing it."""
    for node in _transformers_module("training_args.py").body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            return {
                statement.target.id: ast.unparse(statement.annotation)
                for statement in node.body
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            }
    raise RuntimeError("the installed transformers has no class TrainingArguments in training_args.py")


@cache
def all_flags() -> Mapping[str, Flag]:
    """Return every flag by name: the model's, the data's, then the training's own and inherited ones."""
    flags: dict[str, Flag] = {}
    inherited = inherited_annotations()
    for group, owner in _OWN_CLASSES.items():
        for field in dataclasses.fields(owner):
            is_own = group != "training" or field.name not in inherited
            value_type = parse_annotation(str(field.type))
            value_type = dataclasses.replace(value_type, switch=field.metadata.get("switch"))
            flags[field.name] = Flag(field.name, group, value_type, is_own)
    enums = _enum_values()
    for name, annotation in inherited.items():
        if name in flags and name != "optim":
            continue
        if name not in _UNSUPPORTED:
            flags[name] = Flag(name, "training", _inherited_type(name, annotation, enums), is_own=False)
    return flags


def _inherited_type(name: str, annotation: str, enums: Mapping[str, tuple[str, ...]]) -> ValueType:
    if name == "train_sampling_strategy":
        # Declared as a plain str; batch_rebalance needs columns that this program's data sets do not have.
        return ValueType(frozenset({"str"}), ("random", "sequential", "group_by_length"))
    if name == "optim":
        return dataclasses.replace(parse_annotation(annotation, enums), optional=True)  # the device decides
    if name == "fsdp":
        return ValueType(frozenset({"str", "bool"}), optional=True)
    return parse_annotation(annotation, enums)


@cache
def _transformers_module(file_name: str) -> ast.Module:
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise RuntimeError("transformers is not installed: pip install 'transformers>=5.6,<6'")
    return ast.parse((Path(spec.origin).parent / file_name).read_text(encoding="utf-8"))


@cache
def _enum_values() -> Mapping[str, tuple[str, ...]]:
    """Return the values of each enumeration that annotations of `TrainingArguments` name."""
    enums: dict[str, tuple[str, ...]] = {}
    for file_name in _ENUM_FILES:
        for node in _transformers_module(file_name).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "ExplicitEnum" for base in node.bases):
                values = [
                    s.value.value for s in node.body if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant)
                ]
                enums[node.name] = tuple(str(value) for value in values)
    return enums
