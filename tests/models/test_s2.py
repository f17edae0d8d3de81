"""S2 computes what its paper describes, here written out feature by feature."""

import pytest
import torch
import torch.nn.functional as F

from llava_ft.models.towers.s2 import multiscale_features
from tests.models.test_forward import load

TILE, PATCH = 56, 14


def slow_multiscale(encode, image: torch.Tensor, scales: list[int]) -> torch.Tensor:
    """The features of one `(3, H, W)` image, one token at a time (arXiv:2403.13043, section 3.1, figure 1).

    At each scale the image is interpolated, cut into tiles of the smallest scale, each tile encoded by itself, the
    features put back where their tiles were, and averaged over squares so that as many are left as at the smallest.
    """
    side = TILE // PATCH
    tokens = [[[] for _ in range(side)] for _ in range(side)]
    for scale in scales:
        factor = scale // TILE
        large = F.interpolate(image[None], size=(scale, scale), mode="bicubic")[0]
        where: dict[tuple[int, int], torch.Tensor] = {}
        for tile_row in range(factor):
            for tile_column in range(factor):
                top, left = tile_row * TILE, tile_column * TILE
                features = encode(large[None, :, top : top + TILE, left : left + TILE])[0]
                for index, feature in enumerate(features):
                    where[tile_row * side + index // side, tile_column * side + index % side] = feature
        for row in range(side):
            for column in range(side):
                square = [
                    where[row * factor + down, column * factor + right]
                    for down in range(factor)
                    for right in range(factor)
                ]
                tokens[row][column].append(torch.stack(square).mean(dim=0))
    return torch.stack([torch.cat(token) for row in tokens for token in row])


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize("scales", [(56,), (56, 112), (56, 112, 168), (56, 168)])
def test_equals_the_description(scales: tuple[int, ...]):
    tower = load("ckpt/llava15-tiny").model.vision_tower
    images = torch.randn(2, 3, scales[-1], scales[-1])
    got = multiscale_features(tower._encode, images, scales)
    assert got.shape == (2, 16, 32 * len(scales))
    for image, features in zip(images, got, strict=True):
        torch.testing.assert_close(features, slow_multiscale(tower, image, list(scales)), atol=1e-5, rtol=1e-5)


def test_the_smallest_scale_alone_is_the_tower():
    images = torch.randn(1, 3, 56, 56)
    encode = lambda pixels: pixels.flatten(2).transpose(1, 2)  # noqa: E731 - a tower that returns its pixels
    assert torch.equal(multiscale_features(encode, images, (56,)), encode(images))


def test_half_precision_is_interpolated_in_float32():
    images = torch.randn(1, 3, 112, 112, dtype=torch.bfloat16)
    seen: list[torch.dtype] = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.dtype)
        return pixels.flatten(2).transpose(1, 2)

    features = multiscale_features(encode, images, (56, 112))
    expected = F.interpolate(images.float(), size=(56, 56), mode="bicubic").bfloat16()
    assert torch.equal(features[..., :3], expected.flatten(2).transpose(1, 2))
    assert seen == [torch.bfloat16] * 2
    assert features.dtype == torch.bfloat16


@pytest.mark.usefixtures("in_recordings")
def test_the_projector_is_as_wide_as_all_scales():
    with pytest.raises(ValueError, match=r"mm_projector\.0\.weight .* 64 x 32, but the model needs 64 x 64"):
        load("ckpt/llava15-tiny", s2_scales="56,112")
