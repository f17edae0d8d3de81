"""Names and order of rows of tensors in GGUF files."""

import pytest
import torch

from llava_ft.convert.gguf_file import plan_tensors, restore_rows, rotate_rows
from tests.convert.gguf_files import ANYRES, whole

pytestmark = pytest.mark.usefixtures("in_recordings")


def test_every_tensor_has_a_name_of_its_own_or_is_the_unread_end_of_the_tower():
    model = whole(ANYRES)
    plan = plan_tensors(model.shapes, model.config, torch.float32)
    names = {tensor.native: (tensor.file, tensor.name) for tensor in plan}
    left_out = model.shapes.keys() - names
    assert len(left_out) == 18
    assert all("encoder.layers.2." in native or "post_layernorm" in native for native in left_out)
    assert len(set(names.values())) == len(names) == 81 - 18
    assert names["model.layers.1.self_attn.o_proj.weight"] == ("language", "blk.1.attn_output.weight")
    assert names["model.mm_projector.2.bias"] == ("vision", "mm.2.bias")
    assert names["model.image_newline"] == ("vision", "v.image_newline")


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
