"""How many features a tower gives, and which projector a name means."""

import pytest
from torch import nn

from llava_ft.errors import UserError
from llava_ft.models.families.llama import LlavaLlamaConfig
from llava_ft.models.projectors import find_projector
from llava_ft.models.towers import tower_fields
from llava_ft.models.towers.tower import TowerFacts


@pytest.mark.parametrize(
    ("image_size", "patch_size", "feature", "expected"),
    [
        (336, 14, "patch", 576),
        (336, 14, "cls_patch", 577),
        (224, 14, "patch", 256),
        (56, 14, "patch", 16),
        (224, 32, "cls_patch", 50),
        (30, 14, "patch", 4),
        (14, 14, "patch", 1),
    ],
)
def test_features_of_an_image(image_size, patch_size, feature, expected):
    facts = TowerFacts(image_size, patch_size, width=8, depth=1, num_prefix_tokens=1)
    assert facts.tokens(image_size, image_size, feature) == expected


@pytest.mark.parametrize(("image_size", "patch_size"), [(13, 14), (0, 14), (336, 0), (-14, -14)])
def test_refuses_sizes_without_patches(image_size, patch_size):
    with pytest.raises(UserError, match=f"image_size {image_size} and patch_size {patch_size} has no patches"):
        TowerFacts(image_size, patch_size, width=8, depth=1)


def test_a_tower_in_a_whole_model_is_of_its_type():
    with pytest.raises(UserError, match=r"is a 'siglip' model. Supported vision towers: clip_vision_model"):
        tower_fields({"model_type": "siglip", "vision_config": {"hidden_size": 8}}, "D")
    fields = tower_fields({"model_type": "clip", "vision_config": {"image_size": 56}}, "D")
    assert fields["image_size"] == 56
    assert "model_type" not in fields  # as checkpoints have always had it


def test_pictures_must_be_square():
    with pytest.raises(UserError, match=r"image_size of the vision tower is \[56, 28\]; it must be one whole number"):
        _ = LlavaLlamaConfig(mm_vision_config={"image_size": [56, 28]}).tower_facts


def test_scales_are_pooled_without_a_class_token():
    config = LlavaLlamaConfig(mm_vision_config={}, s2=True, s2_scales="224,448", mm_vision_select_feature="cls_patch")
    with pytest.raises(UserError, match="s2_scales=224,448 pools patches"):
        _ = config.image_geometry


@pytest.mark.parametrize("name", ["mlp", "mlp0x_gelu", "mlp100x_gelu", "xlinear", "linear ", ""])
def test_a_projector_is_named_in_full(name):
    message = f"mm_projector_type={name}: unknown projector. Allowed: linear, identity, mlpNx_gelu with N from 1 to 99."
    with pytest.raises(UserError, match=message):
        find_projector(name)


def test_layers_of_a_projector_have_the_originals_names():
    assert list(find_projector("mlp3x_gelu").build("mlp3x_gelu", 4, 6).state_dict())[::2] == [
        "0.weight",
        "2.weight",
        "4.weight",
    ]
    assert isinstance(find_projector("identity").build("identity", 6, 6), nn.Identity)
