"""Reports to wandb and TensorBoard: what arrives there, and that no failure of theirs ends a run."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers.integrations import TensorBoardCallback

from llava_ft.args import parse_args
from llava_ft.checkpoint.lineage import git_commit
from llava_ft.checkpoint.manifest import read_manifest, what_is_incomplete
from llava_ft.errors import UserError
from llava_ft.training.reporting import GuardedReporter, attach_reporters
from llava_ft.training.run import prepare_run
from tests.training.helpers import flags, prepare, start, train
from tests.training.wandb_server import WandbServer, read_run

wandb = pytest.importorskip("wandb")
tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

SHORT = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1}
KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def surroundings(in_recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings of the user, no key, no run left open."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "TENSORBOARD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # it would go on in this process when the run's service is dead
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # wandb puts its own there with each run
    (tmp_path / "home").mkdir()
    yield
    wandb.run = None
    with contextlib.suppress(ConnectionError):  # the service of a test is dead
        wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield running


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def events(folder: Path) -> tensorboard.EventAccumulator:
    return tensorboard.EventAccumulator(str(folder)).Reload()


def end_of_process() -> None:
    """Finish the run as the end of a process does. Files are whole only after the teardown."""
    wandb.finish()
    wandb.teardown()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this program said about reporting."""
    return [r.getMessage() for r in caplog.records if r.name == "llava_ft.training.reporting"]


def texts(found: tensorboard.EventAccumulator) -> dict[str, str]:
    return {
        name.removesuffix("/text_summary"): found.Tensors(name)[0].tensor_proto.string_val[0].decode()
        for name in found.Tags()["tensors"]
    }


class TestWandbOffline:
    def test_without_a_key_the_run_is_recorded_with_its_description(self, tmp_path: Path, caplog, monkeypatch):
        monkeypatch.setattr("sys.stdin", None)
        before = sorted(Path.cwd().iterdir())
        with caplog.at_level(logging.INFO, "llava_ft"):
            run = train(tmp_path / "first run", report_to="wandb", **SHORT)
        end_of_process()
        folder = only(tmp_path / "first run/wandb", "offline-run-*")
        (note,) = told(caplog)
        assert note.startswith("wandb records this run offline: no API key was found in WANDB_API_KEY")
        assert note.endswith(f"wandb sync {folder}")
        assert sorted(Path.cwd().iterdir()) == before

        stored = read_run(folder)
        assert (stored.name, stored.project) == ("first run", "llava_ft")
        losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
        assert [line["train/loss"] for line in stored.history.values() if "train/loss" in line] == losses
        resolved = yaml.safe_load((folder / "files/run_config.yaml").read_text())
        assert resolved == yaml.safe_load((tmp_path / "first run/run_config.yaml").read_text())
        assert stored.config["run_config"]["lora_r"] == resolved["lora_r"] == 4
        commit, _, modified = git_commit(Path.cwd()).partition(" ")
        assert (stored.config["git_commit"], stored.config["git_modified"]) == (commit, bool(modified))
        table = json.loads((tmp_path / "first run/trainable_parameters.json").read_text())
        assert stored.config["trainable_parameters"] == table
        assert json.loads((folder / "files/trainable_parameters.json").read_text()) == table
        assert {"run_config.yaml", "trainable_parameters.json"} <= stored.files

    def test_a_result_is_complete_whatever_wandb_still_writes_beside_it(self, tmp_path: Path):
        train(tmp_path / "out", report_to="wandb", **SHORT)
        end_of_process()
        manifest = read_manifest(tmp_path / "out")
        assert manifest is not None
        assert not [name for name in manifest.files if "wandb" in name]
        assert what_is_incomplete(tmp_path / "out") is None
        assert manifest.git_commit == git_commit(Path.cwd())

    def test_a_resumed_run_goes_on_in_the_same_one(self, tmp_path: Path, server: WandbServer, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        for steps in (2, 4):
            train(tmp_path / "out", report_to="wandb", **SHORT | {"max_steps": steps})
            end_of_process()
        folders = sorted((tmp_path / "out/wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime)
        assert len({folder.name.split("-")[3] for folder in folders}) == 1  # a second one in a second ends with -1
        wandb_sync(*folders)
        (stored,) = server.runs.values()
        steps = [line["train/global_step"] for _, line in sorted(stored.history.items()) if "train/loss" in line]
        assert steps == [1, 2, 3, 4]

    def test_disabled_writes_nothing(self, tmp_path: Path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "disabled")
        run = train(tmp_path / "out", report_to="wandb", **SHORT)
        assert run.trainer.state.global_step == 2
        assert not (tmp_path / "out/wandb").exists()
        assert "WandbRun" not in run.trainer.state.stateful_callbacks

    def test_its_own_variables_are_obeyed(self, tmp_path: Path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_PROJECT", "mine")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
        monkeypatch.setenv("WANDB_RUN_ID", "chosen")
        train(tmp_path / "out", report_to="wandb", run_name="named", **SHORT)
        end_of_process()
        folder = only(tmp_path / "elsewhere/wandb", "offline-run-*-chosen")
        assert (read_run(folder).name, read_run(folder).project) == ("named", "mine")

    def test_a_mode_that_wandb_does_not_know(self, tmp_path: Path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "ofline")
        with pytest.raises(UserError, match=r"WANDB_MODE=ofline in the environment: wandb knows online, offline"):
            prepare(tmp_path / "out", report_to="wandb")


class TestWandbOnline:
    def test_what_is_sent(self, tmp_path: Path, server: WandbServer):
        for steps in (2, 4):
            run = train(tmp_path / "out", report_to="wandb", **SHORT | {"max_steps": steps})
            end_of_process()
        ((identifier, stored),) = server.runs.items()
        assert run.trainer.state.stateful_callbacks["WandbRun"]["attributes"]["id"] == identifier
        assert (stored.name, stored.project) == ("out", "llava_ft")
        steps = [line["train/global_step"] for _, line in sorted(stored.history.items()) if "train/loss" in line]
        assert steps == [1, 2, 3, 4]
        assert stored.config["run_config"]["value"]["max_steps"] == 4
        assert {"run_config.yaml", "trainable_parameters.json"} <= stored.files
        assert "RunResumeStatus" in server.operations

    def test_asked_for_but_without_a_key(self, tmp_path: Path, server: WandbServer, monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY")
        monkeypatch.setenv("WANDB_MODE", "online")
        train(tmp_path / "out", report_to="wandb", **SHORT)
        assert only(tmp_path / "out/wandb", "offline-run-*")
        assert server.runs == {}

    @pytest.mark.slow
    def test_a_server_that_does_not_answer(self, tmp_path: Path, monkeypatch, caplog):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setenv("WANDB_API_KEY", KEY)
            monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
            run = train(tmp_path / "out", report_to="wandb", **SHORT)
        end_of_process()
        assert run.trainer.state.global_step == 2
        (note,) = told(caplog)
        assert note.startswith("wandb records this run offline: CommError: Timed out")
        stored = read_run(only(tmp_path / "out/wandb", "offline-run-*"))
        assert len([line for line in stored.history.values() if "train/loss" in line]) == 2

    @pytest.mark.slow
    def test_a_server_that_goes_away_delays_the_end_by_a_bounded_time(self, tmp_path: Path, monkeypatch):
        with WandbServer() as server:
            environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_FINISH_TIMEOUT": "3"}
            process = start(flags(tmp_path / "out", report_to="wandb", **SHORT | {"max_steps": 30}), **environment)
            while process.poll() is None and not any(run.history for run in server.runs.values()):
                time.sleep(0.02)
        _, messages = process.communicate(timeout=120)
        assert process.returncode == 0, messages
        assert what_is_incomplete(tmp_path / "out") is None

    @pytest.mark.slow
    def test_a_failed_run_is_marked_as_failed(self, tmp_path: Path):
        argv = flags(tmp_path / "out", report_to="wandb", learning_rate="1e30", max_grad_norm="0", **SHORT)
        process = start(argv, WANDB_MODE="offline")
        _, messages = process.communicate(timeout=120)
        assert process.returncode == 1, messages
        assert read_run(only(tmp_path / "out/wandb", "offline-run-*")).exit_code == 1


class TestTensorBoard:
    def test_scalars_and_texts(self, tmp_path: Path):
        run = train(tmp_path / "out", report_to="tensorboard", **SHORT)
        found = events(only(tmp_path / "out/runs", "*"))
        losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
        assert [scalar.value for scalar in found.Scalars("train/loss")] == pytest.approx(losses)
        assert [scalar.step for scalar in found.Scalars("train/tokens_per_second")] == [1, 2]
        written = texts(found)
        resolved = written["run_config"].removeprefix("```yaml\n").removesuffix("```")
        assert resolved == (tmp_path / "out/run_config.yaml").read_text()
        assert git_commit(Path.cwd()).partition(" ")[0] in written["code"]
        table = json.loads((tmp_path / "out/trainable_parameters.json").read_text())
        lines = written["trainable_parameters"].splitlines()
        assert [line.split(" | ")[2] for line in lines[2:]] == [str(row["parameters"]) for row in table]

    @pytest.mark.parametrize("way", ["flag", "variable"])
    def test_another_folder(self, way: str, tmp_path: Path, monkeypatch):
        logs = {"logging_dir": str(tmp_path / "logs")} if way == "flag" else {}
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / ("other" if way == "flag" else "logs")))
        train(tmp_path / "out", report_to="tensorboard", **logs, **SHORT)
        assert events(tmp_path / "logs").Scalars("train/loss")
        assert not (tmp_path / "out/runs").exists()
        assert not (tmp_path / "other").exists()


class TestFailures:
    def test_a_failing_reporter_is_told_once_and_the_others_go_on(self, tmp_path: Path, monkeypatch, caplog):
        from torch.utils.tensorboard import SummaryWriter

        def full(*args: object, **kwargs: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
        argv = flags(tmp_path / "out", **SHORT)
        args = parse_args([*argv, "--report_to", "tensorboard", "wandb"])
        run = prepare_run(args)
        run.trainer.train()
        end_of_process()
        assert run.trainer.state.global_step == 2
        (warning,) = told(caplog)
        assert warning.startswith("Reporting to tensorboard failed: OSError: No space left on device. The run goes on")
        stored = read_run(only(tmp_path / "out/wandb", "offline-run-*"))
        assert len([line for line in stored.history.values() if "train/loss" in line]) == 2

    def test_wandb_dies(self, tmp_path: Path, monkeypatch, caplog):
        monkeypatch.setenv("WANDB_MODE", "offline")
        run = prepare(tmp_path / "out", report_to="wandb", **SHORT | {"max_steps": 4})
        (reporter,) = [c for c in run.trainer.callback_handler.callbacks if isinstance(c, GuardedReporter)]
        plain_attach = reporter.attach

        def attach_and_die(description):
            plain_attach(description)
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)

        monkeypatch.setattr(reporter, "attach", attach_and_die)
        run.trainer.train()
        assert run.trainer.state.global_step == 4
        (warning,) = told(caplog)
        assert warning.startswith("Reporting to wandb failed: ")

    def test_a_reporter_that_could_not_begin_is_left_alone(self, tmp_path: Path, monkeypatch, caplog):
        def broken(**options: object) -> None:
            raise RuntimeError("broken")

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setattr(wandb, "init", broken)
        run = train(tmp_path / "out", report_to="wandb", **SHORT)
        assert run.trainer.state.global_step == 2
        (warning,) = told(caplog)
        assert warning.startswith("Reporting to wandb failed: ")


class TestPlaces:
    def reporters(self, run) -> set[str]:
        return {c.name for c in run.trainer.callback_handler.callbacks if isinstance(c, GuardedReporter)}

    def test_all_is_what_is_installed(self, tmp_path: Path):
        assert {"wandb", "tensorboard"} <= self.reporters(prepare(tmp_path / "out", report_to="all"))

    def test_none(self, tmp_path: Path):
        assert self.reporters(prepare(tmp_path / "out", report_to="none")) == set()
        assert self.reporters(prepare(tmp_path / "out")) == set()

    def test_only_the_first_rank_reports(self, tmp_path: Path, monkeypatch):
        run = prepare(tmp_path / "out", report_to="tensorboard")
        run.trainer.add_callback(TensorBoardCallback())
        monkeypatch.setattr(run.trainer, "is_world_process_zero", lambda: False)
        attach_reporters(run.trainer, parse_args(flags(tmp_path / "out")), list)
        assert not [c for c in run.trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ["wanbd"],
                r"report_to=wanbd: there is no such place. Known are none, all, .*tensorboard.*Did you mean wandb",
            ),
            (["none", "wandb"], r"report_to=none wandb: none stands alone. Leave it out, or name nothing else."),
        ],
    )
    def test_names_that_cannot_be_meant(self, names: list[str], message: str, tmp_path: Path):
        parsed = parse_args([*flags(tmp_path / "out"), "--report_to", *names])
        with pytest.raises(UserError, match=message):
            _ = parsed.training


def wandb_sync(*folders: Path) -> None:
    """Run `wandb sync` as the note says; it writes a log of its own where it runs."""
    command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SILENT")}
    done = subprocess.run(
        command, env=environment, cwd=folders[0], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
