"""Every flag there is, and the text of `--help`.

Importing `transformers.TrainingArguments` takes several seconds (it loads torch, peft and bitsandbytes), which a
mistyped flag or `--print-config` should not cost. So the types of its fields lie beside this file, as a table of the
transformers that this program is tested with. Another version is asked itself, and costs the import.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import textwrap
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, get_type_hints

from llava_ft.args.data import DataArguments
from llava_ft.args.model import ModelArguments
from llava_ft.args.training import TrainingFlags
from llava_ft.args.value_types import ValueType

TABLE: Final = Path(__file__).with_name("transformers_fields.json")
"""Type of each field of `transformers.TrainingArguments`; `scripts/update_transformers_fields.py` writes it."""

_OWN_CLASSES: Final[Mapping[str, type]] = {
    "Model": ModelArguments,
    "Data": DataArguments,
    "Training": TrainingFlags,
}


@cache
def all_flags() -> Mapping[str, ValueType]:
    """Return the values of every flag: the model's, the data's, then the training's own and inherited ones."""
    flags = {name: kind for owner in _OWN_CLASSES.values() for name, kind in _types_of(owner).items()}
    inherited = inherited_types()
    flags["optim"] = dataclasses.replace(inherited["optim"], optional=True)  # unset: the device decides
    return flags | {name: kind for name, kind in inherited.items() if name not in flags}


@cache
def inherited_types() -> Mapping[str, ValueType]:
    """Return the values of each field of `transformers.TrainingArguments` that text can express."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    fields: dict[str, dict[str, Any]] = table["fields"]
    if table["transformers"] != importlib.metadata.version("transformers"):
        fields = fields_of_transformers()
    types = {
        name: ValueType(frozenset(field["kinds"]), tuple(field["choices"]), field["optional"])
        for name, field in fields.items()
    }
    # Declared as a plain text; batch_rebalance needs columns that this program's data sets do not have.
    types["train_sampling_strategy"] = ValueType(frozenset({"str"}), ("random", "sequential", "group_by_length"))
    types["fsdp"] = ValueType(frozenset({"str", "bool"}), optional=True)
    return types


def fields_of_transformers() -> dict[str, dict[str, Any]]:
    """Return what the table holds for the installed transformers, which is imported."""
    from transformers.training_args import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    fields: dict[str, dict[str, Any]] = {}
    for field in dataclasses.fields(TrainingArguments):
        try:
            kind = ValueType.of(hints[field.name])
        except TypeError:  # it takes an object, such as parallelism_config
            continue
        fields[field.name] = {"kinds": sorted(kind.kinds), "choices": list(kind.choices), "optional": kind.optional}
    return fields


def format_help(program: str) -> str:
    """Return the usage of a training command: every own flag with its values, default and meaning."""
    lines = [
        f"usage: {program} [--config FILE.yaml] [--print-config] [--FLAG VALUE ...]",
        "",
        "Flags override the file. Every field of transformers.TrainingArguments is a flag too.",
    ]
    for title, owner in _OWN_CLASSES.items():
        lines += ["", f"{title}:"]
        types = _types_of(owner)
        for field in dataclasses.fields(owner):
            has_default = field.default is not dataclasses.MISSING and field.default is not None
            default = f"  (default: {field.default!r})" if has_default else ""
            usage = f"--{field.name}  {types[field.name].describe()}{default}"
            lines.append(
                textwrap.fill(usage, 100, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
            )
            lines.append(textwrap.indent(textwrap.fill(field.metadata["help"], width=90), " " * 6))
    return "\n".join(lines) + "\n"


def _types_of(owner: type) -> dict[str, ValueType]:
    hints = get_type_hints(owner)
    return {f.name: ValueType.of(hints[f.name], f.metadata.get("switch")) for f in dataclasses.fields(owner)}
