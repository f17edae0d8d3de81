"""What is in an output directory is lost to nobody: other runs, other people's files, checkpoints to resume from."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ft.checkpoint.manifest import what_is_incomplete
from llava_ft.checkpoint.resume import checkpoints_by_step, newest_complete_checkpoint, remove_staging
from llava_ft.checkpoint.save import publish_directory
from llava_ft.cli import main
from llava_ft.errors import UserError
from tests.training.helpers import flags, prepare, train

pytestmark = pytest.mark.usefixtures("in_recordings")


class TestOldCheckpoints:
    def test_only_complete_ones_are_counted(self, tmp_path: Path):
        out = tmp_path / "out"
        train(out, max_steps=2, save_steps=2)
        shutil.copytree(out / "checkpoint-2", out / "checkpoint-50")
        (out / "checkpoint-50/optimizer.pt").write_bytes(b"damaged")
        shutil.copytree(out / "checkpoint-50", out / "checkpoint-1-keep")
        (out / ".mine.incomplete").mkdir()
        (out / ".checkpoint-1-keep.outdated").mkdir()
        shutil.copytree(out / "checkpoint-2", tmp_path / "elsewhere")
        (out / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
        train(out, max_steps=6, save_steps=2, save_total_limit=1)
        left = {path.name for path in out.iterdir() if path.is_dir()}
        mine = {"checkpoint-1", "checkpoint-1-keep", ".mine.incomplete", ".checkpoint-1-keep.outdated"}
        assert left == {"checkpoint-6", "checkpoint-50"} | mine
        assert what_is_incomplete(tmp_path / "elsewhere") is None
        (out / "checkpoint-50").rename(tmp_path / "damaged")
        assert newest_complete_checkpoint(out) == out / "checkpoint-6"

    def test_the_one_just_written_stays_beside_one_of_a_higher_number(self, tmp_path: Path):
        train(tmp_path, max_steps=4, save_steps=4, save_total_limit=1)
        anew = {"resume_from_checkpoint": "False", "overwrite_output_dir": "True"}
        train(tmp_path, max_steps=3, save_steps=1, save_total_limit=1, **anew)
        assert [path.name for path in checkpoints_by_step(tmp_path)] == ["checkpoint-4", "checkpoint-3"]

    def test_those_without_optimizer_do_not_displace_the_last_that_can_be_resumed(self, tmp_path: Path):
        train(tmp_path, max_steps=2, save_steps=2)
        train(tmp_path, max_steps=4, save_steps=1, save_total_limit=1, save_only_model="True")
        assert [path.name for path in checkpoints_by_step(tmp_path)] == ["checkpoint-4", "checkpoint-2"]

    def test_a_kill_while_one_is_replaced_leaves_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        train(tmp_path, max_steps=2, save_steps=2)
        checkpoint = tmp_path / "checkpoint-2"
        staging = tmp_path / ".checkpoint-2.incomplete"
        shutil.copytree(checkpoint, staging)
        rename = os.replace

        def killed_before_the_second(source: Path, target: Path) -> None:
            if target == checkpoint:
                raise KeyboardInterrupt
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_before_the_second)
            with pytest.raises(KeyboardInterrupt):
                publish_directory(staging, checkpoint)
        assert not checkpoint.exists()
        remove_staging(tmp_path)
        assert what_is_incomplete(checkpoint) is None
        assert not list(tmp_path.glob(".*"))
        assert train(tmp_path, max_steps=3).checkpoint == checkpoint


OTHERS = ["config.json", "tokenizer.model", "tokenizer_config.json", "adapter_model.bin", "non_lora_trainables.bin"]
OTHERS += ["adapter_config.json", "run_config.yaml", "preprocessor_config.json", "trainer_state.json", "llava_ft.json"]


class TestWritingOver:
    @pytest.mark.parametrize("name", OTHERS)
    def test_a_file_of_others(self, tmp_path: Path, name: str):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=rf"{name} is there already, .* --overwrite_output_dir True"):
            prepare(tmp_path)
        assert (tmp_path / name).read_text() == "mine"
        prepare(tmp_path, overwrite_output_dir="True")

    @pytest.mark.parametrize(
        ("name", "method", "held"),
        [
            ("mm_projector.bin", "lora", "a projector"),
            ("model-00001-of-00002.safetensors", "lora", "a whole model"),
            ("pytorch_model.bin", "projector", "a whole model"),
            ("adapter_model.safetensors", "full", "an adapter"),
        ],
    )
    @pytest.mark.parametrize("place", [".", "checkpoint-2"])
    def test_two_kinds_of_result(self, tmp_path: Path, name: str, method: str, held: str, place: str):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / name).write_text("mine")
        with pytest.raises(UserError, match=rf"holds {held} \(.*{name}\), and this run makes a"):
            prepare(tmp_path, method, overwrite_output_dir="True")

    def test_the_base(self, tmp_path: Path):
        base = tmp_path / "base"
        shutil.copytree("ckpt/base-llm", base)
        (tmp_path / "link").symlink_to(base)
        with pytest.raises(UserError, match="holds a whole model"):
            prepare(base, model_name_or_path=base)
        with pytest.raises(UserError, match=r"holds what this run starts from \(model_name_or_path="):
            prepare(tmp_path / "link", "full", model_name_or_path=base)

    def test_what_is_started_from(self, tmp_path: Path):
        train(tmp_path, max_steps=2, save_steps=2)
        for start in (tmp_path, tmp_path / "checkpoint-2"):
            for again in ("True", "False"):
                with pytest.raises(UserError, match=r"holds what this run starts from \(init_from="):
                    prepare(tmp_path, pretrain_mm_mlp_adapter=None, init_from=start, resume_from_checkpoint=again)

    def test_a_finished_result(self, tmp_path: Path):
        train(tmp_path, max_steps=1, save_strategy="no")
        with pytest.raises(UserError, match=r"adapter_config\.json is there already"):
            prepare(tmp_path, max_steps=1)
        train(tmp_path, max_steps=1, save_strategy="no", overwrite_output_dir="True", weights_format="safetensors")
        assert not (tmp_path / "adapter_model.bin").exists()
        assert what_is_incomplete(tmp_path) is None

    def test_a_run_goes_on_over_its_own_result_only(self, tmp_path: Path):
        train(tmp_path, max_steps=1, save_steps=1)
        train(tmp_path, max_steps=2, save_steps=1)
        weights = tmp_path / "adapter_model.bin"
        own = weights.read_bytes()
        weights.write_bytes(own[:-1] + bytes([own[-1] ^ 1]))
        with pytest.raises(UserError, match=r"adapter_model\.bin is there already"):
            prepare(tmp_path)
        weights.write_bytes(own)
        (tmp_path / "generation_config.json").write_text("mine")
        with pytest.raises(UserError, match=r"generation_config\.json is there already"):
            prepare(tmp_path)

    def test_a_run_that_was_killed_while_it_wrote_its_result(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        rename, count = os.replace, 0

        def killed_at_the_third_file(source: Path, target: Path) -> None:
            nonlocal count
            count += ".result" in str(source)
            if count == 3:
                raise KeyboardInterrupt
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_at_the_third_file)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path, max_steps=1, save_steps=1)
        assert what_is_incomplete(tmp_path) is not None
        assert train(tmp_path, max_steps=1, save_steps=1).checkpoint == tmp_path / "checkpoint-1"
        assert what_is_incomplete(tmp_path) is None


HOLD = """
import sys
from types import SimpleNamespace
from llava_ft.training.output_dir import lock_output_dir
with lock_output_dir(SimpleNamespace(output_dir=sys.argv[1], should_save=True)):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestLock:
    def test_a_second_run_is_refused_and_a_dead_one_is_not_waited_for(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        (tmp_path / "out").mkdir()
        lock = tmp_path / "out/.llava_ft.lock"
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            (tmp_path / "out/.checkpoint-3.incomplete").mkdir()  # being written
            assert main(["train", *flags(tmp_path / "out", max_steps=1)]) == 2
            assert f"is in use: process {holder.pid} on {socket.gethostname()}" in capsys.readouterr().err
            assert (tmp_path / "out/.checkpoint-3.incomplete").is_dir()
        finally:
            holder.kill()
            holder.communicate()
        assert lock.read_text().startswith(f"process {holder.pid} ")
        assert main(["train", *flags(tmp_path / "out", max_steps=1)]) == 0
        assert not list((tmp_path / "out").glob(".*"))
        assert what_is_incomplete(tmp_path / "out") is None
        assert ".llava_ft.lock" not in (tmp_path / "out/llava_ft.json").read_text()

    def test_it_goes_when_the_run_fails(self, tmp_path: Path):
        (tmp_path / "mine").mkdir()
        assert main(["train", *flags(tmp_path / "mine", data_path="data/missing.json")]) == 2
        assert list((tmp_path / "mine").iterdir()) == []
        assert main(["train", *flags(tmp_path / "out", data_path="data/missing.json")]) == 2
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("what", ["file", "read-only"])
    def test_a_directory_that_cannot_be_written_to(self, tmp_path: Path, what: str, capsys):
        place = tmp_path / "out"
        place.write_text("mine") if what == "file" else place.mkdir(mode=0o500)
        if what == "read-only" and os.access(place, os.W_OK):
            pytest.skip("this user may write anywhere")
        assert main(["train", *flags(place)]) == 2
        assert f"output_dir={place} cannot be written to: " in capsys.readouterr().err
