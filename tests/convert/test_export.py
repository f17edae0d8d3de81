"""`llava-ft export` when something is wrong: nothing appears at the target."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.convert import export as export_command
from tests.conftest import RECORDINGS
from tests.convert.conftest import run

SOURCE = RECORDINGS / "ckpt/llava15-tiny"
REPOSITORY = RECORDINGS.parent.parent


def argv(target: Path, *more: str, source: Path = SOURCE, form: str = "hf") -> list[str]:
    return ["export", "--model_path", str(source), "--save_path", str(target), "--format", form, "--no_verify", *more]


@pytest.mark.parametrize("kind", ["file", "other files", "the source", "around the source"])
def test_what_would_be_lost_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = tmp_path / "models/source"
    shutil.copytree(SOURCE, copy)
    target = {"file": tmp_path / "x", "other files": tmp_path / "d", "the source": copy}.get(kind, tmp_path / "models")
    if kind == "file":
        target.write_text("mine")
    if kind == "other files":
        target.mkdir()
        (target / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert run(argv(target, source=copy)) == 2
    assert "--save-path" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_export_is_replaced(tmp_path: Path):
    assert run(argv(tmp_path / "out")) == 0
    (tmp_path / "out/left over").write_text("")
    assert run(argv(tmp_path / "out", form="llava", source=SOURCE)) == 0
    assert not (tmp_path / "out/left over").exists()
    assert not (tmp_path / "out/chat_template.jinja").exists()


def test_a_source_that_is_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(SOURCE, tmp_path / "source")
    weights = tmp_path / "source/model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    assert run(argv(tmp_path / "out", source=tmp_path / "source")) == 2
    assert "damaged or incomplete" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["hf", "llava"])
def test_a_full_disk_leaves_nothing(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        status = run(argv(tmp_path / "out", form=form))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert status == 1
    assert "Nothing was kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["hf", "llava", "gguf"])
def test_too_little_room_is_told_before_weights_are_read(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for reading in ("stream", "tensor"):
        monkeypatch.setattr(FullModel, reading, lambda *arguments, **options: pytest.fail("weights were read"))
    assert run(argv(tmp_path / "out", form=form)) == 2
    assert "GB, but only 1e-06 GB are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_difference_beyond_the_bound_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(export_command, "relative_bound", lambda *_: -1.0)
    assert run([*argv(tmp_path / "out")[:-1]]) == 1
    assert "largest difference of logits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_nothing_at_the_target(tmp_path: Path):
    program = (
        "import sys, time\n"
        "from llava_ft.convert import export_hf\n"
        "export_hf.write_hf_files = lambda *arguments: print('written', flush=True) or time.sleep(60)\n"
        "from llava_ft.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv(tmp_path / "out")],
        cwd=RECORDINGS, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.wait(timeout=30)
    assert (tmp_path / ".out.incomplete/model.safetensors").is_file()
    assert not (tmp_path / "out").exists()
    assert run(argv(tmp_path / "out")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("more", "reason"), [(("--max-shard-size", "0GB"), "more than 0"), (("--max-shard-size", "GB"), "no size")]
)
def test_wrong_wishes_are_refused(more: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run(argv(tmp_path / "out", *more)) == 2
    assert reason in capsys.readouterr().err
