"""Padding of items to a batch."""

import pickle

import torch

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.collator import PaddingCollator
from llava_ft.errors import BadSampleError


def item(index, ids, num_images=0, **extra):
    entry = {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([IGNORE_INDEX if token < 0 else token for token in ids]),
        "index": index,
    }
    if num_images:
        entry["pixel_values"] = torch.full((num_images, 3, 2, 2), float(index))
    return {**entry, **extra}


def test_pads_on_the_right():
    batch = PaddingCollator(0)([item(7, [5, 6, 7]), item(3, [8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["sample_indices"] == [7, 3]
    assert batch["bad_samples"] == []
    assert "pixel_values" not in batch


def test_pad_token_in_the_text_stays_visible():
    batch = PaddingCollator(0)([item(0, [0, 0, 4]), item(1, [4, 0])])
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, True, False]]


def test_images_of_all_items_are_in_reading_order():
    image = IMAGE_TOKEN_INDEX
    items = [item(1, [image, 4], 1), item(2, [4, 4, 4]), item(3, [image, image], 2)]
    pixels = PaddingCollator(0)(items)["pixel_values"]
    assert pixels.shape == (3, 3, 2, 2)
    assert pixels.dtype == torch.float32
    assert pixels[:, 0, 0, 0].tolist() == [1.0, 3.0, 3.0]


def test_bad_samples_travel_with_the_batch():
    bad = BadSampleError(9, "x", "image-missing", "gone")
    batch = PaddingCollator(0)([item(1, [4]), item(9, [4], bad_sample=bad)])
    assert batch["bad_samples"] == [bad]
    back = pickle.loads(pickle.dumps(batch))["bad_samples"][0]
    assert (back.index, back.sample_id, back.kind, back.reason) == (9, "x", "image-missing", "gone")


def test_one_item_and_pickling():
    collator = pickle.loads(pickle.dumps(PaddingCollator(2)))
    batch = collator([item(0, [3, 4])])
    assert batch["attention_mask"].all()
    assert batch["input_ids"].tolist() == [[3, 4]]
