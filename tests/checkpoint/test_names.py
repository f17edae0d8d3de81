"""The names on disk are a contract."""

import pytest
import torch

from llava_ft.checkpoint.base import find_base, load_base
from llava_ft.checkpoint.names import clip_to_native_name, is_derived, native_name
from tests.conftest import read_recording


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize(
    "checkpoint", ["llava15-tiny", "llava1-tiny-linear", "llava15-tiny-imse", "llava15-tiny-unfreezevt"]
)
def test_parameters_are_called_as_in_the_original_s_checkpoints(checkpoint: str):
    model, _ = load_base(find_base(f"ckpt/{checkpoint}"), dtype_of=lambda name: torch.float32)
    recorded = read_recording("ckpts.json")[checkpoint]["state_dict"]
    ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert ours == {name: shape for name, (shape, *_) in recorded.items()}


@pytest.mark.parametrize(
    "key",
    [
        "model.mm_projector.0.weight",
        "mm_projector.0.weight",
        "module.model.mm_projector.0.weight",
        "base_model.model.model.mm_projector.0.weight",
        "base_model.model.mm_projector.0.weight",
        "module.base_model.model.model.mm_projector.0.weight",
        "model.model.mm_projector.0.weight",
    ],
)
def test_wrappers_are_taken_off(key: str):
    assert native_name(key) == "model.mm_projector.0.weight"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        (
            "model.vision_tower.vision_tower.encoder.layers.0.mlp.fc1.bias",
            "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        ),
    ],
)
def test_native_names(key: str, name: str):
    assert native_name(key) == name


def test_the_text_half_of_clip_is_left_out():
    tower = "model.vision_tower.vision_tower.vision_model."
    assert clip_to_native_name("vision_model.pre_layrnorm.bias") == tower + "pre_layrnorm.bias"
    assert clip_to_native_name("pre_layrnorm.bias") == tower + "pre_layrnorm.bias"
    for key in (
        "text_model.final_layer_norm.bias",
        "logit_scale",
        "visual_projection.weight",
        "text_projection.weight",
    ):
        assert clip_to_native_name(key) is None


def test_what_follows_from_the_configuration_is_no_weight():
    assert is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_derived("model.vision_tower.vision_tower.vision_model.embeddings.position_ids")
    assert not is_derived("model.norm.weight")
