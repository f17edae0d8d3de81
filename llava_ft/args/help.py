"""The text of `--help`."""

from __future__ import annotations

import dataclasses
import textwrap

from llava_ft.args.data import DataArguments
from llava_ft.args.fields import all_flags
from llava_ft.args.model import ModelArguments
from llava_ft.args.training import TrainingFlags


def format_help(program: str) -> str:
    """Return the usage of a training command: every own flag with its values, default and meaning.

    Args:
        program: How the command is called, such as "train.py".
    """
    lines = [
        f"usage: {program} [--config FILE.yaml] [--print-config] [--FLAG VALUE ...]",
        "",
        "Flags override the file. Every field of transformers.TrainingArguments is a flag too.",
    ]
    flags = all_flags()
    for title, owner in (("Model", ModelArguments), ("Data", DataArguments), ("Training", TrainingFlags)):
        lines += ["", f"{title}:"]
        for field in dataclasses.fields(owner):
            value_type = flags[field.name].value_type
            allowed = "a name" if len(value_type.choices) > 8 else value_type.describe()
            first = f"--{field.name}  {allowed}{_default(field)}"
            lines.append(
                textwrap.fill(first, 100, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
            )
            lines.append(textwrap.indent(textwrap.fill(field.metadata["help"], width=90), " " * 6))
    return "\n".join(lines) + "\n"


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is not dataclasses.MISSING and field.default is not None:
        return f"  (default: {field.default!r})"
    return ""
