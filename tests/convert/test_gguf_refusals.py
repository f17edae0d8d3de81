"""What cannot be exported to GGUF, and that it is refused before weights are read."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.convert.export_gguf import export_gguf
from llava_ft.convert.gguf_metadata import check_expressible, check_image_settings
from llava_ft.convert.proof import ConversionReport
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.errors import CheckpointError, UserError
from tests.convert.gguf_files import LLAVA, changed_copy, export, whole

pytestmark = pytest.mark.usefixtures("in_recordings")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mm_projector_type": "linear"}, "its projector is linear"),
        ({"mm_projector_type": "mlp3x_gelu"}, "its projector is mlp3x_gelu"),
        ({"mm_projector_type": "identity"}, "its projector is identity"),
        ({"s2": True, "s2_scales": "56,112"}, "several scales"),
        ({"mm_vision_select_feature": "cls_patch"}, "keeps the class token"),
        ({"mm_vision_select_layer": 0}, "tower's embeddings"),
        ({"hidden_act": "gelu"}, "uses 'gelu', and llama.cpp's LLaMA"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "scaled by 'yarn'"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(fields: dict, reason: str):
    config = whole(LLAVA).config
    check_expressible(config)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(CheckpointError, match=reason) as error:
        check_expressible(config)
    assert str(error.value).startswith("This model cannot be exported to GGUF: ")
    assert "--format llava" in str(error.value)


def test_a_tower_with_another_activation_is_refused():
    config = whole(LLAVA).config
    assert config.mm_vision_config is not None
    config.mm_vision_config |= {"hidden_act": "relu"}
    with pytest.raises(CheckpointError, match="vision tower uses 'relu'"):
        check_expressible(config)


def test_images_scaled_in_another_way_are_refused():
    check_image_settings(ImageProcessorSettings())
    with pytest.raises(CheckpointError, match=r"rescale_factor=1.0; llama.cpp always divides by 255"):
        check_image_settings(ImageProcessorSettings(rescale_factor=1.0))


@pytest.mark.parametrize(
    ("path", "dtype", "error"),
    [
        ("ckpt/llava1-tiny-linear", None, "its projector is linear"),
        (LLAVA, torch.float64, "cannot be written in float64.*llama-quantize"),
    ],
)
def test_refusals_come_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, dtype: torch.dtype | None, error: str
):
    model = whole(path)
    for reading in ("stream", "tensor"):
        monkeypatch.setattr(FullModel, reading, lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=error):
        export_gguf(model, tmp_path, ConversionReport("export gguf", path, str(tmp_path)), dtype)
    assert not any(tmp_path.iterdir())


def test_without_the_gguf_package_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'llava-ft\[gguf\]'"):
        export_gguf(whole(LLAVA), tmp_path, ConversionReport("export gguf", LLAVA, str(tmp_path)))


def test_a_number_beyond_float16_is_refused(tmp_path: Path):
    model = changed_copy(LLAVA, tmp_path / "model")
    tensors = load_file(f"{model}/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 70000.0
    save_file(tensors, f"{model}/model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds 70000, and float16 ends at 65504.*bfloat16"):
        export(model, tmp_path / "out", torch.float16)
    export(model, tmp_path / "out32", torch.bfloat16)
