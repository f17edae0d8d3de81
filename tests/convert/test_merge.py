"""Merging: the original's files give the original's result, and every merge proves itself."""

import errno
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.cli import main
from llava_ft.convert import merge as merging
from llava_ft.convert.merge import MergeOptions, compare_merged, merge
from llava_ft.errors import CheckpointError, RunError, UserError

pytestmark = pytest.mark.usefixtures("in_recordings")

LORA = Path("train/lora/llava-tiny-lora")


def merge_recorded(save_path: Path, **options):
    return merge([(1.0, identify(LORA))], "ckpt/base-llm", save_path, MergeOptions(verify=False, **options))


def test_the_original_s_adapter_gives_the_original_s_merged_model(tmp_path: Path):
    report = merge_recorded(tmp_path / "merged", dtype=torch.float16, save_vision_tower=True)
    ours = load_file(tmp_path / "merged/model.safetensors")
    recorded = load_file("merge/llava-tiny-merged/model.safetensors")
    assert set(ours) == set(recorded)
    for name, tensor in recorded.items():
        assert ours[name].dtype == tensor.dtype
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=0, msg=name)
    assert [counts["tensors"] for source, counts in report.sources.items() if "adapter" in source] == [14, 4]


def test_frozen_tensors_are_the_base_s_bit_for_bit(tmp_path: Path):
    report = merge_recorded(tmp_path / "merged")
    assert report.frozen == {"tensors": 7, "bit_identical": True}
    base = load_file("ckpt/base-llm/model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == len(report.changed) == 14
    assert not any("vision_tower" in name for name in merged)


def test_shards_hold_the_same_tensors(tmp_path: Path):
    merge_recorded(tmp_path / "one")
    for kind in ("safetensors", "bin"):
        merge_recorded(tmp_path / kind, max_shard_bytes=100_000, weights_format=kind)
        assert len(list((tmp_path / kind).glob(f"*-of-*.{kind}"))) > 2
        one, many = WeightFiles.open(tmp_path / "one").read(), WeightFiles.open(tmp_path / kind).read()
        assert set(one) == set(many)
        assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 6e-2)])
def test_merged_and_adapter_on_base_agree(tmp_path: Path, dtype: str, share: float):
    merge_recorded(tmp_path / "merged", dtype=getattr(torch, dtype))
    proven = compare_merged(tmp_path / "merged", [(1.0, identify(LORA))], "ckpt/base-llm")
    assert [entry["input"] for entry in proven.logits] == ["text", "image"]
    assert all(0 < entry["max_difference"] <= share * entry["scale"] for entry in proven.logits)


def test_a_wrong_result_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the comparison of tensors would pass over is found by what the model says."""

    write = merging._write_merged

    def write_and_spoil(staging: Path, *rest) -> None:
        write(staging, *rest)
        weights = load_file(staging / "model.safetensors")
        weights["model.mm_projector.2.bias"] += 0.5
        save_file(weights, staging / "model.safetensors")

    monkeypatch.setattr(merging, "_write_merged", write_and_spoil)
    monkeypatch.setattr(merging, "prove_tensors", lambda *_: None)
    with pytest.raises(RunError, match="The result is not what it was made from"):
        merge([(1.0, identify(LORA))], "ckpt/base-llm", tmp_path / "merged", MergeOptions())
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["merge", "--model-path", str(LORA), "--model-base", "ckpt/base-llm", "--save-model-path"]
    assert main([*argv, str(tmp_path / "merged"), "--vision-tower", "ckpt/clip-tiny"]) == 0
    report = capsys.readouterr().err
    assert "max |difference of logits|" in report
    assert "bit-identical to the base" in report
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 10000.0
    assert (tmp_path / "merged/tokenizer.model").exists()
    assert (tmp_path / "merged/preprocessor_config.json").exists()


def broken_copy(tmp_path: Path, change) -> Path:
    directory = tmp_path / "adapter"
    shutil.copytree(LORA, directory, ignore=shutil.ignore_patterns("checkpoint-*"))
    change(directory)
    return directory


def without_projector(directory: Path) -> None:
    (directory / "non_lora_trainables.bin").unlink()


def half_matrix(directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    weights.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_file(weights, directory / "adapter_model.safetensors")


def other_shape(directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    weights["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] = torch.ones(100, 8)
    save_file(weights, directory / "adapter_model.safetensors")


def other_layers(directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    save_file(
        {key.replace("layers.1.", "layers.7."): value for key, value in weights.items()},
        directory / "adapter_model.safetensors",
    )


def no_adapter(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def dora(directory: Path) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without_projector,
            r"no non_lora_trainables\.bin: the projector that was trained with it is missing",
        ),
        (half_matrix, "only one of the two LoRA matrices"),
        (other_shape, "changes model.layers.0.mlp.up_proj.weight as a 100 x 64 matrix"),
        (other_layers, "that the base model does not have. It belongs to another base model"),
        (no_adapter, r"has adapter_config\.json but no "),
        (dora, "use_dora is True, but 0 of 14 modules have a lora_magnitude_vector"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path: Path, change, message: str):
    directory = broken_copy(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        merge([(1.0, identify(directory))], "ckpt/base-llm", tmp_path / "merged", MergeOptions(verify=False))
    assert not (tmp_path / "merged").exists()


def test_only_what_a_merge_has_written_is_replaced(tmp_path: Path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/thesis.txt").write_text("years of work")
    shutil.copytree("ckpt/base-llm", tmp_path / "model")
    for name in ("merged", "model"):
        before = sorted(path.name for path in (tmp_path / name).iterdir())
        with pytest.raises(CheckpointError, match="holds files that no merge has written"):
            merge_recorded(tmp_path / name)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == before
    merge_recorded(tmp_path / "again")
    (tmp_path / "again/model.safetensors").unlink()
    merge_recorded(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").is_file()


def test_what_is_merged_is_not_replaced(tmp_path: Path):
    merge_recorded(tmp_path / "base")
    directory = broken_copy(tmp_path, lambda directory: None)
    for target in (tmp_path / "base", tmp_path):
        (target / "conversion_report.json").touch()
        with pytest.raises(CheckpointError, match=r"would replace .*, which is read"):
            merge([(1.0, identify(directory))], str(tmp_path / "base"), target, MergeOptions(verify=False))
    assert (tmp_path / "base/model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_comparison_fits_into_the_memory_that_is_free(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    merge_recorded(tmp_path / "merged", dtype=getattr(torch, dtype))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    proven = compare_merged(tmp_path / "merged", [(1.0, identify(LORA))], "ckpt/base-llm")
    assert all(entry["max_difference"] <= entry["bound"] for entry in proven.logits)
    assert f"compared in torch.{dtype}" in caplog.text


def test_a_full_disk_is_told_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"takes 0\.000616 GB, but only 1e-06 GB are free in"):
        merge_recorded(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights_format", ["safetensors", "bin"])
def test_a_disk_that_fails_while_it_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_format: str
):
    def fails(*_) -> None:
        if weights_format == "bin":
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((torch, "save", fails) if weights_format == "bin" else (Path, "write_bytes", fails)))
    with pytest.raises(RunError, match=r"could not be written: .*Nothing was kept"):
        merge_recorded(tmp_path / "merged", weights_format=weights_format)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_merge_leaves_nothing_at_its_target(tmp_path: Path):
    script = (
        "import os, sys, llava_ft.convert.merge as merge; from llava_ft.cli import main\n"
        "merge.prove_tensors = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        "main(sys.argv[1:])"
    )
    argv = ["merge", "--model-path", str(LORA), "--model-base", "ckpt/base-llm", "--save-model-path"]
    target = tmp_path / "merged"
    killed = subprocess.run([sys.executable, "-c", script, *argv, str(target)], capture_output=True)
    assert killed.returncode == -9
    assert not target.exists()
    merge_recorded(target)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_truncated_shard_is_refused(tmp_path: Path):
    shutil.copytree("ckpt/base-llm", tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="it is damaged or incomplete"):
        merge([(1.0, identify(LORA))], str(tmp_path / "base"), tmp_path / "merged", MergeOptions(verify=False))
    assert not (tmp_path / "merged").exists()


def test_a_base_of_another_name_is_noted_where_there_is_no_fingerprint(tmp_path: Path, caplog):
    shutil.copytree("ckpt/base-llm", tmp_path / "other-llm")
    with caplog.at_level(logging.WARNING, logger="llava_ft"):
        merge([(1.0, identify(LORA))], "ckpt/base-llm", tmp_path / "one", MergeOptions(verify=False))
        assert "was trained on" not in caplog.text
        merge([(1.0, identify(LORA))], str(tmp_path / "other-llm"), tmp_path / "other", MergeOptions(verify=False))
    assert "was trained on ckpt/base-llm, by its adapter_config.json, and is put on" in caplog.text
