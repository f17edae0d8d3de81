"""From a command line and a YAML file to checked arguments; opens no weights or data and uses no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from llava_ft.args import legacy
from llava_ft.args.checks import check_arguments, find_idle_flags
from llava_ft.args.data import DataArguments
from llava_ft.args.flags import all_flags
from llava_ft.args.model import ModelArguments
from llava_ft.args.sources import Entry, find_config, known_configs, read_command_line, read_yaml, write_yaml
from llava_ft.args.training import TrainingFlags
from llava_ft.args.value_types import ConversionError, ValueType
from llava_ft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from llava_ft.args.build import TrainingArguments

REQUIRED_TO_TRAIN: Final = ("model_name_or_path", "data_path", "output_dir")
"""Flags without which no training run can start."""

NOT_RESOLVED: Final = frozenset({"hub_token", "local_rank"})
"""Never written down: a secret, and a number that differs in every process."""

_STEP_FLAGS: Final = frozenset({"warmup_steps", "save_steps", "logging_steps", "eval_steps", "eval_delay"})
"""Numbers that are a share below 1 and whole otherwise."""

_OF_THE_COMMAND_LINE: Final = ("config", "print_config")

_Arguments = TypeVar("_Arguments")


@dataclass(frozen=True)
class ParsedArgs:
    """A checked request."""

    model: ModelArguments
    data: DataArguments
    flags: TrainingFlags  # typed; no device has been touched for them
    inherited: Mapping[str, object]  # fields of `transformers.TrainingArguments` that were given, plain and checked
    notes: list[str] = field(default_factory=list[str], compare=False)
    """What the user should be told: translated spellings and flags without effect. Devices add to it."""
    print_config: bool = field(default=False, compare=False)  # whether that is all that is asked for
    kernel: str | None = field(default=None, compare=False)
    """The attention kernel, once it is settled for the model; None leaves it to the machine."""
    _machine: dict[str, Any] = field(default_factory=dict[str, Any], compare=False, repr=False)
    """What was asked of this machine. Requests derived from this one have it too, so devices are initialised once."""

    def with_model(self, model_name_or_path: str) -> ParsedArgs:
        """Return the same request for another base."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, model_name_or_path=model_name_or_path))

    def with_attention(self, kernel: str) -> ParsedArgs:
        """Return the same request with another attention kernel."""
        return dataclasses.replace(self, kernel=kernel)

    @property
    def training(self) -> TrainingArguments:
        """The training arguments as transformers wants them.

        The first use takes seconds and initialises devices. Under DeepSpeed, or with several
        processes on a CPU, the process group has to exist before.

        Raises:
            UserError: If this machine cannot do what was asked and there is no fallback.
        """
        if "training" not in self._machine:
            from llava_ft.args.build import build_training_arguments

            self._machine["training"] = build_training_arguments(self.flags, self.inherited, self.notes)
        return self._machine["training"]

    @property
    def attn_implementation(self) -> str:
        """The attention kernel that this machine can run: one of `args/attention.py`'s."""
        if self.kernel is None and "kernel" not in self._machine:
            from llava_ft.args.attention import choose_kernel, this_machine

            training = self.training
            machine = this_machine(has_gpu=not training.use_cpu, is_half=bool(training.bf16 or training.fp16))
            self._machine["kernel"] = choose_kernel(self.model.attn_implementation, machine, self.notes)
        return self.kernel or self._machine["kernel"]


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
    notes: list[str] = []
    values: dict[str, object] = {}
    asked = [_value(entry, ValueType.of(bool)) for entry in entries if entry.key == "print_config"]
    configs = [entry for entry in entries if entry.key == "config"]
    if len(configs) > 1:
        raise UserError("--config was given twice. One configuration file is allowed; override its values with flags.")
    for entry in configs:
        values |= _read_source(_read_config(entry), notes)
    values |= _read_source([entry for entry in entries if entry.key not in _OF_THE_COMMAND_LINE], notes)

    for name in required:
        if name == "model_name_or_path" and (values.get("init_from") or values.get("lora_weight_path")):
            continue  # what the run starts from names its base
        if values.get(name) in (None, ""):
            raise UserError(
                f"{name} is missing. It has no default; give --{name} VALUE or write it into the --config file."
            )
    values.setdefault("model_name_or_path", "")
    model, data, flags = _take(values, ModelArguments), _take(values, DataArguments), _take(values, TrainingFlags)
    inherited = values  # what is left: fields of transformers' own
    notes.extend(_default_evaluation(data, inherited))
    check_arguments(model, data, flags, inherited)
    notes.extend(find_idle_flags(model, data, flags))
    return ParsedArgs(model, data, flags, inherited, notes, print_config=bool(asked and asked[-1]))


def resolved_config(parsed: ParsedArgs) -> dict[str, Any]:
    """Return the configuration as a flat mapping that `--config` takes and that gives the same request again.

    It holds every flag of this program and each field of `transformers.TrainingArguments` that was given,
    except `NOT_RESOLVED`.
    """
    resolved = {**vars(parsed.model), **vars(parsed.data), **vars(parsed.flags), **parsed.inherited}
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


def _read_source(entries: Sequence[Entry], notes: list[str]) -> dict[str, object]:
    """Convert one source's entries.

    Old spellings are translated within their source, so that a flag overrides YAML by meaning, not by name. They come
    last, because they are compared with what the same source says under the new name.
    """
    flags, values = all_flags(), dict[str, object]()
    for entry in sorted(entries, key=lambda entry: entry.key in legacy.SPELLINGS):
        key = entry.key
        if key in legacy.SPELLINGS:
            kind = flags[legacy.RENAMED[key]] if key in legacy.RENAMED else ValueType.of(legacy.SPELLINGS[key])
            notes.append(legacy.translate(key, _value(entry, kind), values, entry.where))
        elif key in flags:
            values[key] = _value(entry, flags[key])
        else:
            name = key.removeprefix("no_")  # --no_double_quant and the like
            kind = flags.get(name)
            if name == key or kind is None or not entry.is_bare or not (kind.switch or "bool" in kind.kinds):
                raise _unknown(entry)
            values[name] = kind.switch[0] if kind.switch else False
    return values


def _value(entry: Entry, kind: ValueType) -> object:
    if entry.is_bare and "bool" in kind.kinds:
        return True
    if entry.is_bare and kind.switch:
        return kind.switch[1]
    if entry.is_bare:
        raise UserError(f"{entry.where} needs a value. Allowed: {kind.describe()}.")
    try:
        value = kind.convert(entry.value)
    except ConversionError as error:
        nearest = did_you_mean(str(entry.value), [str(choice) for choice in kind.choices])
        raise UserError(f"{entry.where}={_shown(entry)}: {error}. Allowed: {kind.describe()}.{nearest}") from error
    if entry.key in _STEP_FLAGS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _shown(entry: Entry) -> str:
    value = entry.value
    return "null" if value is None else " ".join(value) if isinstance(value, list) else str(value)


def _unknown(entry: Entry) -> UserError:
    if entry.key in _OF_THE_COMMAND_LINE:
        return UserError(f"{entry.where} belongs on the command line, as --{entry.key}. Remove it from the file.")
    known = [*all_flags(), *legacy.SPELLINGS, *_OF_THE_COMMAND_LINE]
    hint = did_you_mean(entry.key, known, " Flags are those of LLaVA and of transformers.TrainingArguments.")
    value = "" if entry.is_bare else f"={_shown(entry)}"
    return UserError(f"{entry.where}{value}: there is no such flag.{hint} docs/reference/arguments.md lists them all.")


def _take(values: dict[str, object], owner: Callable[..., _Arguments]) -> _Arguments:
    """Build a class of arguments from those values that are its fields, and take them out."""
    names = {f.name for f in dataclasses.fields(owner)}  # pyright: ignore[reportArgumentType]
    return owner(**{name: values.pop(name) for name in list(values) if name in names})


def _default_evaluation(data: DataArguments, plain: dict[str, object]) -> list[str]:
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
