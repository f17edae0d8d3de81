"""Weight files: every layout is read, damage is named, nothing in a pickle is executed."""

import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}


def write(directory: Path, layout: str) -> Path:
    directory.mkdir(exist_ok=True)
    if layout == "safetensors":
        save_file(TENSORS, directory / "model.safetensors")
    elif layout == "bin":
        torch.save(TENSORS, directory / "pytorch_model.bin")
    elif layout == "old bin":
        torch.save(TENSORS, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        suffix, stem = (".bin", "pytorch_model") if layout == "sharded bin" else (".safetensors", "model")
        weight_map = {}
        for index, (name, tensor) in enumerate(TENSORS.items(), start=1):
            shard = f"{stem}-0000{index}-of-00002{suffix}"
            (torch.save if suffix == ".bin" else save_file)({name: tensor}, directory / shard)
            weight_map[name] = shard
        (directory / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


LAYOUTS = ["safetensors", "bin", "old bin", "sharded bin", "sharded safetensors"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path: Path, layout: str):
    files = WeightFiles.open(write(tmp_path / "model", layout))
    assert {name: (info.shape, info.dtype) for name, info in files.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()
    }
    read = files.read()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert list(files.read(["b.weight"])) == ["b.weight"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_a_truncated_file_is_named(tmp_path: Path, layout: str, keep: float):
    directory = write(tmp_path / "model", layout)
    victim = max((path for path in directory.iterdir() if path.suffix != ".json"), key=lambda path: path.name)
    content = victim.read_bytes()
    victim.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(
        CheckpointError, match=rf"{victim.name} (cannot be read: it is damaged or incomplete|is damaged)"
    ):
        WeightFiles.open(directory)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_pickle_cannot_run_anything(tmp_path: Path):
    marker = tmp_path / "marker"
    with (tmp_path / "pytorch_model.bin").open("wb") as opened:
        pickle.dump({"a": Malicious(marker)}, opened)
    torch.save({"a": Malicious(marker)}, tmp_path / "adapter_model.bin")
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        with pytest.raises(CheckpointError, match=r"names .*pathlib.*\. Nothing but tensors"):
            WeightFiles.open(tmp_path / name)
    assert not marker.exists()


def test_a_missing_shard_is_named(tmp_path: Path):
    directory = write(tmp_path / "model", "sharded bin")
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin does not exist"):
        WeightFiles.open(directory)


def test_an_index_cannot_point_outside(tmp_path: Path):
    directory = write(tmp_path / "model", "sharded safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in its own directory"):
        WeightFiles.open(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[]", "an object is needed"), ("{}", "has no 'weight_map'")],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str, message: str):
    directory = write(tmp_path / "model", "sharded safetensors")
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        WeightFiles.open(directory)


def test_an_index_that_promises_too_much_is_named(tmp_path: Path):
    directory = write(tmp_path / "model", "sharded safetensors")
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"c.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"holds c\.weight, but it does not"):
        WeightFiles.open(directory)


def test_a_directory_without_weights_says_what_it_holds(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"holds no model weights.*it holds notes\.txt"):
        WeightFiles.open(tmp_path)


def test_something_else_in_a_bin_file_is_refused(tmp_path: Path):
    torch.save([torch.ones(2)], tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        WeightFiles.open(tmp_path / "mm_projector.bin")


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old bin"])
def test_whatever_is_damaged_is_a_checkpoint_error(tmp_path: Path, layout: str):
    (file,) = write(tmp_path / "model", layout).iterdir()
    content, chance = file.read_bytes(), random.Random(0)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            place, length = chance.randrange(len(damaged)), chance.randint(0, 8)
            damaged[place : place + chance.randint(0, 8)] = chance.randbytes(length)
        file.write_bytes(damaged)
        try:
            WeightFiles.open(file).read()
        except CheckpointError:
            num_refused += 1
    assert num_refused > 100
