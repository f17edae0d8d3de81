"""Tiles of anyres equal the original's, bytes become the same numbers, and decoding may be fast or exact."""

import hashlib
import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_ft.data.image_files import check_image_header, load_image
from llava_ft.data.image_processor import ImageProcessorSettings, PixelNormalizer, normalize_batch
from llava_ft.data.images import ImageTransform
from llava_ft.errors import ImageError, UserError
from llava_ft.geometry import ImageGeometry, parse_grid_pinpoints
from tests.data.test_images import ARRAYS, INDEX, MEAN, SOURCES, STD, TINY

GRIDS = "(1x2),(2x1),(2x2),(3x1),(1x3)"
ANYRES = ImageGeometry(56, 4, 16, 16, aspect_ratio="anyres", grid_pinpoints=parse_grid_pinpoints(GRIDS, 56))
S2 = ImageGeometry(56, 4, 16, 16, aspect_ratio="pad", s2_scales=(56, 112))
TRANSFORM = ImageTransform(TINY, geometry=ANYRES)
SIDES = st.one_of(st.integers(1, 9), st.integers(1, 500))


def photograph(width: int, height: int) -> Image.Image:
    """A smooth picture with some detail."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def as_jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


class TestRecordings:
    @pytest.mark.parametrize("key", [key for key in ARRAYS if key.endswith("/anyres")])
    def test_equal_the_original_bit_for_bit(self, key):
        values = TRANSFORM(load_image(SOURCES / key.removesuffix("/anyres")))
        assert values.dtype == torch.float32
        assert np.array_equal(values.numpy(), ARRAYS[key])

    @pytest.mark.parametrize("name", INDEX["images"])
    @pytest.mark.parametrize("size", [56, 336])
    def test_equal_the_recorded_hashes(self, name, size):
        recorded = INDEX["images"][name][f"{size}/anyres"]
        values = {**TINY.to_dict(), "size": size, "crop_size": size}
        geometry = replace(ANYRES, image_size=size, grid_pinpoints=parse_grid_pinpoints(GRIDS, size))
        transform = ImageTransform(ImageProcessorSettings.from_dict(values), geometry=geometry)
        pixel_values = transform(load_image(SOURCES / name))
        assert list(pixel_values.shape) == recorded["shape"]
        assert hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest() == recorded["sha256"]

    @pytest.mark.parametrize("name", sorted(path.name for path in SOURCES.iterdir()))
    def test_every_picture_works(self, name):
        picture = load_image(SOURCES / name)
        assert TRANSFORM.pixels(picture).shape == (ANYRES.num_tiles(picture.size), 3, 56, 56)


class TestTiles:
    def test_the_overview_and_the_grid(self):
        picture = Image.new("RGB", (112, 112))
        colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
        for index, colour in enumerate(colours):
            picture.paste(colour, (index % 2 * 56, index // 2 * 56, index % 2 * 56 + 56, index // 2 * 56 + 56))
        overview, *tiles = TRANSFORM.pixels(picture)
        for tile, colour in zip(tiles, colours, strict=True):
            assert (tile == torch.tensor(colour)[:, None, None]).all()
        assert overview[:, 10, 10].tolist() == [250, 0, 0]
        assert overview[:, 45, 45].tolist() == [250, 250, 0]

    def test_padding_is_black(self):
        tiles = TRANSFORM.pixels(Image.new("RGB", (112, 28), (9, 9, 9)))
        assert tiles.shape[0] == 3
        assert (tiles[0] == 9).all()  # the overview keeps no proportions
        assert (tiles[1:, :, :14] == 0).all()
        assert (tiles[1:, :, 14:42] == 9).all()
        assert (tiles[1:, :, 42:] == 0).all()

    @settings(max_examples=60, deadline=None)
    @given(SIDES, SIDES)
    def test_any_size(self, width, height):
        tiles = TRANSFORM.pixels(Image.new("RGB", (width, height), (10, 20, 30)))
        assert tiles.dtype == torch.uint8
        assert tiles.shape == (ANYRES.num_tiles((width, height)), 3, 56, 56)
        assert (tiles[0] == torch.tensor([10, 20, 30])[:, None, None]).all()

    @pytest.mark.parametrize("size_wh", [(65_535, 1), (1, 65_535), (65_535, 40)])
    def test_extreme_shapes(self, size_wh):
        tiles = TRANSFORM.pixels(Image.new("RGB", size_wh))
        assert tiles.shape[0] == ANYRES.num_tiles(size_wh)

    def test_a_processor_that_crops_from_a_larger_size(self):
        transform = ImageTransform(replace(TINY, size={"shortest_edge": 64}), geometry=ANYRES)
        assert transform.pixels(photograph(200, 100)).shape[1:] == (3, 56, 56)

    def test_giant_pinpoints_are_refused(self):
        with pytest.raises(UserError, match="image_grid_pinpoints has a size of 78,400,000,000 pixels; 67,108,864 are"):
            ImageTransform(TINY, geometry=replace(ANYRES, grid_pinpoints=((280_000, 280_000),)))

    def test_settings_of_another_tower_are_refused(self):
        with pytest.raises(UserError, match="makes images of 56 x 56 pixels, but the vision tower takes 112 x 112"):
            ImageTransform(TINY, geometry=ImageGeometry(112, 8, 64, 64))


class TestS2:
    def test_pictures_have_the_largest_scale(self):
        transform = ImageTransform(TINY, geometry=S2)
        assert transform.output_size == (112, 112)
        picture = photograph(300, 200)
        large = {**TINY.to_dict(), "size": 112, "crop_size": 112}
        expected = ImageTransform(ImageProcessorSettings.from_dict(large), "pad")(picture)
        assert torch.equal(transform(picture), expected)
        sides = replace(TINY, size={"height": 56, "width": 56}, do_center_crop=False)
        assert ImageTransform(sides, geometry=S2).pixels(picture).shape == (1, 3, 112, 112)


class TestNormalizer:
    @pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7), (2, 2, 3, 4, 4)])
    def test_each_level_of_each_channel(self, shape):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        rescaled = (pixels.numpy().astype(np.float64) * TINY.rescale_factor).astype(np.float32)
        values = PixelNormalizer(TINY)(pixels)
        assert np.array_equal(values.numpy(), (rescaled - MEAN) / STD)

    def test_steps_can_be_left_out(self):
        pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
        plain = PixelNormalizer(replace(TINY, do_normalize=False, do_rescale=False))(pixels)
        assert torch.equal(plain, pixels.float())

    def test_a_transform_is_its_normalised_bytes(self):
        picture = photograph(90, 60)
        for transform in (ImageTransform(TINY, "pad"), TRANSFORM):
            values = transform.normalizer(transform.pixels(picture))
            assert torch.equal(transform(picture), values if transform is TRANSFORM else values[0])

    def test_batches(self):
        normalizer = PixelNormalizer(TINY)
        pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
        batch = {"input_ids": torch.ones(1), "pixel_values": pixels}
        assert torch.equal(normalize_batch(batch, normalizer)["pixel_values"], normalizer(pixels))
        assert batch["pixel_values"] is pixels
        for untouched in ({"input_ids": 1}, {"pixel_values": pixels.float()}):
            assert normalize_batch(untouched, normalizer) is untouched
        assert normalize_batch(batch, None) is batch

    def test_it_can_be_sent_to_workers(self):
        pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
        copy = pickle.loads(pickle.dumps(TRANSFORM))
        assert torch.equal(copy.normalizer(pixels), TRANSFORM.normalizer(pixels))

    def test_blanks(self):
        assert torch.equal(ImageTransform(TINY).blank(2), torch.zeros(2, 3, 56, 56, dtype=torch.uint8))
        assert TRANSFORM.blank(1, (112, 112)).shape == (5, 3, 56, 56)


class TestFastDecoding:
    TRANSFORMS = pytest.mark.parametrize(
        "transform",
        [ImageTransform(TINY), ImageTransform(TINY, "pad"), TRANSFORM, ImageTransform(TINY, geometry=S2)],
        ids=["square", "pad", "anyres", "s2"],
    )

    @TRANSFORMS
    @pytest.mark.parametrize("size_wh", [(1600, 1200), (1200, 1600), (3000, 200), (130, 90)])
    def test_nothing_is_enlarged_that_was_large_enough(self, transform, size_wh):
        needed = transform.decode_size(size_wh)
        picture = load_image(as_jpeg(photograph(*size_wh)), fast_decode_to=transform.decode_size)
        for stored, have, need in zip(size_wh, picture.size, needed, strict=True):
            assert have == stored or have >= need
        assert picture.size in [(-(-size_wh[0] // n), -(-size_wh[1] // n)) for n in (1, 2, 4, 8)]

    @TRANSFORMS
    def test_the_same_shapes_and_nearly_the_same_pixels(self, transform):
        content = as_jpeg(photograph(1600, 1200))
        exact = transform.pixels(load_image(content))
        picture = load_image(content, fast_decode_to=transform.decode_size)
        assert picture.size != (1600, 1200)
        fast = transform.pixels(picture, (1600, 1200))
        assert fast.shape == exact.shape
        assert (fast.int() - exact.int()).abs().float().mean() < 4

    def test_the_grid_is_that_of_the_stored_size(self):
        content = as_jpeg(photograph(450, 1001))  # an eighth is 57 x 126, of other proportions
        picture = load_image(content, fast_decode_to=lambda size_wh: (50, 100))
        assert picture.size == (57, 126)
        assert TRANSFORM.pixels(picture, (450, 1001)).shape[0] == ANYRES.num_tiles((450, 1001))

    def test_a_turned_picture_needs_the_turned_size(self):
        asked: list[tuple[int, int]] = []

        def needed(size_wh: tuple[int, int]) -> tuple[int, int]:
            asked.append(size_wh)
            return 100, 400

        exif = Image.Exif()
        exif[0x0112] = 6
        content = as_jpeg(photograph(1600, 800), exif=exif)
        assert load_image(content, exif_transpose=True, fast_decode_to=needed).size == (200, 400)
        assert asked == [(800, 1600)]

    def test_other_formats_are_decoded_whole(self):
        picture = load_image(SOURCES / "square.png", fast_decode_to=lambda size_wh: (1, 1))
        assert picture.size == (224, 224)

    def test_the_default_is_exact(self):
        assert load_image(SOURCES / "landscape.jpg").size == (640, 480)


class TestContent:
    """Images that are not files."""

    def test_bytes_are_decoded_like_the_file(self):
        file = SOURCES / "landscape.jpg"
        assert load_image(file.read_bytes()).tobytes() == load_image(file).tobytes()
        assert check_image_header(file.read_bytes()) == (640, 480)

    @pytest.mark.parametrize(
        ("content", "kind"), [(b"", "image-empty"), (b"no picture", "image-corrupt"), (b"\x89PNG", "image-corrupt")]
    )
    @pytest.mark.parametrize("read", [load_image, check_image_header])
    def test_unusable_content_is_named(self, content, kind, read):
        with pytest.raises(ImageError, match="Image '7/0' ") as caught:
            read(content, name="7/0")
        assert (caught.value.kind, caught.value.path) == (kind, "7/0")

    def test_cut_content(self):
        with pytest.raises(ImageError, match="embedded in the data") as caught:
            load_image((SOURCES / "landscape.jpg").read_bytes()[:5000])
        assert caught.value.kind == "image-truncated"

    def test_sizes_as_turned(self):
        file = SOURCES / "exif_rot6.jpg"
        assert check_image_header(file) == (200, 120)
        assert check_image_header(file, exif_transpose=True) == (120, 200) == load_image(file, exif_transpose=True).size
        assert check_image_header(SOURCES / "square.png", exif_transpose=True) == (224, 224)
