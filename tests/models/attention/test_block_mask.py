"""The blocks that flex_attention looks at are those of the whole mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from llava_ft.models.attention.boundaries import BLOCK_SIZE, causal_block_mask


def blocks(counts: torch.Tensor, indices: torch.Tensor) -> list[set[int]]:
    """The blocks of keys that each block of queries has."""
    return [set(row[:count].tolist()) for row, count in zip(indices[0, 0], counts[0, 0].tolist(), strict=True)]


@pytest.mark.parametrize(
    "lengths", [[1], [128], [129], [256, 256], [100, 28, 128, 300], [640], [5, 900, 3], [127, 1, 1, 127, 130]]
)
@pytest.mark.parametrize("window", [None, 1, 130, 300])
def test_is_torch_s_own_mask(lengths, window):
    mask = causal_block_mask(lengths, "cpu", window)
    expected = create_block_mask(mask.mask_mod, 1, 1, sum(lengths), sum(lengths), device="cpu")
    assert mask.shape == expected.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        actual, wanted = (
            blocks(getattr(m, f"{name}_num_blocks"), getattr(m, f"{name}_indices")) for m in (mask, expected)
        )
        assert actual == wanted, name


@given(st.lists(st.integers(1, 3 * BLOCK_SIZE), min_size=1, max_size=6), st.none() | st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_blocks_are_seen_as_a_whole_in_part_or_not(lengths, window):
    total = sum(lengths)
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(total)
    is_seen = (sample[:, None] == sample) & (place[:, None] >= place)
    if window is not None:
        is_seen &= place[:, None] - place < window
    mask = causal_block_mask(lengths, "cpu", window)
    assert torch.equal(mask.mask_mod(None, None, place[:, None], place), is_seen)
    some, whole = blocks(mask.kv_num_blocks, mask.kv_indices), blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    for query, rows in enumerate(is_seen.split(BLOCK_SIZE)):
        for key, part in enumerate(rows.split(BLOCK_SIZE, dim=1)):
            found = "whole" if key in whole[query] else "some" if key in some[query] else "none"
            is_whole = bool(part.all()) and len(rows) == BLOCK_SIZE
            assert found == ("whole" if is_whole else "some" if part.any() else "none"), (query, key)
