"""Items to a batch: padded, packed, joined."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.collator import PackedCollator, PaddingCollator
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
    assert "attention_mask" not in batch
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["sample_indices"] == [7, 3]
    assert batch["bad_samples"] == []
    assert batch["num_tokens"] == 4
    assert not {"pixel_values", "image_sizes", "image_features"} & set(batch)


def test_a_mask_comes_from_lengths_not_from_the_pad_token():
    batch = PaddingCollator(0, with_mask=True)([item(0, [0, 0, 4]), item(1, [4, 0])])
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, True, False]]


def test_images_of_all_items_are_in_reading_order():
    image = IMAGE_TOKEN_INDEX
    items = [item(1, [image, 4], 1), item(2, [4, 4, 4]), item(3, [image, image], 2)]
    batch = PaddingCollator(0)(items)
    pixels = batch["pixel_values"][batch["tile_index"]]
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
    assert batch["input_ids"].tolist() == [[3, 4]]


def row(*items):
    return {"samples": list(items)}


ROWS = [row(item(7, [5, 6, 7]), item(3, [8])), row(item(4, [9, 9]))]


def test_packed_rows_restart_positions_and_learn_no_first_token():
    batch = PackedCollator(0, row_length=6)(ROWS)
    skip = IGNORE_INDEX
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0], [9, 9, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[skip, 6, 7, skip, skip, skip], [skip, 9, skip, skip, skip, skip]]
    assert "attention_mask" not in batch
    assert batch["sample_indices"] == [7, 3, 4]
    assert batch["num_tokens"] == 6
    assert batch["bad_samples"] == []
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}


def test_a_full_row_has_nothing_left_over():
    batch = PackedCollator(0, row_length=4)([row(item(7, [5, 6, 7]), item(3, [8]))])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0]]


def test_flattened_rows_are_the_same_rows_one_after_the_other():
    apart = PackedCollator(0, row_length=6)(ROWS)
    joined = PackedCollator(0, row_length=6, flatten=True)(ROWS)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(joined[name], apart[name].view(1, -1))
    assert joined["sample_lengths"] == [3, 1, 2, 2, 4]
    assert "sample_lengths" not in apart


def test_joined_without_padding():
    batch = PackedCollator(0, flatten=True)([row(item(7, [5, 6, 7])), row(item(3, [8]))])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert batch["sample_lengths"] == [3, 1]
    assert batch["num_tokens"] == batch["input_ids"].numel()


def test_padded_rows_are_filled_up_to_a_multiple():
    items = [item(7, [5, 6, 7]), item(3, [8])]
    batch = PaddingCollator(2, with_mask=True, length_multiple=4)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert (batch["labels"][:, -1] == IGNORE_INDEX).all()
    assert batch["attention_mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    exact = PaddingCollator(2, length_multiple=3)(items)
    assert exact["input_ids"].shape == (2, 3)
    assert PaddingCollator(2, length_multiple=0)(items)["input_ids"].shape == (2, 3)


def test_what_fills_up_a_joined_row_is_a_sample_of_its_own():
    rows = [row(item(7, [5, 6, 7])), row(item(3, [8, 9]))]
    batch = PackedCollator(0, flatten=True, length_multiple=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert (batch["labels"][0, 5:] == IGNORE_INDEX).all()
    assert batch["sample_lengths"] == [3, 2, 3]
    assert (batch["num_tokens"], batch["num_pairs"]) == (5, 6 + 3)
    assert PackedCollator(0, flatten=True, length_multiple=5)(rows)["sample_lengths"] == [3, 2]
    packed = PackedCollator(0, row_length=6, flatten=True, length_multiple=4)(rows)
    assert packed["sample_lengths"] == [3, 3, 2, 4]  # rows of a length that never changes stay as they are
    validation = PackedCollator(0, flatten=True, length_multiple=4)([item(7, [5, 6, 7]), item(3, [8])])
    assert validation["input_ids"].shape == (2, 4)


def test_validation_samples_are_padded_by_the_same_collator():
    items = [item(7, [5, 6, 7]), item(3, [8])]
    packed, padded = PackedCollator(0, row_length=6)(items), PaddingCollator(0)(items)
    assert set(packed) == set(padded)
    assert torch.equal(packed["input_ids"], padded["input_ids"])


@pytest.mark.parametrize("flatten", [False, True])
def test_images_sizes_and_features_of_all_rows_are_in_reading_order(flatten):
    image = IMAGE_TOKEN_INDEX

    def with_images(index, num_images, num_tiles):
        pixels = torch.full((num_tiles, 3, 2, 2), index, dtype=torch.uint8)
        extra = {
            "pixel_values": pixels,
            "image_sizes": torch.tensor([[index, i] for i in range(num_images)]),
            "image_features": torch.full((num_tiles, 4, 5), index, dtype=torch.bfloat16),
        }
        return item(index, [image, 4], **extra)

    rows = [row(with_images(1, 1, 3), item(2, [4, 4])), row(with_images(3, 2, 2), with_images(4, 1, 1))]
    batch = PackedCollator(0, row_length=6, flatten=flatten)(rows)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"][batch["tile_index"], 0, 0, 0].tolist() == [1, 1, 1, 3, 3, 4]
    assert batch["image_sizes"].tolist() == [[1, 0], [3, 0], [3, 1], [4, 0]]
    assert batch["image_features"].shape == (6, 4, 5)
    assert batch["image_features"].dtype == torch.bfloat16


def test_a_bad_sample_takes_the_labels_of_no_other():
    bad = BadSampleError(9, "x", "image-missing", "gone")
    lost = item(9, [4, 4], bad_sample=bad)
    lost["labels"].fill_(IGNORE_INDEX)
    batch = PackedCollator(0, row_length=6)([row(item(1, [5, 5]), lost, item(2, [6, 6]))])
    assert batch["bad_samples"] == [bad]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 5, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 6]]


def test_packed_collator_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="Give a row_length or flatten"):
        PackedCollator(0)
    with pytest.raises(ValueError, match="samples of a row have 4 tokens, but it has room for 3"):
        PackedCollator(0, row_length=3)([row(item(7, [5, 6, 7]), item(3, [8]))])
    assert pickle.loads(pickle.dumps(PackedCollator(0, row_length=6)))(ROWS)["num_tokens"] == 6


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 20))
def test_samples_can_be_read_off_a_batch(row_lengths, spare):
    """Positions that restart cut a row into its samples, in order, and what is left over."""
    size = max(map(sum, row_lengths)) + spare
    rows = [row(*(item(0, list(range(1, n + 1))) for n in lengths)) for lengths in row_lengths]
    batch = PackedCollator(0, row_length=size)(rows)
    for positions, ids, lengths in zip(batch["position_ids"], batch["input_ids"], row_lengths, strict=True):
        starts = (positions == 0).nonzero()[:, 0].tolist()
        found = [len(part) for part in torch.tensor_split(positions, starts[1:])]
        assert found == lengths + [size - sum(lengths)] * (size > sum(lengths))
        assert torch.equal(ids[: sum(lengths)], positions[: sum(lengths)] + 1)
