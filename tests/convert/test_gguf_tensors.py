"""Names and order of rows of tensors in GGUF files."""

import gguf
import pytest
import torch

from llava_ft.convert.gguf_file import gguf_name, restore_rows, rotate_rows
from tests.convert.gguf_files import ANYRES, whole

pytestmark = pytest.mark.usefixtures("in_recordings")


def test_names_are_those_of_the_gguf_package():
    language = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    vision = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 4)
    checked = 0
    for native in whole(ANYRES).shapes:
        found = gguf_name(native)
        if found is None:
            assert "post_layernorm" in native
        elif found[0] == "language":
            assert language.get_name(native, (".weight", ".bias")) == found[1]
        elif "mm_projector" in native:
            assert found[1] == native.replace("model.mm_projector", "mm")
        else:
            known = native.replace("model.vision_tower.vision_tower.", "vision_tower.")
            assert vision.get_name(known, (".weight", ".bias")) == found[1]
        checked += 1
    assert checked == 81


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rotating_neighbours_of_the_new_order_is_rotating_halves_of_the_old(heads: int):
    torch.manual_seed(0)
    size, length = 8, 5
    weight, hidden = torch.randn(heads * size, 16), torch.randn(length, 16)
    angles = torch.outer(torch.arange(length).float(), 10000.0 ** -(torch.arange(0, size, 2) / size))[:, None]

    ours = (hidden @ weight.T).view(length, heads, size)
    first, second = ours.chunk(2, dim=-1)
    halves = torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )
    theirs = (hidden @ rotate_rows(weight, heads).T).view(length, heads, size)
    even, odd = theirs[..., ::2], theirs[..., 1::2]
    neighbours = torch.stack(
        [even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], dim=-1
    ).flatten(-2)

    scores = [torch.einsum("qhd,khd->hqk", rotated, rotated) for rotated in (halves, neighbours)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(restore_rows(rotate_rows(weight, heads), heads), weight)
    assert torch.equal(restore_rows(rotate_rows(weight[:, 0], heads), heads), weight[:, 0])
