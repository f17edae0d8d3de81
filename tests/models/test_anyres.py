"""Tiled images: embeddings and logits are the original's, and features are as many as the sizes say."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_ft.checkpoint.model import find_model, load_base
from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.data.image_files import load_image
from llava_ft.data.images import ImageTransform
from llava_ft.errors import UserError
from llava_ft.geometry import ImageGeometry, parse_grid_pinpoints
from llava_ft.models.anyres import as_picture, merge_tiles, unpad
from llava_ft.models.families.llama import LlavaLlamaConfig
from tests.conftest import RECORDINGS, read_recording
from tests.models.test_forward import TOLERANCE, load, read

SIZES = read_recording("forward/index.json")["anyres_image_sizes"]
IDS = torch.tensor([[1, 5, 9]])
GEOMETRY = ImageGeometry(
    image_size=56,
    tokens_per_side=4,
    tokens_per_tile=16,
    features_per_tile=16,
    aspect_ratio="anyres",
    merge_type="spatial_unpad",
    grid_pinpoints=parse_grid_pinpoints("(1x2),(2x1),(2x2),(3x1),(1x3)", 56),
)
SIDES = st.one_of(st.integers(1, 9), st.integers(1, 2000), st.integers(60_000, 65_535))


def with_images(sizes: list[list[int]], geometry: ImageGeometry) -> torch.Tensor:
    """Ids of one sample that holds images of these sizes, with a word before each."""
    ids = [1]
    for size_wh in sizes:
        ids += [7] + [IMAGE_TOKEN_INDEX] * geometry.num_tokens(tuple(size_wh))
    return torch.tensor([[*ids, 9]])


@pytest.mark.usefixtures("in_recordings")
class TestRecording:
    def test_embeddings_and_logits_are_the_original_s(self):
        recorded = read("anyres_spatial_unpad")
        model = load("ckpt/llava16-tiny-anyres")
        geometry = model.config.image_geometry
        transform = ImageTransform.from_pretrained("ckpt/clip-tiny", geometry=geometry)
        files = [RECORDINGS / "images/src" / name for name in ("landscape.jpg", "portrait.png")]
        pixels = torch.cat([transform(load_image(file)) for file in files])
        rows = []
        for ids, mask, size_wh in zip(recorded["input_ids"], recorded["attention_mask"], SIZES, strict=True):
            row = []
            for token in ids[mask.bool()].tolist():
                row += [token] * (geometry.num_tokens(tuple(size_wh)) if token == IMAGE_TOKEN_INDEX else 1)
            rows.append(row)
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
        assert torch.equal(mask, recorded["out_attention_mask"].bool())

        sizes = torch.tensor(SIZES)
        embeds = model.embed_inputs(ids, pixels, sizes)
        torch.testing.assert_close(embeds[mask], recorded["out_embeds"][mask], atol=TOLERANCE, rtol=0)
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_sizes=sizes).logits
        at = recorded["logits_at"]
        torch.testing.assert_close(logits[at[:, 0], at[:, 1]], recorded["logits"], atol=TOLERANCE, rtol=0)

    def test_features_stand_for_pixels(self):
        model = load("ckpt/llava16-tiny-anyres")
        pixels, ids = torch.randn(9, 3, 56, 56), with_images(SIZES, model.config.image_geometry)
        labels = ids.clamp(min=-100)
        expected = model(input_ids=ids, labels=labels, pixel_values=pixels, image_sizes=SIZES).loss
        features = model.model.vision_tower(pixels)
        got = model(input_ids=ids, labels=labels, image_features=features, image_sizes=SIZES).loss
        assert torch.equal(got, expected)
        model.runs_tower = False
        del model.model.vision_tower
        model.train()
        assert torch.equal(
            model(input_ids=ids, image_features=features, image_sizes=SIZES, labels=labels).loss, expected
        )
        assert torch.isfinite(model(input_ids=IDS, labels=IDS).loss)

    def test_every_trained_vision_parameter_has_a_gradient_whatever_the_batch(self):
        model = load("ckpt/llava16-tiny-anyres").train()
        vision = {name: p for name, p in model.named_parameters() if "mm_projector" in name or "newline" in name}
        flat = [[1000, 1]]  # keeps no row of its grid
        assert model.config.image_geometry.num_tokens((1000, 1)) == 16
        batches = {
            "images": (with_images(SIZES, model.config.image_geometry), torch.randn(9, 3, 56, 56), SIZES),
            "no row": (with_images(flat, model.config.image_geometry), torch.randn(3, 3, 56, 56), flat),
            "text": (IDS, None, None),
        }
        for kind, (ids, pixels, sizes) in batches.items():
            for parameter in vision.values():
                parameter.requires_grad_(True).grad = None
            model(input_ids=ids, labels=ids.clamp(min=-100), pixel_values=pixels, image_sizes=sizes).loss.backward()
            newline = vision["model.image_newline"].grad
            assert all(parameter.grad is not None for parameter in vision.values()), kind
            assert bool(newline.any()) == (kind == "images")

    @pytest.mark.parametrize("merge_type", ["flat", "spatial"])
    def test_other_layouts_have_no_newline(self, merge_type):
        base = find_model("ckpt/llava16-tiny-anyres", wishes={"mm_patch_merge_type": merge_type})
        model, ledger = load_base(base, dtype_of=lambda _: torch.float32)
        assert not hasattr(model.model, "image_newline")
        assert ["model.image_newline"] in ledger.unexpected.values()
        ids = with_images(SIZES, model.config.image_geometry)
        assert model(input_ids=ids, pixel_values=torch.randn(9, 3, 56, 56), image_sizes=SIZES).logits.shape[1] == 148

    def test_what_does_not_fit_is_refused(self):
        model = load("ckpt/llava16-tiny-anyres")
        ids = with_images(SIZES, model.config.image_geometry)
        with pytest.raises(
            ValueError, match=r"tiles images \(anyres\): image_sizes, their widths and heights, are needed"
        ):
            model(input_ids=ids, pixel_values=torch.randn(9, 3, 56, 56))
        with pytest.raises(ValueError, match=r"have 9 tiles, but there are 8"):
            model(input_ids=ids, pixel_values=torch.randn(8, 3, 56, 56), image_sizes=SIZES)
        with pytest.raises(ValueError, match=r"neither pixel_values nor image_features"):
            model(input_ids=ids)


class TestLayouts:
    """A grid of 2 x 1 tiles with 2 x 2 features each, as in the module's picture."""

    GEOMETRY = ImageGeometry(28, 2, 4, 4, aspect_ratio="anyres", grid_pinpoints=((56, 28),))
    TILES = torch.tensor([[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]]).unsqueeze(-1).float()

    def lay_out(self, merge_type: str, size_wh=(56, 28)) -> list[float]:
        geometry = replace(self.GEOMETRY, merge_type=merge_type)
        merged = merge_tiles(self.TILES, size_wh, geometry, torch.tensor([0.0]))
        assert len(merged) == geometry.num_tokens(size_wh)
        return merged.flatten().tolist()

    def test_as_in_the_docstring(self):
        assert self.lay_out("flat") == [1, 2, 3, 4, 11, 12, 13, 14, 21, 22, 23, 24]
        assert self.lay_out("spatial") == [1, 2, 3, 4, 11, 12, 21, 22, 13, 14, 23, 24]
        assert self.lay_out("spatial_unpad") == [1, 2, 3, 4, 11, 12, 21, 22, 0, 13, 14, 23, 24, 0]

    def test_padding_is_taken_away(self):
        assert self.lay_out("spatial_unpad", (28, 28)) == [1, 2, 3, 4, 12, 21, 0, 14, 23, 0]


class TestLaws:
    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=3),
        st.sampled_from(["flat", "spatial", "spatial_unpad", "anyres_max_1", "anyres_max_2", "anyres_max_3"]),
    )
    def test_features_are_as_many_as_the_sizes_say(self, sizes, kind):
        is_limited = kind.startswith("anyres")
        geometry = replace(
            GEOMETRY,
            merge_type="spatial_unpad" if is_limited else kind,
            aspect_ratio=kind if is_limited else "anyres",
        )
        for size_wh in sizes:
            tiles = torch.randn(geometry.num_tiles(size_wh), 16, 2)
            merged = merge_tiles(tiles, size_wh, geometry, torch.zeros(2))
            assert merged.shape == (geometry.num_tokens(size_wh), 2)
            assert torch.equal(merged[:16], tiles[0])

    @settings(max_examples=150, deadline=None)
    @given(SIDES, SIDES)
    def test_unpadding_inverts_padding(self, width, height):
        """Features of the picture stay, and those of padding alone go."""
        columns, rows = GEOMETRY.grid((width, height))
        picture = torch.zeros(1, rows * 4, columns * 4)
        kept = unpad(picture.clone(), (width, height))
        top, left = (rows * 4 - kept.shape[1]) // 2, (columns * 4 - kept.shape[2]) // 2
        assert not (top and left)
        picture[:, top : rows * 4 - top, left : columns * 4 - left] = 1
        assert bool(unpad(picture, (width, height)).all())
        assert kept.numel() == int(picture.sum())

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
    def test_a_picture_cut_into_tiles_is_put_together(self, rows, columns, side):
        picture = torch.arange(float(rows * columns * side * side)).reshape(1, rows * side, columns * side)
        tiles = [
            picture[0, r * side : (r + 1) * side, c * side : (c + 1) * side].flatten()
            for r in range(rows)
            for c in range(columns)
        ]
        assert torch.equal(as_picture(torch.stack(tiles).unsqueeze(-1), rows, columns), picture)

    def test_a_constant_picture_stays_constant_when_it_is_reduced(self):
        geometry = replace(GEOMETRY, aspect_ratio="anyres_max_1")
        tiles = torch.full((5, 16, 3), 2.5)
        merged = merge_tiles(tiles, (112, 112), geometry, torch.full((3,), 2.5))
        assert merged.shape == (16 + 4 * 5, 3)
        torch.testing.assert_close(merged, torch.full_like(merged, 2.5))


class TestConfiguration:
    def test_pinpoints_in_a_checkpoint_may_be_text(self):
        config = LlavaLlamaConfig(
            mm_vision_config={"image_size": 56, "patch_size": 14},
            image_aspect_ratio="anyres",
            image_grid_pinpoints="[(56, 112), (112, 56)]",
        )
        assert config.image_geometry.grid_pinpoints == ((56, 112), (112, 56))

    def test_text_only_models_have_no_geometry(self):
        assert LlavaLlamaConfig(image_aspect_ratio="anyres").image_geometry is None
        assert not LlavaLlamaConfig(mm_patch_merge_type="spatial_unpad").has_image_newline

    @pytest.mark.usefixtures("in_recordings")
    def test_defaults_follow_the_tower(self):
        config = find_model(
            "ckpt/base-llm", vision_tower="ckpt/clip-tiny", wishes={"image_aspect_ratio": "anyres"}
        ).config
        assert config.image_grid_pinpoints == [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]

    @pytest.mark.usefixtures("in_recordings")
    def test_a_checkpoint_s_pinpoints_hold_unless_others_are_asked_for(self, caplog):
        find = lambda **wishes: find_model("ckpt/llava16-tiny-anyres", wishes=wishes).config  # noqa: E731 - used here only
        assert len(find().image_grid_pinpoints) == 5
        assert not caplog.records
        assert find(image_grid_pinpoints="(1x2),(2x1)").image_grid_pinpoints == [[56, 112], [112, 56]]
        assert "image_grid_pinpoints: (1x2),(2x1) instead of [[56, 112]" in caplog.text
        with pytest.raises(UserError, match="image_grid_pinpoints holds 50 x 50"):
            find(image_grid_pinpoints="[[50, 50]]")
