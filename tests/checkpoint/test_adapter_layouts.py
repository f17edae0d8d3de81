"""Adapters and projectors as different programs leave them: which are whole, and which lack a projector."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.model import find_model
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.generate import prepare_inputs
from llava_ft.inference.load import LoadedModel, load_model
from tests.conftest import RECORDINGS
from tests.layouts.hf import write_native_peft_adapter

pytestmark = pytest.mark.usefixtures("in_recordings")

LLAVA = Path("ckpt/llava15-tiny")
RUN = RECORDINGS / "train/lora/llava-tiny-lora"
PICTURE = "images/src/landscape.jpg"


def logits(loaded: LoadedModel) -> torch.Tensor:
    inputs = prepare_inputs(loaded, "USER: <image>\nWhat is this? ASSISTANT:", [PICTURE])
    with torch.no_grad():
        return loaded.model(**inputs).logits


@pytest.fixture
def recorded_run(tmp_path: Path) -> Path:
    """Copy a LoRA run of the original, with its tower at an absolute path."""
    path = tmp_path / "run"
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"):
        shutil.copyfile(RUN / name, path / name)
    config = json.loads((RUN / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "ckpt/clip-tiny"}))
    return path


@pytest.mark.parametrize("target", ["attention", "projector beside"])
def test_an_adapter_that_peft_made_on_a_native_model_is_whole(tmp_path: Path, target: Any):
    from peft import PeftModel

    write_native_peft_adapter(tmp_path / "adapter", LLAVA, target)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(LLAVA)
    base = load_model(str(LLAVA), dtype=torch.float32)
    peft = PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()
    expected = logits(replace(base, model=peft))
    got = logits(load_model(str(tmp_path / "adapter"), dtype=torch.float32))
    assert (got - expected).abs().max() <= 1e-5
    assert (got - logits(load_model(str(LLAVA), dtype=torch.float32))).abs().max() > 0.01


@pytest.mark.parametrize("left", ["config.json", "trainer_state.json", "latest", "llava_ft.json", "global_step3"])
def test_an_adapter_beside_something_that_a_run_of_llava_leaves_lacks_its_projector(tmp_path: Path, left: str):
    adapter = tmp_path / "adapter"
    write_native_peft_adapter(adapter, LLAVA)
    if left == "config.json":
        shutil.copyfile(LLAVA / left, adapter / left)
    elif left == "global_step3":
        (adapter / left).mkdir()
    else:
        manifest = {"format": 1, "kind": "lora", "base": "", "files": {}, "versions": {}}
        (adapter / left).write_text(json.dumps(manifest if left == "llava_ft.json" else {}))
    with pytest.raises(CheckpointError, match=r"has an adapter but no non_lora_trainables.bin.*llava-ft consolidate"):
        open_base_and_adapters([(1.0, identify(adapter))], None)
    opened = open_base_and_adapters([(1.0, identify(adapter))], None, force=True)
    assert len(opened.adapters) == 1
    assert not opened.projector_is_new


def test_an_adapter_with_its_projector_in_the_same_file_is_whole_wherever_it_lies(tmp_path: Path):
    write_native_peft_adapter(tmp_path, LLAVA, "projector beside")
    (tmp_path / "trainer_state.json").write_text("{}")
    base = open_base_and_adapters([(1.0, identify(tmp_path))], None)
    assert sum(source.label.startswith("what was trained") for source in base.sources) == 1


def test_an_adapter_whose_projector_is_nowhere_is_refused(recorded_run: Path):
    (recorded_run / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither its files nor .*base-llm hold a projector.*--model-base"):
        open_base_and_adapters([(1.0, identify(recorded_run))], "ckpt/base-llm", force=True)


@pytest.mark.parametrize("spelling", ["plain", "module.", ".default.", "model.model."])
def test_adapter_model_all_holds_everything(recorded_run: Path, spelling: str):
    expected = logits(load_model(str(recorded_run), dtype=torch.float32))
    everything = load_file(recorded_run / "adapter_model.safetensors")
    everything |= torch.load(recorded_run / "non_lora_trainables.bin", weights_only=True)
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        (recorded_run / name).unlink()
    rename = {
        "plain": str,
        "module.": lambda key: "module." + key,
        ".default.": lambda key: key.replace("_A.weight", "_A.default.weight").replace("_B.w", "_B.default.w"),
        "model.model.": lambda key: key.replace("base_model.model.model.", "model.model."),
    }[spelling]
    torch.save({rename(key): value for key, value in everything.items()}, recorded_run / "adapter_model_all.bin")
    assert torch.equal(logits(load_model(str(recorded_run), dtype=torch.float32)), expected)


def test_an_adapter_without_any_weights_is_refused(recorded_run: Path):
    (recorded_run / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json but no weights: neither .* nor adapter_model_all"):
        open_base_and_adapters([(1.0, identify(recorded_run))], None)


def test_v1_says_nothing_of_its_projector_which_is_linear(recorded_run: Path):
    linear = torch.load("ckpt/mm_projector_linear.bin", weights_only=True)
    beside = {f"base_model.model.{name}": value for name, value in linear.items()}
    torch.save(beside, recorded_run / "non_lora_trainables.bin")
    keys = ("mm_hidden_size", "mm_vision_select_layer", "mm_vision_tower", "mm_use_im_start_end")
    config = json.loads((recorded_run / "config.json").read_text())
    old = {"model_type": "llava", "use_mm_proj": True, **{key: config[key] for key in keys}}
    (recorded_run / "config.json").write_text(json.dumps(old))
    loaded = load_model(str(recorded_run), dtype=torch.float32)
    assert loaded.model.config.mm_projector_type == "linear"
    weight = loaded.model.get_parameter("model.mm_projector.weight")
    assert torch.equal(weight, linear["model.mm_projector.weight"].float())


class TestProjectorBesideAModel:
    """`mm_projector.bin` in the directory of a whole model."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        path = tmp_path / "model"
        shutil.copytree(LLAVA, path)
        state = load_file(LLAVA / "model.safetensors")
        other = {name: value + 1 for name, value in state.items() if "mm_projector" in name}
        torch.save(other, path / "mm_projector.bin")
        return path

    def without_projector(self, model: Path) -> None:
        state = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        kept = {name: value for name, value in state.items() if "mm_projector" not in name}
        save_file(kept, model / "model.safetensors")

    def test_the_model_s_own_wins(self, model: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level("INFO"):
            loaded = load_model(str(model), dtype=torch.float32)
        assert "mm_projector.bin is not used: the model's own weights hold the projector" in caplog.text
        assert torch.equal(logits(loaded), logits(load_model(str(LLAVA), dtype=torch.float32)))

    def test_it_is_taken_where_the_model_has_none(self, model: Path):
        self.without_projector(model)
        weight = load_model(str(model), dtype=torch.float32).model.get_parameter("model.mm_projector.0.weight")
        own = load_file(LLAVA / "model.safetensors")["model.mm_projector.0.weight"]
        assert torch.equal(weight, own.float() + 1)

    def test_a_model_whose_projector_is_nowhere_is_refused(self, model: Path):
        self.without_projector(model)
        (model / "mm_projector.bin").unlink()
        assert not find_model(str(model)).projector_is_new
        with pytest.raises(
            CheckpointError, match=r"4 weights of the model are in none of its files: model.mm_projector"
        ):
            load_model(str(model))


@pytest.mark.parametrize("model_type", ["llava_mistral", "llava_mpt", "llava_qwen"])
def test_other_language_models_are_refused(tmp_path: Path, model_type: str):
    shutil.copytree(LLAVA, tmp_path / "m")
    config = json.loads((LLAVA / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(UserError, match=f"is a '{model_type}' model. Supported language models: llama"):
        find_model(str(tmp_path / "m"))
