"""Models of the recordings, exported once for the tests of this folder."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from llava_ft.cli import main
from tests.conftest import RECORDINGS

LORA = RECORDINGS / "train/lora_vt32/llava-tiny-lora"


def export(source: Path, target: Path, form: str, *more: str) -> Path:
    """Export from the command line, in the folder that the paths of the recordings are relative to."""
    with contextlib.chdir(RECORDINGS):
        status = run(["export", "--model-path", str(source), "--save-path", str(target), "--format", form, *more])
    assert status == 0
    return target


def tokenizer_directory(directory: Path, *, legacy: bool) -> Path:
    """Copy the tiny tokenizer, with a blank in front of every stretch of text (legacy) or of the first."""
    shutil.copytree(RECORDINGS / "tokenizers/tiny512", directory, dirs_exist_ok=True)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy}))
    return directory


def run(argv: Sequence[str]) -> int:
    """Run a command in the folder of the recordings."""
    with contextlib.chdir(RECORDINGS):
        return main(list(argv))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llava15-tiny, padding images, in transformers' layout."""
    return export(RECORDINGS / "ckpt/llava15-tiny", tmp_path_factory.mktemp("llava15") / "hf", "hf")


@pytest.fixture(scope="session")
def exported_anyres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llava16-tiny-anyres in transformers' layout."""
    return export(RECORDINGS / "ckpt/llava16-tiny-anyres", tmp_path_factory.mktemp("llava16") / "hf", "hf")
