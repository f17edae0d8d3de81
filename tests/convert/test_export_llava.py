"""Export to original LLaVA's layout, and the way there and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.weights import WeightFiles
from tests.conftest import RECORDINGS
from tests.convert.conftest import export
from tests.layouts.hf import write_hf, write_hf_adapter

SMALL = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
TOWER = "model.vision_tower."


def weight_files(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.suffix in (".bin", ".safetensors") or path.name.endswith(".index.json")
    }


def without_tower(source: Path, directory: Path, form: str) -> Path:
    """Copy a model without its tower, as shards with an index, in an order of their own."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {k: v for k, v in load_file(source / "model.safetensors").items() if not k.startswith(TOWER)}
    names = sorted(tensors, reverse=True)
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for index, part in enumerate((names[:5], names[5:])):
        file = f"{stem}-0000{index + 1}-of-00002.{suffix}"
        held = {name: tensors[name] for name in part}
        save_file(held, directory / file, {"format": "pt"}) if form == "safetensors" else torch.save(
            held, directory / file
        )
        weight_map |= dict.fromkeys(part, file)
    index_file = directory / f"{stem}.{suffix}.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def test_there_and_back_gives_the_files_of_the_source(exported: Path, tmp_path: Path):
    source, back = RECORDINGS / "ckpt/llava15-tiny", export(exported, tmp_path / "back", "llava")
    assert weight_files(back) == weight_files(source)
    assert all((back / name).read_bytes() == (source / name).read_bytes() for name in SMALL)


def test_a_model_with_tokens_around_its_images_comes_back_too(tmp_path: Path):
    """The row of `<image>` lies behind theirs and is left out; the proof must not ask about it."""
    source = RECORDINGS / "ckpt/llava15-tiny-imse"
    back = export(export(source, tmp_path / "hf", "hf", "--no-verify"), tmp_path / "back", "llava")
    assert weight_files(back) == weight_files(source)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_shards_come_back_as_they_were_and_a_tower_that_was_outside_stays_there(form: str, tmp_path: Path):
    source = without_tower(RECORDINGS / "ckpt/llava16-tiny-anyres", tmp_path / "source", form)
    hf = export(source, tmp_path / "hf", "hf", "--vision-tower", "ckpt/clip-tiny", "--no-verify")
    back = export(hf, tmp_path / "back", "llava")
    assert weight_files(back) == weight_files(source)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_smaller_shards_than_before_are_written_anew(exported: Path, tmp_path: Path):
    back = export(exported, tmp_path / "back", "llava", "--max-shard-size", "100KB", "--no-verify")
    source = load_file(RECORDINGS / "ckpt/llava15-tiny/model.safetensors")
    written = WeightFiles.open(back).read()
    assert written.keys() == source.keys()
    assert all(written[name].equal(source[name]) for name in source)
    assert len(list(back.glob("model-*"))) > 3


def test_a_tower_that_changed_since_is_written(tmp_path: Path):
    source = without_tower(RECORDINGS / "ckpt/llava15-tiny", tmp_path / "source", "bin")
    hf = export(source, tmp_path / "hf", "hf", "--vision-tower", "ckpt/clip-tiny", "--no-verify")
    tensors = load_file(hf / "model.safetensors")
    changed = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    (hf / "llava_ft.json").unlink()
    back = export(hf, tmp_path / "back", "llava", "--no-verify")
    written = WeightFiles.open(back).read()
    name = f"{TOWER}vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    assert written[name].equal(tensors[changed])
    assert "model.embed_tokens.weight" in written


def test_a_configuration_that_changed_since_is_written(tmp_path: Path):
    hf = export(RECORDINGS / "ckpt/llava15-tiny", tmp_path / "hf", "hf", "--no-verify")
    config = json.loads((hf / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.25
    (hf / "config.json").write_text(json.dumps(config))
    (hf / "llava_ft.json").unlink()
    back = export(hf, tmp_path / "back", "llava", "--no-verify")
    assert json.loads((back / "config.json").read_text())["rms_norm_eps"] == 0.25


@pytest.mark.parametrize("model", ["llava", "llava_next"])
def test_a_model_of_the_hub_loses_the_rows_that_only_its_layout_needs(model: str, tmp_path: Path):
    write_hf(tmp_path / "hf", model, "hub", pads=model == "llava", num_shards=2)
    back = export(tmp_path / "hf", tmp_path / "back", "llava")
    written = WeightFiles.open(back)
    assert written.tensors["model.embed_tokens.weight"].shape == (512, 64)
    assert written.tensors["lm_head.weight"].shape == (512, 64)
    config = json.loads((back / "config.json").read_text())
    assert config["vocab_size"] == 512
    assert config["unfreeze_mm_vision_tower"] is True
    assert config["image_aspect_ratio"] == ("pad" if model == "llava" else "anyres")
    assert identify(back).layout == "native"


def test_an_adapter_on_a_model_of_the_hub_is_put_in(tmp_path: Path):
    write_hf(tmp_path / "hf", "llava", "hub")
    write_hf_adapter(tmp_path / "adapter", tmp_path / "hf", "projector beside")
    back = export(tmp_path / "adapter", tmp_path / "back", "llava")
    report = json.loads((back / "conversion_report.json").read_text())
    assert len(report["changed"]) == 10
    assert report["frozen"]["bit_identical"] is True
    assert all(entry["equal"] for entry in report["answers"])
