"""Files that claim to be larger than they are: refused, by a process that may take little memory."""

import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import RECORDINGS
from tests.layouts import native

REPOSITORY = RECORDINGS.parent.parent
MEMORY = 512 * 2**20
"""Bytes of address space that reading may take beyond what the imports take."""

HUGE = 10**12

READER = """
import json, resource, sys
from pathlib import Path
import torch
from llava_ft.checkpoint.optimizer import OptimizerFile
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.json_files import read_json
from llava_ft.checkpoint.zero.files import read_states
from llava_ft.data.image_files import load_image
from llava_ft.errors import UserError
from llava_ft.inference.load import load_model

def model(path):
    load_model(str(path))

def weights(path):
    WeightFiles.open(path).read()

def image(path):
    load_image(path)

model(Path(sys.argv[1]))  # whatever is imported late is there now
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]), resource.RLIM_INFINITY))
readers = {
    "model": model, "weights": weights, "image": image, "json": read_json,
    "optimizer": OptimizerFile, "shard": read_states,
}
for line in sys.stdin:
    name, reader, path = json.loads(line)
    try:
        readers[reader](Path(path))
        said = "nothing"
    except UserError as error:
        said = "refused: " + str(error)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said]), flush=True)
"""


class _Pickler(pickle.Pickler):
    """Writes storages as `torch.save` does, of any size."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.key if isinstance(obj, _Storage) else None


class _Storage:
    def __init__(self, key: tuple[Any, ...]):
        self.key = key


class _Call:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor_of(num_values: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> _Call:
    storage = _Storage(("storage", torch.FloatStorage, "0", "cpu", num_values))
    return _Call(torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, {})


def archive(content: object, file: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """Write what `torch.save` would, with one storage of 4 values."""
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(content)
    with zipfile.ZipFile(file, "w", compression) as written:
        written.writestr("archive/data.pkl", stream.getvalue())
        written.writestr("archive/byteorder", "little")
        written.writestr("archive/data/0", bytes(16))
        written.writestr("archive/version", "3\n")


def old_file(content: object, file: Path) -> None:
    """Write what PyTorch before 1.6 would, with one storage that is not there."""
    stream = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, stream, protocol=2)
    _Pickler(stream, protocol=2).dump(content)
    pickle.dump(["0"], stream, protocol=2)
    file.write_bytes(stream.getvalue() + struct.pack("<q", HUGE) + bytes(16))


def repeated(file: Path) -> None:
    torch.save({"a": torch.ones(1).expand(HUGE)}, file)


def shared(file: Path) -> None:
    value = torch.ones(2**18)
    torch.save({str(number): value for number in range(2000)}, file)


def sparse(file: Path) -> None:
    torch.save({"a": torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), [1.0], (10**6, 10**6))}, file)


def on_no_device(file: Path) -> None:
    torch.save({"a": torch.empty(HUGE, device="meta")}, file)


def reserving(function: Any, *arguments: Any) -> Callable[[Path], None]:
    return lambda file: archive({"a": _Call(function, *arguments)}, file)


def old_storage(file: Path) -> None:
    storage = _Storage(("storage", torch.FloatStorage, "0", "cpu", HUGE, None))
    old_file({"a": _Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})}, file)


def compressed(file: Path) -> None:
    archive({"a": "0" * 2**28}, file, zipfile.ZIP_DEFLATED)


def safetensors(header: dict[str, Any], length: int | None = None, data: bytes = bytes(16)) -> Callable[[Path], None]:
    text = json.dumps(header).encode()
    return lambda file: (
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data) and None
    )


def entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


WEIGHTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "one value, repeated by its stride": ("a.bin", repeated, "but only 4 bytes of it"),
    "a storage larger than the file": ("a.bin", lambda f: archive({"a": tensor_of(HUGE, (HUGE,), (1,))}, f), "damaged"),
    "a tensor larger than its storage": ("a.bin", lambda f: archive({"a": tensor_of(4, (HUGE,), (1,))}, f), "damaged"),
    "one value with many names": ("a.bin", shared, "gives the same values many names"),
    "a sparse tensor": ("a.bin", sparse, "names torch._utils._rebuild_sparse_tensor"),
    "a tensor without values": ("a.bin", on_no_device, "names torch._utils._rebuild_meta_tensor_no_storage"),
    "an array of zeros": ("a.bin", reserving(bytearray, HUGE), "names __builtin__.bytearray"),
    "a new tensor": ("a.bin", reserving(torch.Tensor, 10**6, 10**6), "damaged"),
    "an old file that reserves": ("a.bin", old_storage, "claims to hold 1,000,000,000,000"),
    "a compressed pickle": ("a.bin", compressed, "entries are compressed"),
    "a header of 4 EB": ("a.safetensors", safetensors({}, 2**62), "damaged"),
    "a header longer than the file": ("a.safetensors", safetensors({}, 10**8), "damaged"),
    "a tensor beyond the end": ("a.safetensors", safetensors({"a": entry([HUGE], 0, 4 * HUGE)}), "damaged"),
    "a shape larger than its bytes": ("a.safetensors", safetensors({"a": entry([HUGE], 0, 16)}), "damaged"),
    "a shape whose size overflows": ("a.safetensors", safetensors({"a": entry([2**40, 2**40], 0, 16)}), "damaged"),
    "two tensors in one place": (
        "a.safetensors",
        safetensors({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}),
        "damaged",
    ),
}


def changed(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        native.full_with_vision(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return write


def with_tower(**changes: Any) -> Callable[[Path], None]:
    """A model whose tower, beside it, is described wrongly."""

    def write(path: Path) -> None:
        native.v15(path)
        tower = path.parent / f"{path.name}-tower"
        shutil.copytree(native.CLIP, tower)
        described = json.loads((tower / "config.json").read_text())
        (tower / "config.json").write_text(json.dumps(described | changes))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(tower)}))

    return write


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a billion layers": (
        changed(num_hidden_layers=10**9),
        "num_hidden_layers=1,000,000,000, but by the layers in its files it can be 2",
    ),
    "heads of a trillion values": (changed(head_dim=HUGE), "q_proj.weight it can be 64"),
    "a width of a billion": (changed(hidden_size=4 * 10**9), "hidden_size=4,000,000,000, but by model.embed"),
    "a trillion words": (changed(vocab_size=HUGE), "embed_tokens.weight it can be 512"),
    "a middle of a trillion": (changed(intermediate_size=HUGE), "gate_proj.weight it can be 128"),
    "a projector of a million layers": (changed(mm_projector_type="mlp1000000x_gelu"), "N from 1 to 99"),
    "a million grids": (
        changed(image_aspect_ratio="anyres", image_grid_pinpoints="(1x1),...,(9999x9999)"),
        "more than 10,000 grids",
    ),
    "a scale of a million pixels": (changed(s2=True, s2_scales="336,1000000"), "sides of up to 8,192 pixels"),
    "a tower of a billion layers": (with_tower(num_hidden_layers=10**9), "by the layers in its files it can be 3"),
    "a trillion patches": (with_tower(image_size=10**6, patch_size=1), "position_embedding.weight it can be 17"),
    "a tower with a width of a billion": (with_tower(hidden_size=10**9), "position_embedding.weight it can be 32"),
    "a tower without patches": (with_tower(patch_size=0), "patch_size is 0. It should be greater than 0"),
}


def deep(file: Path) -> None:
    file.write_text('{"a":' + "[" * 10**6 + "]" * 10**6 + "}")


def long(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(2**30)


def picture(width: int, height: int) -> Callable[[Path], None]:
    """A PNG of a few bytes with a header that says so."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    return lambda file: file.write_bytes(content) and None


OTHERS: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "JSON in a million brackets": ("json", "config.json", deep, "cannot be read as JSON"),
    "JSON of a gigabyte": ("json", "config.json", long, "are read"),
    "a picture of 60,000 x 60,000": ("image", "a.png", picture(60_000, 60_000), "too large to be decoded"),
    "a picture of 100 million columns": ("image", "a.png", picture(10**8, 1), "a side can have 65535 at most"),
    "state that repeats one value": ("optimizer", "optimizer.pt", repeated, "but only 4 bytes of it"),
    "a shard that repeats one value": ("shard", "mp_rank_00_model_states.pt", repeated, "but only 4 bytes of it"),
}

CASES = {
    **{name: ("weights", file, write, said) for name, (file, write, said) in WEIGHTS.items()},
    **{name: ("model", "model", write, said) for name, (write, said) in MODELS.items()},
    **OTHERS,
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write all files, and have one process read each; what it said of each."""
    folder = tmp_path_factory.mktemp("sizes")
    whole = native.v15(folder / "whole").path
    requests: list[str] = []
    for number, (name, (reader, file, write, _)) in enumerate(CASES.items()):
        (folder / str(number)).mkdir()
        write(folder / str(number) / file)
        requests.append(json.dumps([name, reader, str(folder / str(number) / file)]))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(whole), str(MEMORY)],
        input="\n".join(requests),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_without_the_memory_it_claims(said: dict[str, str], name: str):
    assert said[name].startswith("refused: "), said[name]
    assert CASES[name][3] in said[name]


def test_a_number_of_labels_makes_no_table(tmp_path: Path):
    """transformers would make a table of so many names; LLaVA has no labels."""
    from llava_ft.inference.load import load_model

    changed(num_labels=3 * 10**7)(tmp_path / "model")
    config = load_model(str(tmp_path / "model")).model.config
    assert len(config.id2label) < 10
