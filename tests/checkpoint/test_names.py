"""The names on disk are a contract."""

import pytest
import torch

from llava_ft.checkpoint.hf.names import hub_name, module_name
from llava_ft.checkpoint.model import find_model, load_base
from llava_ft.checkpoint.names import is_derived, native_name
from llava_ft.errors import CheckpointError
from llava_ft.models.towers.clip import CLIP
from tests.conftest import read_recording


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize(
    "checkpoint", ["llava15-tiny", "llava1-tiny-linear", "llava15-tiny-imse", "llava15-tiny-unfreezevt"]
)
def test_parameters_are_called_as_in_the_original_s_checkpoints(checkpoint: str):
    model, _ = load_base(find_model(f"ckpt/{checkpoint}"), dtype_of=lambda name: torch.float32)
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
    assert CLIP.native_name("vision_model.pre_layrnorm.bias") == tower + "pre_layrnorm.bias"
    assert CLIP.native_name("pre_layrnorm.bias") == tower + "pre_layrnorm.bias"
    for key in (
        "text_model.final_layer_norm.bias",
        "logit_scale",
        "visual_projection.weight",
        "text_projection.weight",
    ):
        assert CLIP.native_name(key) is None


def test_what_follows_from_the_configuration_is_no_weight():
    assert is_derived("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_derived("model.vision_tower.vision_tower.vision_model.embeddings.position_ids")
    assert not is_derived("model.norm.weight")


TOWER = "model.vision_tower.vision_tower.vision_model."
SPELLINGS = [  # native name, key of the hub's files, name of transformers' modules
    (
        "model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ),
    (
        "model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
    ),
    ("model.norm.weight", "language_model.model.norm.weight", "model.language_model.norm.weight"),
    ("lm_head.weight", "language_model.lm_head.weight", "lm_head.weight"),
    ("model.image_newline", "image_newline", "model.image_newline"),
    (
        "model.mm_projector.0.weight",
        "multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.weight",
    ),
    ("model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias", "model.multi_modal_projector.linear_2.bias"),
    (
        f"{TOWER}encoder.layers.0.mlp.fc1.bias",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
    ),
    (
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    (
        f"{TOWER}encoder.layers.0.mlp.fc1.lora_B.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_B.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc1.lora_B.weight",
    ),
]


@pytest.mark.parametrize(("native", "in_files", "of_modules"), SPELLINGS)
def test_the_spellings_of_transformers_own_layout(native: str, in_files: str, of_modules: str):
    assert hub_name(native) == in_files
    assert module_name(native) == of_modules
    for wrapper in ("", "base_model.model.", "module.", "module.base_model.model."):
        for spelling in (native, in_files, of_modules):
            assert native_name(wrapper + spelling) == native


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", f"{TOWER}encoder.layers.0.mlp.fc1.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", f"{TOWER}pre_layrnorm.bias"),
        ("model.language_model.lm_head.weight", "lm_head.weight"),
        ("model.language_model.model.norm.weight", "model.norm.weight"),
        (
            "base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1.weight",
            "model.mm_projector.0.weight",
        ),
        (
            "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.default.weight",
            "model.layers.1.mlp.up_proj.lora_A.weight",
        ),
        (
            "base_model.model.model.layers.1.mlp.up_proj.lora_B.digits.weight",
            "model.layers.1.mlp.up_proj.lora_B.weight",
        ),
        (
            "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector.default.weight",
            "model.layers.1.mlp.up_proj.lora_magnitude_vector.weight",
        ),
        (
            "base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector",
            "model.layers.1.mlp.up_proj.lora_magnitude_vector",
        ),
    ],
)
def test_further_spellings(key: str, name: str):
    assert native_name(key) == name


def test_modules_have_names_too():
    assert module_name("model.layers.0.self_attn.q_proj") == "model.language_model.layers.0.self_attn.q_proj"
    assert module_name("model.mm_projector.0") == "model.multi_modal_projector.linear_1"
    assert module_name("lm_head") == "lm_head"


@pytest.mark.parametrize("name", ["model.mm_projector.weight", "model.mm_projector.4.weight", "model.layersx"])
def test_what_transformers_layout_has_no_place_for_is_refused(name: str):
    for rename in (hub_name, module_name):
        with pytest.raises(CheckpointError, match=rf"has no place for {name}\. It holds .* Keep the native layout"):
            rename(name)
