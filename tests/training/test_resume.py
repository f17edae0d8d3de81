"""Resuming: bit-equal, complete, and never from something half-written."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from llava_ft.args.flags import all_flags
from llava_ft.checkpoint.manifest import what_is_incomplete
from llava_ft.checkpoint.restore import restore_trained
from llava_ft.checkpoint.resume import IntegrityCheck, newest_complete_checkpoint
from llava_ft.errors import CheckpointError, RunError, UserError
from llava_ft.training.changed_settings import FIXED, FREE
from tests.conftest import RECORDINGS
from tests.training.helpers import REPOSITORY, flags, prepare, start, state_of, train, write_records

pytestmark = pytest.mark.usefixtures("in_recordings")

METHODS = ["lora", "projector", "full"]


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_and_three_more_are_six(tmp_path: Path, method: str):
    straight = train(tmp_path / "straight", method)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    resumed = train(tmp_path / "stopped", method)
    assert resumed.checkpoint == tmp_path / "stopped/checkpoint-3"
    expected, got = state_of(straight), state_of(resumed)
    assert set(expected) == set(got)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    losses = [
        [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry] for run in (straight, resumed)
    ]
    assert losses[0] == losses[1]


def test_resuming_in_a_later_epoch_continues_with_the_same_records(tmp_path: Path):
    steps = {"max_steps": 12, "save_steps": 9}
    straight = train(tmp_path / "straight", **steps)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-12")
    resumed = train(tmp_path / "stopped", **steps)
    expected, got = state_of(straight), state_of(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_resuming_with_accumulation_and_workers(tmp_path: Path):
    changes = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "train_sampling_strategy": "random"}
    changes["group_by_modality_length"] = "False"
    straight = train(tmp_path / "straight", **changes)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    resumed = train(tmp_path / "stopped", **changes)
    expected, got = state_of(straight), state_of(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_longer_run_continues_on_its_own_schedule(tmp_path: Path):
    """A finished run, started again with more steps, does not begin at the rate of zero that it ended with."""
    schedule = {"lr_scheduler_type": "linear", "save_steps": 3}
    train(tmp_path / "out", max_steps=3, **schedule)
    resumed = train(tmp_path / "out", max_steps=6, **schedule)
    assert resumed.checkpoint == tmp_path / "out/checkpoint-3"
    rates = [entry["learning_rate"] for entry in resumed.trainer.state.log_history if "learning_rate" in entry]
    assert rates[3:] == pytest.approx([1e-3 * 3 / 6, 1e-3 * 2 / 6, 1e-3 * 1 / 6])


@pytest.mark.parametrize("state", [{"python": random.getstate()}, {"python": 1, "numpy": 2, "cpu": 3}])
def test_incomplete_random_numbers_are_named(tmp_path: Path, state: dict):
    train(tmp_path / "out", max_steps=1, save_steps=1)
    checkpoint = tmp_path / "out/checkpoint-1"
    (checkpoint / "llava_ft.json").unlink()
    torch.save(state, checkpoint / "rng_state.pth")
    with pytest.raises(CheckpointError, match=r"random numbers .* incomplete .* Remove its rng_state"):
        train(tmp_path / "out", max_steps=2, save_steps=1, resume_from_checkpoint=str(checkpoint))
    (checkpoint / "rng_state.pth").unlink()
    run = train(tmp_path / "out", max_steps=2, save_steps=1, resume_from_checkpoint=str(checkpoint))
    assert run.trainer.state.global_step == 2


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestChangedSettings:
    """What a command says otherwise than the checkpoint's: it takes effect and is noted, or is refused."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("settings") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(RECORDINGS)
            train(path, max_steps=1, save_steps=1, lr_scheduler_type="constant")
        return path

    @pytest.fixture
    def output(self, trained: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(trained, tmp_path / "out"))

    def resume(self, output: Path, **changes: object):
        return train(output, **{"max_steps": 2, "save_steps": 5, "lr_scheduler_type": "constant"} | changes)

    def test_a_learning_rate_takes_effect(self, output: Path, caplog: pytest.LogCaptureFixture):
        run = self.resume(output, learning_rate=3e-4, mm_projector_lr=7e-5, dataloader_num_workers=1)
        assert (
            "Changed since checkpoint-1: learning_rate 0.001 -> 0.0003, max_steps 1 -> 2, mm_projector_lr"
            in caplog.text
        )
        assert "dataloader_num_workers" not in caplog.text
        last = [entry for entry in run.trainer.state.log_history if "learning_rate" in entry][-1]
        assert (last["learning_rate"], last["mm_projector_lr"]) == (3e-4, 7e-5)

    def test_other_records_are_noted(self, output: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        records = json.loads(Path("data/mix.json").read_text())
        self.resume(output, data_path=write_records(tmp_path / "mix.json", records[1:]))
        assert "mix.json (13 usable now) are another file than then" in caplog.text

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"version": "plain"}, "version v1 -> plain"),
            ({"optim": "adafactor"}, "optim adamw_torch -> adafactor"),
            ({"image_aspect_ratio": "square"}, "image_aspect_ratio pad -> square"),
            ({"lora_alpha": 3}, r"lora_alpha \d+ -> 3"),
        ],
    )
    def test_what_the_learnt_belongs_to_is_refused(self, output: Path, changes: dict, message: str):
        with pytest.raises(CheckpointError, match=rf"{message}.*start a new run from its weights, with --init_from"):
            self.resume(output, **changes)

    def test_another_configuration_of_the_base_is_refused(self, output: Path, tmp_path: Path):
        base = Path(shutil.copytree("ckpt/base-llm", tmp_path / "base"))
        fields = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(fields | {"rope_theta": 500000.0}))
        with pytest.raises(CheckpointError, match=r"rope_theta 10000.0 -> 500000.0"):
            self.resume(output, model_name_or_path=base)

    def test_every_flag_is_in_one_group_and_on_the_page(self):
        known = set(all_flags())
        assert known >= FIXED | FREE
        assert not FIXED & FREE
        page = (REPOSITORY / "docs/how-to/resume.md").read_text()
        for names in (FIXED, FREE):
            assert ", ".join(f"`{name}`" for name in sorted(names)) in page.replace("\n", " ")


class TestDamage:
    """A file of a checkpoint that is not as it was written is named before anything is restored from it."""

    def test_each_file_of_a_checkpoint_is_compared(self, tmp_path: Path):
        train(tmp_path / "out", max_steps=1, save_steps=1)
        checkpoint = tmp_path / "out/checkpoint-1"
        names = sorted(path.name for path in checkpoint.iterdir() if path.name != "llava_ft.json")
        assert {"adapter_model.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} < set(names)
        for name in names:
            content = (checkpoint / name).read_bytes()
            flip_a_byte(checkpoint / name)
            with IntegrityCheck() as integrity:
                integrity.start(checkpoint)
                with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                    integrity.finish()
            (checkpoint / name).write_bytes(content)
        flip_a_byte(checkpoint / "optimizer.pt")
        with pytest.raises(CheckpointError, match=r"optimizer\.pt is damaged: its content is not what was written"):
            prepare(tmp_path / "out", max_steps=2, save_steps=1)


COMPLETE = {
    "lora": {"adapter_model.bin", "non_lora_trainables.bin", "adapter_config.json"},
    "projector": {"mm_projector.bin"},
    "full": {"model.safetensors"},
}
SURROUNDINGS = {
    "config.json",
    "llava_ft.json",
    "preprocessor_config.json",
    "run_config.yaml",
    "tokenizer.model",
    "tokenizer_config.json",
    "trainable_parameters.json",
    "trainer_state.json",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_save_is_complete(tmp_path: Path, method: str):
    train(tmp_path / "out", method)
    for directory in (tmp_path / "out/checkpoint-3", tmp_path / "out/checkpoint-6", tmp_path / "out"):
        names = {path.name for path in directory.iterdir()}
        assert names >= COMPLETE[method] | SURROUNDINGS
        assert what_is_incomplete(directory) is None
        if directory.name.startswith("checkpoint"):
            assert names >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert not list((tmp_path / "out").glob(".*"))


def test_a_lora_run_that_lost_its_projector_is_not_resumed_silently(tmp_path: Path):
    train(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    (tmp_path / "out/checkpoint-3/non_lora_trainables.bin").unlink()
    assert newest_complete_checkpoint(tmp_path / "out") is None
    with pytest.raises(CheckpointError, match=r"incomplete: non_lora_trainables\.bin is missing"):
        prepare(tmp_path / "out", resume_from_checkpoint=tmp_path / "out/checkpoint-3")


def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(tmp_path: Path):
    train(tmp_path / "out")
    for change, message in [
        ({"lora_r": 8}, "lora_r 4 -> 8"),
        ({"freeze_mm_mlp_adapter": True, "mm_projector_lr": None}, "freeze_mm_mlp_adapter False -> True"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules .* -> "),
    ]:
        with pytest.raises((CheckpointError, UserError), match=message):
            train(tmp_path / "out", **change)


def test_the_newest_complete_checkpoint_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(tmp_path / "out")
    newest = tmp_path / "out/checkpoint-6"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-100])
    assert newest_complete_checkpoint(tmp_path / "out") == tmp_path / "out/checkpoint-3"
    assert "checkpoint-6 is not resumed from: optimizer.pt has" in caplog.text


def test_what_to_resume_from_can_be_named(tmp_path: Path):
    train(tmp_path / "out")
    run = prepare(tmp_path / "out", resume_from_checkpoint=tmp_path / "out/checkpoint-3")
    assert run.checkpoint == tmp_path / "out/checkpoint-3"
    anew = {"resume_from_checkpoint": "False", "overwrite_output_dir": "True"}
    assert prepare(tmp_path / "out", **anew).checkpoint is None
    with pytest.raises(CheckpointError, match=r"does not exist. Give one of the checkpoint-N"):
        prepare(tmp_path / "out", resume_from_checkpoint=tmp_path / "out/checkpoint-99")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        prepare(tmp_path / "out", resume_from_checkpoint="ckpt/base-llm")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        prepare(tmp_path / "empty", resume_from_checkpoint="True")


def test_a_failed_save_leaves_earlier_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = prepare(tmp_path / "out")
    original = torch.save

    def full_disk(content, path, *args, **kwargs):
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        return original(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(RunError, match=r"checkpoint-6 could not be written: .*No space left on device"):
        run.trainer.train()
    run.stop.release()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-3"}
    assert what_is_incomplete(tmp_path / "out/checkpoint-3") is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_says_how_to_resume(tmp_path: Path, number: signal.Signals):
    """Sent to all processes of the group, data workers too, and twice, as launchers do."""
    argv = flags(tmp_path / "out", max_steps=100_000, save_steps=100_000, dataloader_num_workers=1)
    process = start(argv)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 5/"):
            break
    for one in psutil.Process(process.pid).children(recursive=True):
        one.send_signal(number)
    process.send_signal(number)
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Stopped by {number.name} at step" in rest
    assert "start the same command again to resume" in rest
    checkpoint = newest_complete_checkpoint(tmp_path / "out")
    assert checkpoint is not None
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    resumed = train(tmp_path / "out", max_steps=step + 2, save_steps=100_000)
    assert resumed.trainer.state.global_step == step + 2


@pytest.mark.slow
def test_kill_during_saves_never_leaves_something_to_resume_from_that_should_not(tmp_path: Path):
    """A run that saves at every step is killed at random moments; each restart resumes from a complete checkpoint."""
    random.seed(1)
    output = tmp_path / "out"
    argv = flags(output, max_steps=100_000, save_steps=1, save_total_limit=2)
    last = 0
    for _ in range(6):
        process = start(argv)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = newest_complete_checkpoint(output) if output.exists() else None
            if found is not None and int(found.name.removeprefix("checkpoint-")) >= last + 4:
                break
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        _, log = process.communicate(timeout=30)
        if last:
            assert f"Resuming from {output}/checkpoint-" in log
        found = newest_complete_checkpoint(output)
        assert found is not None, log
        reached = int(found.name.removeprefix("checkpoint-"))
        assert reached >= last + 4, log
        state = json.loads((found / "trainer_state.json").read_text())
        assert state["global_step"] == reached
        torch.load(found / "optimizer.pt", weights_only=True)
        last = reached


def save_forever(run) -> None:
    while True:
        run.trainer.state.global_step += 1
        run.trainer._save_checkpoint(run.trainer.model, trial=None)


def test_twenty_kills_while_saving_leave_only_complete_checkpoints(tmp_path: Path):
    """Whatever is called checkpoint-N after a kill is complete and can be read."""
    random.seed(2)
    run = prepare(tmp_path / "out", save_total_limit=3)
    run.trainer.train()
    num_interrupted = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            save_forever(run)
        time.sleep(random.uniform(0.05, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        visible = list((tmp_path / "out").glob("checkpoint-*"))
        num_interrupted += bool(list((tmp_path / "out").glob(".checkpoint-*")))
        complete = [path for path in visible if what_is_incomplete(path) is None]
        assert complete
        newest = newest_complete_checkpoint(tmp_path / "out")
        assert newest is not None
        restore_trained(run.trainer.model, newest)
        torch.load(newest / "optimizer.pt", weights_only=True)
        run.trainer.state.global_step = int(newest.name.removeprefix("checkpoint-"))
    assert num_interrupted >= 5, "the kills must hit saves"
    prepare(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*")), "a new start clears what was half-written"
