"""How many positions an image takes."""

import pytest

from llava_ft.errors import UserError
from llava_ft.geometry import num_image_tokens


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
def test_counts(image_size, patch_size, feature, expected):
    assert num_image_tokens(image_size, patch_size, feature) == expected


def test_patch_is_the_default():
    assert num_image_tokens(336, 14) == 576


def test_refuses_an_unknown_feature():
    with pytest.raises(UserError, match="mm_vision_select_feature is 'cls'; it can be 'patch' or 'cls_patch'"):
        num_image_tokens(336, 14, "cls")


@pytest.mark.parametrize(("image_size", "patch_size"), [(13, 14), (0, 14), (336, 0), (-14, -14)])
def test_refuses_sizes_without_patches(image_size, patch_size):
    with pytest.raises(UserError, match=f"image_size {image_size} and patch_size {patch_size} has no patches"):
        num_image_tokens(image_size, patch_size)
