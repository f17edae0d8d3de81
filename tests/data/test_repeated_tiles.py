"""Equal tiles of a batch are in it once, and the model's loss is that of the batch with all of them."""

import pytest
import torch

from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.data.collator import PaddingCollator, distinct_tiles
from tests.models.test_forward import load


def tiles(*numbers: int, dtype=torch.uint8, side: int = 28) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    return torch.stack([torch.randint(256, (3, side, side), generator=each).to(dtype) for each in generators])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_is_there_once_in_order_of_first_occurrence(dtype):
    distinct, index = distinct_tiles(tiles(4, 2, 4, 4, 7, 2, dtype=dtype))
    assert torch.equal(distinct, tiles(4, 2, 7, dtype=dtype))
    assert index.tolist() == [0, 1, 0, 0, 2, 1]


def test_different_tiles_stay_as_they_are():
    given = tiles(1, 2, 3)
    distinct, index = distinct_tiles(given)
    assert distinct is given
    assert index is None


def test_tiles_that_differ_in_one_value_are_different():
    given = tiles(1, 1, 1)
    given[1, 2, 27, 26] += 1
    distinct, index = distinct_tiles(given)
    assert len(distinct) == 2
    assert index.tolist() == [0, 1, 0]


@pytest.mark.usefixtures("in_recordings")
def test_loss_and_projector_gradient_are_those_of_all_tiles(monkeypatch):
    model = load("ckpt/llava15-tiny").train()
    model.requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    image = torch.full((model.config.tokens_per_image,), IMAGE_TOKEN_INDEX)
    items = []
    for number, picture in enumerate((5, 6, 5)):
        ids = torch.cat([torch.tensor([1]), image, torch.tensor([40 + number, 50, 60])])
        pixels = tiles(picture, dtype=torch.float32, side=56) / 255
        items.append({"input_ids": ids, "labels": ids.clamp(min=-100), "pixel_values": pixels, "index": number})
        items[-1]["labels"][ids == IMAGE_TOKEN_INDEX] = -100
    encoded, results = [], []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    for removes in (True, False):
        if not removes:
            monkeypatch.setattr("llava_ft.data.collator.distinct_tiles", lambda given: (given, None))
        batch = PaddingCollator(0)(items)
        kept = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        assert ("tile_index" in kept) == removes
        model.zero_grad()
        loss = model(**kept).loss
        loss.backward()
        results.append((loss.item(), model.model.mm_projector[0].weight.grad.clone()))
    assert encoded == [2, 3]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)
