"""Files of tensors, as every part of the program writes them."""

import os
import stat
from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.save import save_tensors
from llava_ft.checkpoint.weights import WeightFiles


@pytest.fixture
def open_umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path, name: str):
    transposed = torch.arange(6.0).view(2, 3).T
    save_tensors({"a": transposed}, tmp_path / name)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    assert torch.equal(WeightFiles.open(tmp_path / name).read()["a"], transposed)
