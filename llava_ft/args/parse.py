"""From a command line and a YAML file to checked arguments; opens no weights or data and uses no device."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llava_ft.args import legacy
from llava_ft.args.checks import check_arguments, find_idle_flags
from llava_ft.args.convert import ConversionError, convert
from llava_ft.args.data import DataArguments
from llava_ft.args.fields import Flag, ValueType, all_flags, inherited_annotations, parse_annotation
from llava_ft.args.model import ModelArguments
from llava_ft.args.sources import Entry, find_config, known_configs, read_command_line, read_yaml, write_yaml
from llava_ft.args.training import INHERITED_WITH_OWN_DEFAULT, TrainingFlags
from llava_ft.errors import UserError

if TYPE_CHECKING:
    from llava_ft.args.build import TrainingArguments

REQUIRED_TO_TRAIN = ("model_name_or_path", "data_path", "output_dir")
"""Flags without which no training run can start."""

NOT_RESOLVED = frozenset({"hub_token", "local_rank"})
"""Never written down: a secret, and a number that differs in every process."""

_STEP_FLAGS = frozenset({"warmup_steps", "save_steps", "logging_steps", "eval_steps", "eval_delay"})
"""Numbers that are a share below 1 and whole otherwise."""

_Values: TypeAlias = "dict[str, object]"
_Arguments = TypeVar("_Arguments")


@dataclass(frozen=True)
class ParsedArgs:
    """A checked request.

    Attributes:
        model: What the model is made of.
        data: Where the records are.
        flags: The training flags of `TrainingFlags`, typed; no device has been touched for them.
        inherited: Fields of `transformers.TrainingArguments` that were given, plain and checked.
        notes: What the user should be told: translated spellings and flags without effect. Devices add to it.
        print_config: Whether the request is only to print the resolved configuration.
    """

    model: ModelArguments
    data: DataArguments
    flags: TrainingFlags
    inherited: Mapping[str, object]
    notes: list[str] = field(default_factory=list[str], compare=False)
    print_config: bool = field(default=False, compare=False)

    def with_model(self, model_name_or_path: str) -> ParsedArgs:
        """Return the same request for another base; training arguments that have been built are shared."""
        model = dataclasses.replace(self.model, model_name_or_path=model_name_or_path)
        changed = dataclasses.replace(self, model=model)
        built = {name: vars(self)[name] for name in ("training", "attn_implementation") if name in vars(self)}
        vars(changed).update(built)
        return changed

    def with_attention(self, kernel: str) -> ParsedArgs:
        """Return the same request with another attention kernel; training arguments are shared."""
        changed = dataclasses.replace(self)
        vars(changed).update({"training": self.training, "attn_implementation": kernel})
        return changed

    @cached_property
    def training(self) -> TrainingArguments:
        """The training arguments as transformers wants them.

        The first use takes seconds and initialises devices. Under DeepSpeed, or with several
        processes on a CPU, the process group has to exist before.

        Raises:
            UserError: If this machine cannot do what was asked and there is no fallback.
        """
        from llava_ft.args.build import build_training_arguments

        return build_training_arguments(self.flags, self.inherited, self.notes)

    @cached_property
    def attn_implementation(self) -> str:
        """The attention kernel that this machine can run: one of `args/attention.py`'s."""
        from llava_ft.args.build import choose_attention

        return choose_attention(self.model.attn_implementation, self.training, self.notes)


def parse_args(argv: Sequence[str], *, required: Sequence[str] = REQUIRED_TO_TRAIN) -> ParsedArgs:
    """Read a command line, with the YAML file that `--config` names below it.

    Args:
        argv: Without the program's name.
        required: Flags that must have a value for what the caller is about to do.

    Returns:
        The request, with every flag known, of the right type and free of contradictions.

    Raises:
        UserError: Otherwise. The message names key, value, what is allowed and where it was written.
    """
    entries = read_command_line(argv)
    config_entries = [entry for entry in entries if entry.key == "config"]
    switches = [entry for entry in entries if entry.key == "print_config"]
    notes: list[str] = []
    values: _Values = {}
    for entry in config_entries[:1]:
        values.update(_read_source(_read_config(entry), notes))
    if len(config_entries) > 1:
        raise UserError("--config was given twice. One configuration file is allowed; override its values with flags.")
    values.update(_read_source([e for e in entries if e.key not in ("config", "print_config")], notes))
    print_config = any(_convert_entry(entry, ValueType(frozenset({"bool"})), entry.key) for entry in switches)
    return _assemble(values, required, notes, print_config)


def resolved_config(parsed: ParsedArgs) -> dict[str, Any]:
    """Return the configuration as a flat mapping that `--config` takes and that gives the same request again.

    It holds every flag of this program and each field of `transformers.TrainingArguments` that was given,
    except `NOT_RESOLVED`.
    """
    resolved: dict[str, Any] = {}
    for arguments in (parsed.model, parsed.data, parsed.flags):
        resolved.update({f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)})
    resolved.update(parsed.inherited)
    return {name: value for name, value in resolved.items() if name not in NOT_RESOLVED}


def to_yaml(parsed: ParsedArgs) -> str:
    """Return `resolved_config` as YAML text."""
    return write_yaml(resolved_config(parsed))


def _read_config(entry: Entry) -> list[Entry]:
    if not isinstance(entry.value, str) or not entry.value:
        raise UserError("--config needs one file name, such as --config lora.yaml.")
    path = find_config(entry.value)
    if path is None:
        known = ", ".join(known_configs(".yaml")) or "none found"
        raise UserError(
            f"--config {entry.value}: there is no such file. Give the path of a YAML file or one of the "
            f"names in configs: {known}."
        )
    return read_yaml(path)


def _read_source(entries: Sequence[Entry], notes: list[str]) -> _Values:
    """Convert one source's entries.

    Old spellings are translated within their source, so that a flag overrides YAML by meaning, not by name.
    """
    flags = all_flags()
    values: _Values = {}
    for entry in entries:
        if entry.key in flags and entry.key not in legacy.RENAMED:
            values[entry.key] = _convert_entry(entry, flags[entry.key].value_type, entry.key)
    for entry in entries:
        if entry.key in legacy.RENAMED:
            new = legacy.RENAMED[entry.key]
            value = _convert_entry(entry, flags[new].value_type, entry.key)
            if values.get(new, value) != value:
                raise UserError(
                    f"{entry.where}={value} contradicts {new}={values[new]}: they are the same flag. Give one."
                )
            values[new] = value
            notes.append(f"{entry.key} is now called {new}.")
        elif entry.key in legacy.WITHOUT_EFFECT:
            annotation, reason = legacy.WITHOUT_EFFECT[entry.key]
            _convert_entry(entry, parse_annotation(annotation), entry.key)
            notes.append(f"{entry.key} has no effect: {reason}.")
        elif entry.key in legacy.TRANSLATED:
            annotation, translate = legacy.TRANSLATED[entry.key]
            notes.append(translate(_convert_entry(entry, parse_annotation(annotation), entry.key), values))
        elif entry.key not in flags:
            value = _convert_negation(entry, flags)
            if value is None:
                raise _unknown(entry, flags)
            values[entry.key[3:]] = value
    return values


def _convert_negation(entry: Entry, flags: Mapping[str, Flag]) -> bool | str | None:
    """Return the value of `--no_double_quant` and the like, None if the entry is no such flag."""
    name = entry.key.removeprefix("no_")
    if name == entry.key or name not in flags or not entry.is_bare:
        return None
    value_type = flags[name].value_type
    if value_type.switch:
        return value_type.switch[0]
    return False if "bool" in value_type.kinds else None


def _convert_entry(entry: Entry, value_type: ValueType, name: str) -> object:
    if entry.is_bare and "bool" in value_type.kinds:
        return True
    if entry.is_bare and value_type.switch:
        return value_type.switch[1]
    if entry.is_bare:
        raise UserError(f"{entry.where} needs a value. Allowed: {value_type.describe()}.")
    try:
        value = convert(entry.value, value_type)
    except ConversionError as error:
        nearest = _nearest(str(entry.value), [str(choice) for choice in value_type.choices])
        raise UserError(
            f"{entry.where}={_shown(entry.value)}: {error}. Allowed: {value_type.describe()}.{nearest}"
        ) from error
    if name in _STEP_FLAGS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _shown(value: object) -> str:
    return "null" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)  # pyright: ignore[reportUnknownArgumentType]


def _nearest(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def _unknown(entry: Entry, flags: Mapping[str, Flag]) -> UserError:
    if entry.key in ("config", "print_config"):
        return UserError(f"{entry.where} belongs on the command line, as --{entry.key}. Remove it from the file.")
    known = [*flags, *legacy.SPELLINGS, "config", "print_config"]
    hint = _nearest(entry.key, known) or " Flags are those of LLaVA and of transformers.TrainingArguments."
    value = "" if entry.is_bare else f"={_shown(entry.value)}"
    return UserError(f"{entry.where}{value}: there is no such flag.{hint} docs/arguments.md lists them all.")


def _assemble(values: _Values, required: Sequence[str], notes: list[str], print_config: bool) -> ParsedArgs:
    for name in required:
        if name == "model_name_or_path" and (values.get("init_from") or values.get("lora_weight_path")):
            continue  # what the run starts from names its base
        if values.get(name) in (None, ""):
            raise UserError(
                f"{name} is missing. It has no default; give --{name} VALUE or write it into the --config file."
            )
    flags = all_flags()
    inherited = inherited_annotations()

    def build(owner: Callable[..., _Arguments], group: str) -> _Arguments:
        names = {f.name for f in dataclasses.fields(owner)}  # pyright: ignore[reportArgumentType]
        return owner(**{k: v for k, v in values.items() if flags[k].group == group and k in names})

    values.setdefault("model_name_or_path", "")
    model, data = build(ModelArguments, "model"), build(DataArguments, "data")
    training = build(TrainingFlags, "training")
    plain = {k: v for k, v in values.items() if k in inherited and k not in INHERITED_WITH_OWN_DEFAULT}
    notes.extend(_default_evaluation(data, plain))
    check_arguments(model, data, training, plain)
    notes.extend(find_idle_flags(model, data, training))
    return ParsedArgs(model, data, training, plain, notes, print_config)


def _default_evaluation(data: DataArguments, plain: _Values) -> list[str]:
    """Choose when to evaluate if there are validation records and nothing was said about it.

    That is once per epoch, or at every save where the best checkpoint is wanted.
    """
    if data.validation_data_path is None and data.validation_fraction <= 0:
        return []
    if plain.get("eval_strategy") == "no":
        return ["The validation records are never evaluated: eval_strategy=no."]
    if "eval_strategy" in plain:
        return []
    saving = plain.get("save_strategy", "steps")
    if plain.get("load_best_model_at_end") and saving == "steps":
        plain["eval_strategy"] = "steps"
        plain.setdefault("eval_steps", plain.get("save_steps", 500))
    else:
        plain["eval_strategy"] = "epoch"
    return [f"eval_strategy is {plain['eval_strategy']}, because there are validation records."]
