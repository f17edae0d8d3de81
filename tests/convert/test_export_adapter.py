"""Adapters for the other layout, and back."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_ft.convert import export_adapter as exporting
from llava_ft.convert.export_adapter import check_taken, target_expression
from llava_ft.errors import RunError
from llava_ft.inference.load import load_model
from tests.conftest import RECORDINGS
from tests.convert.conftest import LORA, export, run
from tests.layouts.hf import write_hf, write_hf_adapter, write_native_peft_adapter

FILES = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "non_lora_trainables.bin")


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}


@pytest.mark.usefixtures("in_recordings")
def test_peft_puts_it_on_the_exported_base_with_our_logits(exported: Path, tmp_path: Path):
    native = tmp_path / "native"
    write_native_peft_adapter(native, RECORDINGS / "ckpt/llava15-tiny", "projector beside", use_rslora=True)
    adapter = export(native, tmp_path / "adapter", "hf", "--adapter-only", "--no-verify")
    base = LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that it misses
        model = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(3, 40)[None]
    tower = str(RECORDINGS / "ckpt/clip-tiny")
    ours = load_model(str(native), vision_tower=tower, dtype=torch.float32, device="cpu", adapter="beside")
    with torch.no_grad():
        expected, got = ours.model(input_ids=ids).logits, model(input_ids=ids).logits
    assert (got[..., :512] - expected).abs().max() <= 1e-4
    pixels = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)
    with torch.no_grad():
        expected = ours.model.get_base_model().encode_images(pixels)
        got = model.get_base_model().get_image_features(pixels).pooler_output[0]
    assert (got - expected.reshape(got.shape)).abs().max() <= 1e-5


def test_adapters_of_runs_come_back_byte_for_byte(tmp_path: Path):
    hf = export(LORA, tmp_path / "hf", "hf", "--adapter-only")
    back = export(hf, tmp_path / "back", "llava", "--adapter-only")
    assert bytes_of(back) == bytes_of(LORA)
    assert (back / "config.json").read_bytes() == (LORA / "config.json").read_bytes()
    again = export(back, tmp_path / "again", "hf", "--adapter-only", "--no-verify")
    assert bytes_of(again) == bytes_of(hf)


@pytest.mark.parametrize("options", [{"use_dora": True, "rank_pattern": {"layers.1.*q_proj": 2}}, {"use_rslora": True}])
def test_adapters_of_peft_come_back_byte_for_byte(options: dict, tmp_path: Path):
    write_hf(tmp_path / "base", "llava", "hub", pads=True)
    write_hf_adapter(tmp_path / "adapter", tmp_path / "base", "projector beside", **options)
    native = export(tmp_path / "adapter", tmp_path / "native", "llava", "--adapter-only")
    assert sorted(bytes_of(native)) == ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"]
    keys = torch.load(native / "adapter_model.bin", weights_only=True)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    config = json.loads((native / "adapter_config.json").read_text())
    assert "use_qalora" not in config  # PEFT 0.10 refuses keys that it does not know
    assert len(config["rank_pattern"]) == len(options.get("rank_pattern", ()))
    back = export(native, tmp_path / "back", "hf", "--adapter-only", "--no-verify")
    assert bytes_of(back) == bytes_of(tmp_path / "adapter")


def test_a_retrained_adapter_is_not_taken_for_its_source(tmp_path: Path):
    hf = export(LORA, tmp_path / "hf", "hf", "--adapter-only", "--no-verify")
    config = json.loads((hf / "adapter_config.json").read_text())
    (hf / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 32}))
    (hf / "llava_ft.json").unlink()
    back = export(hf, tmp_path / "back", "llava", "--adapter-only", "--no-verify")
    assert json.loads((back / "adapter_config.json").read_text())["lora_alpha"] == 32


@pytest.mark.parametrize("damage", ["unknown", "missing"])
def test_a_key_that_peft_would_pass_over_is_an_error(damage: str, tmp_path: Path):
    hf = export(LORA, tmp_path / "hf", "hf", "--adapter-only", "--no-verify")
    tensors = load_file(hf / "adapter_model.safetensors")
    value = tensors.pop("base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight")
    if damage == "unknown":
        tensors["base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"] = value
    save_file(tensors, hf / "adapter_model.safetensors")
    config = load_model(
        str(RECORDINGS / "ckpt/llava15-tiny"), vision_tower=str(RECORDINGS / "ckpt/clip-tiny"), device="cpu"
    ).model.config
    with pytest.raises(RunError, match="PEFT would not take"):
        check_taken(hf, config, "hf")


@pytest.mark.parametrize("damage", ["values", "targets"])
def test_what_is_wrong_in_the_written_files_leaves_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if damage == "values":
        save = exporting.save_tensors
        monkeypatch.setattr(exporting, "save_tensors", lambda of, file: save({k: v * 2 for k, v in of.items()}, file))
    else:
        monkeypatch.setattr(exporting, "target_expression", lambda modules: "|".join(modules[:-1]))
    out = tmp_path / "out"
    argv = ["export", "--model-path", str(LORA), "--save-path", str(out), "--format", "hf", "--adapter-only"]
    assert run([*argv, "--no-verify"]) == 1
    reason = "was written with other values" if damage == "values" else "PEFT would not take the exported adapter"
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "target", "reason"),
    [("llava", "attention", "vision tower"), ("hf", "whole", "holds no LoRA adapter"), ("gguf", "attention", "GGUF")],
)
def test_what_cannot_be_an_adapter_is_refused(
    form: str, target: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_hf(tmp_path / "base", "llava", "hub")
    path = tmp_path / "base"
    if target != "whole":
        path = tmp_path / "adapter"
        write_hf_adapter(path, tmp_path / "base", "attention")
    out = tmp_path / "out"
    argv = ["export", "--model-path", str(path), "--save-path", str(out), "--format", form, "--adapter-only"]
    assert run(argv) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()


def test_targets_are_written_by_layer_where_all_layers_have_the_same():
    names = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1, 10) for p in "qk"]
    assert target_expression(names) == r"model\.layers\.(?:0|1|10)\.(?:self_attn\.k_proj|self_attn\.q_proj)"
    uneven = target_expression([*names[:3], "model.mm_projector.0"])
    assert uneven == (
        r"model\.mm_projector\.0|model\.layers\.0\.self_attn\.k_proj|model\.layers\.0\.self_attn\.q_proj|"
        r"model\.layers\.1\.self_attn\.q_proj"
    )
