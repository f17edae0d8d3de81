"""Nothing that is read is run, and no file names another outside its directory."""

import ast
import io
import json
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from llava_ft.checkpoint.manifest import check_pairing, what_is_incomplete
from llava_ft.checkpoint.quantized import quantization_in_training
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.checkpoint.zero.consolidate import consolidate
from llava_ft.checkpoint.zero.files import find_step_directory
from llava_ft.cli import main
from llava_ft.data.sources.mixture import open_mixture
from llava_ft.data.sources.open import open_source
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.load import load_model
from tests.checkpoint.zero.shards import Step
from tests.layouts import native
from tests.training.helpers import prepare, train

REPOSITORY = Path(__file__).parents[1]
PROGRAM = [*(REPOSITORY / "llava_ft").rglob("*.py"), REPOSITORY / "train.py", *(REPOSITORY / "scripts").rglob("*.py")]
pytestmark = pytest.mark.usefixtures("in_recordings")


class MakesAMarker:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def as_archive(content: object, file: Path) -> None:
    torch.save(content, file)


def as_old_file(content: object, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def as_plain_pickle(content: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(content))


def as_pickle_2(content: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


FORMATS = [as_archive, as_old_file, as_plain_pickle, as_pickle_2]


@pytest.fixture(params=FORMATS, ids=lambda form: form.__name__)
def spoil(request: pytest.FixtureRequest, tmp_path: Path):
    """Put a file in the place of another that would make a marker, and check in the end that it did not."""
    marker = tmp_path / "marker"

    def put(file: Path) -> None:
        assert file.is_file(), file
        request.param({"model.norm.weight": MakesAMarker(marker)}, file)

    yield put
    assert not marker.exists()


def test_the_trap_works(tmp_path: Path):
    for number, form in enumerate(FORMATS):
        form({"a": MakesAMarker(tmp_path / str(number))}, tmp_path / "file")
        if form in (as_archive, as_old_file):
            torch.load(tmp_path / "file", weights_only=False)
        else:
            pickle.loads((tmp_path / "file").read_bytes())
        assert (tmp_path / str(number)).exists()


# Pickles in every place where one is read


MODEL_FILES: list[tuple[Callable[[Path], native.Checkpoint], str]] = [
    (native.v15_bin_shards, "pytorch_model-00002-of-00002.bin"),
    (native.lora_bin, "adapter_model.bin"),
    (native.lora_bin, "non_lora_trainables.bin"),
    (native.lora_all_bin, "adapter_model_all.bin"),
    (native.projector, "mm_projector.bin"),
]


@pytest.mark.parametrize(("write", "name"), MODEL_FILES, ids=[name for _, name in MODEL_FILES])
def test_a_model_s_pickle_is_not_run(tmp_path: Path, spoil: Callable[[Path], None], write: Any, name: str):
    checkpoint = write(tmp_path / "model")
    spoil(checkpoint.path / name)
    with pytest.raises(CheckpointError, match=rf"{name} names posix.mkdir"):
        load_model(str(checkpoint.path), checkpoint.base and str(checkpoint.base))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_a_base_s_or_tower_s_pickle_is_not_run(tmp_path: Path, spoil: Callable[[Path], None], name: str):
    for role, source in (("base", native.LANGUAGE_MODEL), ("tower", native.CLIP)):
        directory = tmp_path / role
        shutil.copytree(source, directory)
        (directory / "model.safetensors").unlink()
        (directory / name).touch()
        index = {"weight_map": {"model.norm.weight": name}}
        if "-of-" in name:
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        spoil(directory / name)
        flag = {"base": "model_name_or_path", "tower": "vision_tower"}[role]
        with pytest.raises(CheckpointError, match=rf"{name} names posix.mkdir"):
            prepare(tmp_path / "out", **{flag: str(directory)})


def test_a_projector_to_start_from_is_not_run(tmp_path: Path, spoil: Callable[[Path], None]):
    projector = tmp_path / "mm_projector.bin"
    projector.touch()
    spoil(projector)
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin names posix.mkdir"):
        prepare(tmp_path / "out", pretrain_mm_mlp_adapter=str(projector))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; what it wrote is copied before it is spoilt."""
    before = Path.cwd()
    os.chdir(native.GOLDEN)
    try:
        train(tmp_path_factory.mktemp("trained") / "out", max_steps=2, save_steps=1)
    finally:
        os.chdir(before)
    return next(tmp_path_factory.getbasetemp().glob("trained*/out"))


def resumable(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint whose manifest does not notice that files are replaced."""
    shutil.copytree(trained / "checkpoint-1", tmp_path / "out/checkpoint-1")
    (tmp_path / "out/checkpoint-1/llava_ft.json").unlink()
    return tmp_path / "out/checkpoint-1"


STATE_FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin", "non_lora_trainables.bin"]


@pytest.mark.parametrize("name", STATE_FILES)
def test_nothing_is_run_when_a_run_is_resumed(trained: Path, tmp_path: Path, spoil: Any, name: str):
    checkpoint = resumable(trained, tmp_path)
    spoil(checkpoint / name)
    with pytest.raises(CheckpointError, match=rf"{name} names posix.mkdir"):
        train(tmp_path / "out", max_steps=2, save_steps=1, resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["rng_state_0.pth", "rng_state_7.pth", "scaler.pt"])
def test_files_of_other_runs_are_looked_at_too(trained: Path, tmp_path: Path, spoil: Any, name: str):
    checkpoint = resumable(trained, tmp_path)
    (checkpoint / name).touch()
    spoil(checkpoint / name)
    with pytest.raises(CheckpointError, match=rf"{name} names posix.mkdir"):
        prepare(tmp_path / "out", max_steps=2, save_steps=1, resume_from_checkpoint=str(checkpoint))


def test_the_newest_checkpoint_is_looked_at_as_one_that_is_named(trained: Path, tmp_path: Path, spoil: Any):
    shutil.copytree(trained / "checkpoint-1", tmp_path / "out/checkpoint-1")
    state = tmp_path / "out/checkpoint-1/rng_state.pth"
    spoil(state)
    manifest = json.loads((state.parent / "llava_ft.json").read_text())
    manifest["files"][state.name]["size"] = state.stat().st_size
    (state.parent / "llava_ft.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"rng_state\.pth names posix.mkdir"):
        prepare(tmp_path / "out", max_steps=2, save_steps=1)


def test_training_arguments_are_never_read(trained: Path, tmp_path: Path, spoil: Any):
    checkpoint = resumable(trained, tmp_path)
    (checkpoint / "training_args.bin").touch()
    spoil(checkpoint / "training_args.bin")
    run = train(tmp_path / "out", max_steps=2, save_steps=1, resume_from_checkpoint=str(checkpoint))
    assert run.trainer.state.global_step == 2


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
def test_deepspeed_s_files_are_not_run(tmp_path: Path, spoil: Any, stage: int, kind: str):
    step = Step([{"model.mm_projector.weight": torch.ones(4, 2)}], stage=stage)
    directory = step.write(tmp_path / "checkpoint-7/global_step7")
    file = sorted(directory.glob(f"*rank_0*{kind}.pt" if kind == "optim_states" or stage == 3 else f"*{kind}.pt"))[0]
    spoil(file)
    with pytest.raises(CheckpointError, match=r"names posix\.mkdir"):
        consolidate(directory, output=tmp_path / "out")


READERS = {
    "hf_speaker: AutoProcessor.from_pretrained",
    "hf_speaker: PeftModel.from_pretrained",
    "hf_speaker: model_class.from_pretrained",
    "base: np.load",
    "mixture: yaml.load",
    "export_adapter: LoraConfig.from_pretrained",
    "pickles: torch.load",
    "tables: _hf.load_dataset",
    "tables: _hf.load_from_disk",
    "tokenizer: AutoTokenizer.from_pretrained",
}
"""Calls that a library could unpickle in, or run code of a directory in. Each was looked at; the first three read what
an export has just written, `export_adapter` JSON."""

SAFE = {
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "AutoTokenizer.from_pretrained": "trust_remote_code=False",
    "Image.open": "formats=FORMATS",
}
UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OWN = {"ImageTransform.from_pretrained", "ImageProcessorSettings.from_pretrained", "json.loads", "json.load"}


def test_no_new_place_unpickles_or_runs_anything():
    found: set[str] = set()
    for file in PROGRAM:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not imported & UNPICKLERS, f"{file}:{node.lineno} imports {imported & UNPICKLERS}"
                assert not imported >= {"torch", "load"}, f"{file}:{node.lineno}"
            if not isinstance(node, ast.Call):
                continue
            called = re.sub(r"cast\('Any', (\w+)\)", r"\1", ast.unparse(node.func))
            assert called not in {"eval", "exec", "__import__"}, f"{file}:{node.lineno}"
            if called in SAFE:
                assert SAFE[called] in [ast.unparse(keyword) for keyword in node.keywords], f"{file}:{node.lineno}"
            owner, _, leaf = called.rpartition(".")
            reads = leaf in ("load", "loads", "from_pretrained", "load_from_disk", "load_dataset", "load_checkpoint")
            if reads and owner and called not in OWN and owner not in {"self", "image", "HfSpeaker"}:
                found.add(f"{file.stem}: {called}")
    assert found == READERS


def test_a_yaml_file_makes_plain_values_only(tmp_path: Path):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'marker'}']")
    with pytest.raises(UserError, match="not valid YAML"):
        open_mixture(mixture)
    run_config = tmp_path / "run_config.yaml"
    run_config.write_text(mixture.read_text())
    with pytest.raises(CheckpointError, match="cannot be read as a run's configuration"):
        quantization_in_training(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_an_arrow_file_does_not_unpickle_types(tmp_path: Path):
    """Arrow before 14 unpickled extension types of this name when it read a schema (CVE-2023-47248)."""
    trap = pickle.dumps(MakesAMarker(tmp_path / "marker"))
    names = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": trap}
    schema = pa.schema([pa.field("id", pa.string(), metadata=names)])
    for kind in ("arrow", "parquet"):
        file = tmp_path / f"data.{kind}"
        table = pa.table([pa.array(["a"])], schema=schema)
        if kind == "parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                writer.write_table(table)
        try:
            source = open_source(str(file))
            source.prepare(tmp_path / "cache")
            assert list(source.read(0, 1)) == [{"id": "a"}]
        except UserError:
            pass  # a type that is not known may be refused as well
        assert not (tmp_path / "marker").exists()


# Code that comes with a model


def with_code(directory: Path) -> Path:
    """Write modules that make a marker when they are imported, and name them for every class there is."""
    trap = f"import os\nos.mkdir({str(directory / 'marker')!r})\nclass Theirs: pass\n"
    auto_map = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor"), "theirs.Theirs"
    ) | {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}
    for name in ("theirs", "modeling_llava", "tokenization_llava", "configuration_llava"):
        (directory / f"{name}.py").write_text(trap)
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "adapter_config.json"):
        file = directory / name
        if file.is_file():
            file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    return directory


@pytest.mark.parametrize("write", [native.v15, native.lora_bin, native.projector])
def test_code_in_a_directory_is_not_run(tmp_path: Path, write: Any):
    checkpoint = write(tmp_path / "model")
    with_code(checkpoint.path)
    load_model(str(checkpoint.path), checkpoint.base and str(checkpoint.base))
    assert not (checkpoint.path / "marker").exists()


def test_code_is_not_passed_on(tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(native.LANGUAGE_MODEL, base)
    with_code(base)
    adapter = native.lora_bin(tmp_path / "adapter").path
    merged = tmp_path / "merged"
    source = ["--model-path", str(adapter), "--model-base", str(base)]
    assert main(["merge", *source, "--save-model-path", str(merged), "--no-verify"]) == 0
    assert not (base / "marker").exists()
    assert not list(merged.glob("*.py"))
    for file in merged.glob("*.json"):
        assert "auto_map" not in file.read_text(), file


def test_a_tokenizer_or_model_that_needs_its_code_is_refused(tmp_path: Path):
    shutil.copytree(native.LANGUAGE_MODEL, tmp_path / "base")
    directory = with_code(tmp_path / "base")
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Theirs"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="needs Python code from that directory"):
        load_tokenizer(directory)
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "theirs"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a 'theirs' model"):
        load_model(str(directory))
    assert not (directory / "marker").exists()


def test_code_cannot_be_asked_for(tmp_path: Path):
    with pytest.raises(UserError, match="trust_remote_code=True: code that comes with a model is never run"):
        prepare(tmp_path / "out", trust_remote_code="True")
    assert prepare(tmp_path / "out", trust_remote_code="False").checkpoint is None


# Names of files


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a/../b.bin"])
def test_an_index_names_files_beside_it(tmp_path: Path, name: str):
    checkpoint = native.v15_bin_shards(tmp_path / "model")
    index = checkpoint.path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match=r"not in its own directory|does not exist"):
        WeightFiles.open(checkpoint.path)


@pytest.mark.parametrize("weight_map", [{"a": 5}, {"a": None}, {"a": ["b"]}, {"a": {}}])
def test_an_index_of_something_else_is_refused(tmp_path: Path, weight_map: Any):
    checkpoint = native.v15_bin_shards(tmp_path / "model")
    (checkpoint.path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="does not exist"):
        WeightFiles.open(checkpoint.path)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "a/../../b"])
def test_a_manifest_names_files_of_its_directory(tmp_path: Path, name: str):
    manifest = {"kind": "lora", "files": {name: {"size": 1, "sha256": "0"}}}
    (tmp_path / "llava_ft.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not in its directory"):
        check_pairing(tmp_path)
    assert "is not in its directory" in (what_is_incomplete(tmp_path) or "")


@pytest.mark.parametrize("name", ["..", "../global_step7", "/tmp", "global_step7/../../x", ""])
def test_latest_names_a_step_of_its_checkpoint(tmp_path: Path, name: str):
    step = Step([{"model.mm_projector.weight": torch.ones(4, 2)}], stage=1)
    step.write(tmp_path / "global_step7")
    step.write(tmp_path / "checkpoint-7/global_step7")
    (tmp_path / "checkpoint-7/latest").write_text(name)
    with pytest.raises(CheckpointError, match="holds no"):
        find_step_directory(tmp_path / "checkpoint-7")


def test_members_of_an_archive_stay_in_it(tmp_path: Path):
    record = json.dumps({"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A."}]})
    shard = tmp_path / "shards/a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for name in ("../outside.json", "../outside.jpg", "/tmp/absolute.json", "/tmp/absolute.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(record)
            tar.addfile(info, io.BytesIO(record.encode()))
    source = open_source(str(shard))
    source.prepare(tmp_path / "cache")
    assert len(list(source.read(0, len(source)))) == 2
    assert source.image_bytes(0, 0) == record.encode()
    written = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {"shards", "cache"}
    assert not Path("/tmp/absolute.json").exists()


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path):
    model = native.v15(tmp_path / "model")
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.path.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_model(str(snapshot)).context_len == 2048
