"""Where a run reports besides the terminal: wandb, TensorBoard and the other places that transformers knows.

The reports themselves are made by transformers' callbacks. What is added here:

- Nobody is asked for a login, and no network ends a run: without an API key, or when its server does not answer, wandb
  records offline.
- A reporter that fails is reported once; the run goes on.
- The resolved configuration, the git commit and the table of what is trained are attached to the run.
- A run that is resumed goes on in the same wandb run: its id is kept in `trainer_state.json`.

Only rank 0 reports.
"""

import atexit
import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    WandbCallback,
)

from llava_ft.args import ParsedArgs, resolved_config, to_yaml
from llava_ft.checkpoint.lineage import git_commit
from llava_ft.checkpoint.names import RUN_CONFIG, TRAINABLE_TABLE
from llava_ft.version import __version__

logger = logging.getLogger(__name__)

_EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))
_WANDB_STATE = "WandbRun"
_SECONDS_TO_SEND_THE_REST = 120.0

Table = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class RunDescription:
    """What is attached to a run wherever it is reported."""

    config: dict[str, Any]  # the resolved configuration, flat
    config_yaml: str  # the same as a file for `--config`
    code: dict[str, Any]
    """Version of this program, and state of the repository around the working directory if there is one."""
    table: Table  # rows of the table of what is trained


def attach_reporters(trainer: Trainer, args: ParsedArgs, table: Callable[[], Table]) -> None:
    """Make the trainer's reporters safe for long runs, and let them carry the description of the run.

    Args:
        trainer: Already has transformers' callbacks for `report_to`.
        args: The request.
        table: Returns the table of what is trained; asked when the training begins, because the optimizer makes it.
    """
    training = trainer.args
    if training.run_name is None:
        training.run_name = os.environ.get("WANDB_NAME") or Path(training.output_dir or ".").resolve().name

    def describe() -> RunDescription:
        code: dict[str, Any] = {"llava_ft_version": __version__}
        commit, _, modified = git_commit(Path.cwd()).partition(" ")
        if commit:
            code |= {"git_commit": commit, "git_modified": bool(modified)}
        return RunDescription(resolved_config(args), to_yaml(args), code, table())

    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    callbacks = trainer.callback_handler.callbacks
    for callback in list(callbacks):
        if type(callback) not in names:
            continue
        position = callbacks.index(callback)
        if not trainer.is_world_process_zero():
            del callbacks[position]
            continue
        if isinstance(callback, TensorBoardCallback) and args.flags.logging_dir:
            callback.logging_dir = os.path.expanduser(args.flags.logging_dir)
        kinds = {TensorBoardCallback: TensorBoardReporter, WandbCallback: WandbReporter}
        kind = kinds.get(type(callback), GuardedReporter)
        callbacks[position] = kind(names[type(callback)], callback, describe)


class GuardedReporter(TrainerCallback):
    """Passes every event on to a reporter. Its errors are told once and never end the run.

    Args:
        name: As in `--report_to`.
        reporter: The callback that reports.
        describe: Returns what is attached to the run.
    """

    def __init__(self, name: str, reporter: Any, describe: Callable[[], RunDescription]):
        self.name = name
        self.reporter = reporter
        self._describe = describe
        self._is_open = False
        self._has_ended = False
        self._has_failed = False
        for event in _EVENTS:
            setattr(self, event, partial(self._pass_on, event))

    def prepare(self, args: TrainingArguments, state: TrainerState) -> None:
        """Open the place to report to, before the reporter does."""

    def attach(self, description: RunDescription) -> None:
        """Add the description to what the reporter has opened."""

    def _pass_on(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Pass an event on; none before the place to report to is open, lest the reporter opens it in its own way."""
        report = partial(getattr(self.reporter, event), args, state, control, **kwargs)
        self._has_ended = event == "on_train_end"
        if event != "on_train_begin":
            return self._guarded(report)[1] if self._is_open else None
        self._is_open, result = self._guarded(lambda: self.prepare(args, state))
        if self._is_open:
            self._is_open, result = self._guarded(report)
        if self._is_open:
            self._guarded(lambda: self.attach(self._describe()))
        return result

    def _guarded(self, function: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, function()
        except Exception as error:  # whatever a service or a full disk makes of it
            if not self._has_failed:
                logger.warning(
                    "Reporting to %s failed: %s: %s. The run goes on; its log is in trainer_state.json of every "
                    "checkpoint.",
                    self.name,
                    type(error).__name__,
                    str(error).strip() or "no message",
                )
            self._has_failed = True
            return False, None


class TensorBoardReporter(GuardedReporter):
    """TensorBoard with the description as texts."""

    def attach(self, description: RunDescription) -> None:
        """Write the texts."""
        writer = self.reporter.tb_writer
        code = "\n".join(f"- {name}: {value}" for name, value in description.code.items())
        writer.add_text("run_config", f"```yaml\n{description.config_yaml}```")
        writer.add_text("code", code)
        writer.add_text("trainable_parameters", _markdown(description.table))
        writer.flush()


class WandbReporter(GuardedReporter):
    """wandb with the description as configuration and files.

    The environment variables of wandb are obeyed. Where they say nothing, the project is `llava_ft`, files go below
    the output directory, and what could not be sent two minutes after the end stays there for `wandb sync`.
    """

    def prepare(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start the run, or go on with the one that the checkpoint names."""
        import wandb

        if wandb.run is not None:
            return
        states = cast(dict[str, Any], state.stateful_callbacks)
        known = states.get(_WANDB_STATE, {}).get("attributes", {}).get("id")
        run = _start_wandb(args, known)
        atexit.register(self._finish)  # after wandb has registered its own way to end, so before that in turn
        if not run.disabled:
            states[_WANDB_STATE] = {"args": {}, "attributes": {"id": run.id}}

    def attach(self, description: RunDescription) -> None:
        """Add the description."""
        import wandb

        run = wandb.run
        assert run is not None
        table = {"trainable_parameters": list(description.table)}
        run.config.update({"run_config": description.config, **table, **description.code}, allow_val_change=True)
        run.summary["trained_parameters"] = sum(row["parameters"] for row in description.table if row["trained"])
        files = {RUN_CONFIG: description.config_yaml, TRAINABLE_TABLE: json.dumps(description.table, indent=1)}
        for name, text in files.items():
            path = Path(run.dir, name)
            path.write_text(text, encoding="utf-8")
            run.save(str(path), base_path=run.dir, policy="now")

    def _finish(self) -> None:
        """Tell how the run ended. wandb would learn it from `sys.exit`, but looks for it too late."""
        import wandb

        if wandb.run is not None:
            self._guarded(lambda: wandb.finish(exit_code=0 if self._has_ended else 1))


def _start_wandb(args: TrainingArguments, known_id: str | None) -> Any:
    """Start a wandb run; offline if there is no API key, or if its server does not answer.

    Args:
        args: Of the run.
        known_id: The wandb run that a resumed run belongs to.
    """
    import wandb

    given = wandb.setup().settings
    output_dir = Path(args.output_dir or ".").resolve()
    limits: dict[str, Any] = (
        {} if "WANDB_FINISH_TIMEOUT" in os.environ else {"finish_timeout": _SECONDS_TO_SEND_THE_REST}
    )
    options: dict[str, Any] = {"settings": wandb.Settings(**limits)}
    options["project"] = given.project or "llava_ft"
    options["name"] = args.run_name
    if "WANDB_DIR" not in os.environ:
        output_dir.mkdir(parents=True, exist_ok=True)
        options["dir"] = str(output_dir)
    if "WANDB_RUN_ID" not in os.environ:
        options["id"] = known_id or secrets.token_hex(4)
        if known_id and "WANDB_RESUME" not in os.environ:
            options["resume"] = "allow"
    if given.mode in ("disabled", "offline", "dryrun"):
        return wandb.init(**options)
    try:
        if wandb.login(prompt=False, verify=False):
            return wandb.init(**options)
        reason = "no API key was found in WANDB_API_KEY, ~/.netrc or wandb's settings (`wandb login` writes one)"
    except Exception as error:  # wandb has many kinds, and the run must not depend on any
        reason = f"{type(error).__name__}: {str(error).strip()}"
        wandb.teardown()  # it holds on to the run's id
    run = wandb.init(**options, mode="offline")
    logger.warning(
        "wandb records this run offline: %s. Send it later with: wandb sync %s", reason, run.settings.sync_dir
    )
    return run


def _markdown(table: Table) -> str:
    if not table:
        return ""
    lines = [list(table[0]), ["---"] * len(table[0]), *([str(value) for value in row.values()] for row in table)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
