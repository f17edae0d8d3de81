"""Prepared pictures equal the original's, and each unusable file has a clear reason."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from llava_ft.data import images
from llava_ft.data.image_files import check_image_file, check_image_header, load_image
from llava_ft.data.image_processor import ImageProcessorSettings
from llava_ft.data.images import ImageTransform
from llava_ft.errors import ImageError, UserError

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCES = GOLDEN / "images" / "src"
INDEX = json.loads((GOLDEN / "images" / "index.json").read_text())
ARRAYS = np.load(GOLDEN / "images" / "px56.npz")
MODES = ("square", "pad")
TINY = ImageProcessorSettings(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
MEAN, STD = (np.array(v, np.float32)[:, None, None] for v in (TINY.image_mean, TINY.image_std))


def prepare(name, mode):
    return ImageTransform.from_pretrained(GOLDEN / "ckpt" / "clip-tiny", mode)(load_image(SOURCES / name))


def levels(pixel_values):
    """Undo the normalisation: (3, H, W) levels from 0 to 255."""
    return np.rint((pixel_values.numpy() * STD + MEAN) * 255).astype(int)


class TestRecordings:
    @pytest.mark.parametrize("key", [key for key in ARRAYS if key.split("/")[1] in MODES])
    def test_equal_the_original(self, key):
        name, mode = key.split("/")
        pixel_values = prepare(name, mode)
        assert pixel_values.dtype == torch.float32
        np.testing.assert_allclose(pixel_values.numpy(), ARRAYS[key], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("size", [56, 336])
    @pytest.mark.parametrize("name", INDEX["images"])
    def test_equal_the_original_bit_for_bit(self, name, size, mode):
        recorded = INDEX["images"][name][f"{size}/{mode}"]
        if "error" in recorded:
            return
        values = {**TINY.to_dict(), "size": size, "crop_size": size}
        pixel_values = ImageTransform(ImageProcessorSettings.from_dict(values), mode)(load_image(SOURCES / name))
        assert hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest() == recorded["sha256"]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", sorted(path.name for path in SOURCES.iterdir()))
    def test_every_picture_works(self, name, mode):
        pixel_values = prepare(name, mode)
        assert pixel_values.shape == (3, 56, 56)
        assert torch.isfinite(pixel_values).all()

    def test_one_pixel_high_in_square_mode(self):
        # The original fails: it takes the height for the number of channels.
        recorded = INDEX["images"]["one_px_high.png"]["56/square"]
        assert recorded["error"].startswith("ValueError: mean must have 1 elements")
        # Its height really being 1, every row is the middle of the stretched line.
        line = load_image(SOURCES / "one_px_high.png").resize((90 * 56, 1), Image.Resampling.BICUBIC)
        middle = np.asarray(line)[0, 44 * 56 + 28 :][:56].T
        assert (levels(prepare("one_px_high.png", "square")) == middle[:, None, :]).all()


class TestShapesAndModes:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("size_wh", [(5, 1), (1, 5), (9, 3), (3, 9), (1, 1), (3, 3)])
    def test_heights_of_1_and_3_are_heights(self, mode, size_wh):
        picture = Image.new("RGB", size_wh, (200, 100, 50))
        pixel_values = levels(ImageTransform(TINY, mode)(picture))
        assert pixel_values.shape == (3, 56, 56)
        assert pixel_values[:, 28, 28].tolist() == [200, 100, 50]

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("kind", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "HSV"])
    def test_any_mode(self, tmp_path, mode, kind):
        picture = Image.new("I;16", (40, 20), 128) if kind == "I;16" else None
        picture = picture or Image.new("RGB", (40, 20), (128, 128, 128)).convert("L").convert(kind)
        pixel_values = ImageTransform(TINY, mode)(picture)
        assert pixel_values.shape == (3, 56, 56)
        if kind not in ("1", "CMYK", "YCbCr", "HSV"):
            assert levels(pixel_values)[:, 28, 28].tolist() == [128, 128, 128]

    def test_grey_is_the_same_as_its_rgb(self):
        grey = Image.open(SOURCES / "gray.png")
        assert grey.mode == "L"
        for mode in MODES:
            transform = ImageTransform(TINY, mode)
            assert torch.equal(transform(grey), transform(grey.convert("RGB")))

    def test_transparent_palette_does_not_warn(self, tmp_path, recwarn):
        picture = Image.new("P", (4, 4))
        picture.putpalette([9, 9, 9] * 256)
        picture.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
        assert load_image(tmp_path / "p.png").getpixel((0, 0)) == (9, 9, 9)
        assert not recwarn.list

    def test_more_than_8_bits_are_cut_off(self, tmp_path):
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
        assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)

    def test_pad_surrounds_with_the_mean_colour(self):
        fill = [int(mean * 255) for mean in TINY.image_mean]
        tall = levels(ImageTransform(TINY, "pad")(Image.new("RGB", (10, 100))))
        assert tall[:, 28, 0].tolist() == tall[:, 28, -1].tolist() == fill
        assert tall[:, 28, 28].tolist() == [0, 0, 0]

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(MODES))
    def test_any_size(self, width, height, mode):
        pixel_values = ImageTransform(TINY, mode)(Image.new("RGB", (width, height), (10, 20, 30)))
        assert pixel_values.shape == (3, 56, 56)
        if mode == "square" or width == height:
            assert (levels(pixel_values) == np.array([10, 20, 30])[:, None, None]).all()

    @pytest.mark.parametrize("size_wh", [(300, 20), (20, 300), (97, 300), (301, 100)])
    def test_large_pictures_in_parts_are_equal(self, monkeypatch, size_wh):
        noise = np.random.default_rng(0).integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8)
        whole = {mode: ImageTransform(TINY, mode)(Image.fromarray(noise)) for mode in MODES}
        monkeypatch.setattr(images, "MAX_CANVAS_PIXELS", 1000)
        parts = {mode: ImageTransform(TINY, mode)(Image.fromarray(noise)) for mode in MODES}
        assert torch.equal(parts["pad"], whole["pad"])
        assert np.abs(levels(parts["square"]) - levels(whole["square"])).max() <= 1

    @pytest.mark.parametrize("mode", MODES)
    def test_extreme_shape_needs_little_memory(self, mode):
        # Padded to a square this would be 17 GB; resized along its shortest edge 12 gigapixels.
        pixel_values = ImageTransform(TINY, mode)(Image.new("RGB", (65_535, 1), (200, 100, 50)))
        assert pixel_values.shape == (3, 56, 56)


class TestExif:
    def test_orientation_is_ignored_unless_asked_for(self):
        plain = load_image(SOURCES / "exif_rot6.jpg")
        turned = load_image(SOURCES / "exif_rot6.jpg", exif_transpose=True)
        assert plain.size == (200, 120)
        assert turned.size == (120, 200)
        stored = Image.open(SOURCES / "exif_rot6.jpg")
        assert turned.tobytes() == ImageOps.exif_transpose(stored).convert("RGB").tobytes()

    def test_picture_without_orientation_stays(self):
        name = SOURCES / "landscape.jpg"
        assert load_image(name, exif_transpose=True).tobytes() == load_image(name).tobytes()


def png_bytes(size_wh=(64, 48)):
    noise = np.random.default_rng(1).integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def png_with_size(width, height):
    """A PNG whose header claims a size that its data does not have."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + png_bytes()[33:]


class TestUnusableFiles:
    def refuse(self, path, kind, match):
        for read in (load_image, check_image_header):
            with pytest.raises(ImageError, match=match) as caught:
                read(path)
            assert caught.value.kind == kind
            assert str(path) in str(caught.value)

    def test_missing(self, tmp_path):
        self.refuse(tmp_path / "no.png", "image-missing", "does not exist")

    def test_directory(self, tmp_path):
        self.refuse(tmp_path, "image-not-a-file", "is a directory, not a file")

    def test_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        self.refuse(tmp_path / "pipe.png", "image-not-a-file", "is a pipe, socket or device")

    def test_file_in_the_place_of_a_directory(self, tmp_path):
        (tmp_path / "a").write_text("x")
        self.refuse(tmp_path / "a" / "b.png", "image-unreadable", "cannot be reached: Not a directory")

    def test_name_with_a_null_byte(self, tmp_path):
        with pytest.raises(ImageError, match="cannot be reached: embedded null"):
            check_image_file(str(tmp_path / "a\0b.png"))

    def test_name_that_is_too_long(self, tmp_path):
        self.refuse(tmp_path / ("a" * 300), "image-unreadable", "File name too long")

    def test_empty(self, tmp_path):
        (tmp_path / "e.jpg").touch()
        self.refuse(tmp_path / "e.jpg", "image-empty", "is an empty file")

    def test_no_permission(self, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        (tmp_path / "p.png").write_bytes(png_bytes())
        monkeypatch.setattr(Image, "open", refuse)  # a mode of 000 would not stop root
        self.refuse(tmp_path / "p.png", "image-unreadable", "cannot be read: Permission denied")

    def test_not_an_image(self, tmp_path):
        (tmp_path / "t.jpg").write_text("<html>404</html>")
        self.refuse(tmp_path / "t.jpg", "image-corrupt", r"is not an image in a format that is read here \(JPEG, ")

    @pytest.mark.parametrize(
        ("start", "name"),
        [
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", "PostScript"),
            (b"\xc5\xd0\xd3\xc6" + bytes(60), "PostScript"),
            (b"%PDF-1.7\n", "PDF"),
            (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
            (b"\0\0\0\x18ftypheic" + bytes(60), "HEIF"),
            (b"\0\0\0\x18ftypisom" + bytes(60), "video"),
            (b"8BPS\0\1" + bytes(60), "PSD"),
            (b"DDS " + bytes(124), "DDS"),
            (b"BUFR" + bytes(60), "BUFR"),
            (b"\0\0\1\0\1\0" + bytes(60), "ICO"),
        ],
    )
    def test_other_formats_are_named_and_no_reader_starts(self, tmp_path, monkeypatch, start, name):
        Image.init()
        monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("a program was started"))
        for key in set(Image.OPEN) - {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"}:
            accepts = Image.OPEN[key][1]
            monkeypatch.setitem(Image.OPEN, key, (lambda *_, key=key: pytest.fail(f"{key} was read"), accepts))
        (tmp_path / "photo.jpg").write_bytes(start)
        self.refuse(tmp_path / "photo.jpg", "image-format", f"is a file of the format {name}, .* Convert it to PNG")
        with pytest.raises(ImageError, match=f"the format {name}"):
            load_image(start)

    @pytest.mark.parametrize("name", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
    def test_formats_that_are_read(self, name):
        written = io.BytesIO()
        more = {"save_all": True, "append_images": [Image.new("RGB", (9, 8))]} if name == "MPO" else {}
        Image.new("RGB", (9, 8), (200, 0, 0)).save(written, name, **more)
        assert load_image(written.getvalue()).size == (9, 8)

    def test_truncated_jpeg(self, tmp_path):
        content = (SOURCES / "landscape.jpg").read_bytes()
        (tmp_path / "t.jpg").write_bytes(content[: len(content) // 2])
        assert check_image_header(tmp_path / "t.jpg") == (640, 480)
        with pytest.raises(ImageError, match="cannot be decoded: image file is truncated") as caught:
            load_image(tmp_path / "t.jpg")
        assert caught.value.kind == "image-truncated"

    def test_truncated_png(self, tmp_path):
        (tmp_path / "t.png").write_bytes(png_bytes()[:4000])
        with pytest.raises(ImageError, match="truncated") as caught:
            load_image(tmp_path / "t.png")
        assert caught.value.kind == "image-truncated"

    def test_damaged_png(self, tmp_path):
        content = bytearray(png_bytes())
        content[2000:2100] = bytes(100)
        (tmp_path / "d.png").write_bytes(bytes(content))
        with pytest.raises(ImageError, match="cannot be decoded"):
            load_image(tmp_path / "d.png")

    def test_decompression_bomb(self, tmp_path):
        (tmp_path / "b.png").write_bytes(png_with_size(60_000, 60_000))
        self.refuse(tmp_path / "b.png", "image-too-large", r"is too large to be decoded: .*3600000000 pixels")

    def test_side_too_long(self, tmp_path):
        Image.new("1", (70_000, 1)).save(tmp_path / "l.png")
        self.refuse(tmp_path / "l.png", "image-too-large", "is 70000 x 1 pixels; a side can have 65535 at most")

    def test_error_survives_pickling(self):
        error = pickle.loads(pickle.dumps(ImageError("a/b.png", "image-missing", "does not exist")))
        assert (error.path, error.kind, error.reason) == ("a/b.png", "image-missing", "does not exist")
        assert str(error) == "Image 'a/b.png' does not exist."

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(sorted(path.name for path in SOURCES.iterdir())), st.data())
    def test_damage_anywhere_gives_a_picture_or_an_image_error(self, tmp_path_factory, name, data):
        content = bytearray((SOURCES / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
        path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
        with contextlib.suppress(ImageError):
            assert load_image(path).mode == "RGB"


class TestSettings:
    def test_sizes_as_numbers(self):
        # As openai/clip-vit-large-patch14-336 has them.
        settings = ImageProcessorSettings.from_dict(
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}
        )
        assert settings.size == {"shortest_edge": 336}
        assert settings.crop_size == {"height": 336, "width": 336}
        assert ImageTransform(settings).output_size == (336, 336)

    def test_height_and_width(self):
        settings = ImageProcessorSettings.from_dict(
            {"size": {"height": 30, "width": 40}, "do_center_crop": False, "image_mean": None}
        )
        assert ImageTransform(settings, "square")(Image.new("RGB", (9, 70))).shape == (3, 30, 40)
        assert ImageTransform(settings, "pad")(Image.new("RGB", (9, 70))).shape == (3, 30, 40)

    def test_round_trip(self):
        assert ImageProcessorSettings.from_dict(TINY.to_dict()) == TINY
        assert ImageProcessorSettings.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY

    def test_switches(self):
        picture = Image.new("RGB", (56, 56), (0, 128, 255))

        def centre(**switches):
            settings = ImageProcessorSettings.from_dict({**TINY.to_dict(), **switches})
            return ImageTransform(settings)(picture)[:, 28, 28].tolist()

        assert centre(do_normalize=False) == pytest.approx([0, 128 / 255, 1])
        assert centre(do_normalize=False, do_rescale=False) == [0, 128, 255]
        assert centre(do_normalize=False, rescale_factor=0.5) == [0, 64, 127.5]

    def test_crop_without_resize_surrounds_with_black(self):
        settings = ImageProcessorSettings.from_dict({**TINY.to_dict(), "do_resize": False})
        rows = levels(ImageTransform(settings)(Image.new("RGB", (21, 100), (255, 255, 255))))
        assert rows[0, 5].tolist() == [0] * 18 + [255] * 21 + [0] * 17

    def test_equal_to_the_processor_of_transformers(self):
        from transformers import CLIPImageProcessor

        noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
        for change in (
            {"crop_size": 41},
            {"crop_size": {"height": 70, "width": 33}},
            {"size": {"height": 20, "width": 31}},
            {"resample": 2},
            {"resample": 0, "do_resize": False},
            {"rescale_factor": 0.25, "image_mean": [0.1, 0.2, 0.3]},
            {"do_center_crop": False, "size": {"height": 20, "width": 31}},
        ):
            values = {**TINY.to_dict(), **change}
            theirs = CLIPImageProcessor(**values)(Image.fromarray(noise), return_tensors="pt")["pixel_values"][0]
            ours = ImageTransform(ImageProcessorSettings.from_dict(values))(Image.fromarray(noise))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"size": "big"}, "size is 'big'; it must be a number of pixels or a mapping with shortest_edge"),
            ({"size": {"longest_edge": 5}}, "size is {'longest_edge': 5}; it must be"),
            ({"size": -3}, "size is -3"),
            ({"size": {"height": 5, "width": 0}}, "a mapping with height and width"),
            ({"crop_size": {"shortest_edge": 5}}, "crop_size is {'shortest_edge': 5}; it must be a number"),
            ({"crop_size": True}, "crop_size is True"),
            ({"do_resize": "yes"}, "do_resize is 'yes'; it must be true or false"),
            ({"resample": 9}, "resample is 9; it must be the number of a Pillow filter"),
            ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; it must be a list of three numbers"),
            ({"image_std": [1, 1, 0]}, "no channel can have 0"),
            ({"image_std": [1, 1, float("nan")]}, "image_std is"),
            ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'; it must be a number"),
            (
                {"image_processor_type": "SiglipImageProcessor"},
                "describes a SiglipImageProcessor; only CLIP's",
            ),
        ],
    )
    def test_refuses_unusable_values(self, change, match):
        with pytest.raises(UserError, match=match):
            ImageProcessorSettings.from_dict({**TINY.to_dict(), **change})

    @pytest.mark.parametrize("change", [{}, {"do_resize": False}])
    def test_refuses_pictures_of_different_sizes(self, change):
        settings = ImageProcessorSettings.from_dict({**TINY.to_dict(), "do_center_crop": False, **change})
        with pytest.raises(UserError, match="gives pictures of different sizes; the vision tower needs one"):
            ImageTransform(settings)

    def test_refuses_an_unknown_aspect_ratio(self):
        with pytest.raises(UserError, match="image_aspect_ratio is 'round'; it can be 'square' or 'pad'"):
            ImageTransform(TINY, "round")

    def test_none_means_square(self):
        assert ImageTransform(TINY, None).aspect_ratio == "square"


class TestFromPretrained:
    def test_directory_and_file(self):
        folder = GOLDEN / "ckpt" / "clip-tiny"
        assert ImageProcessorSettings.from_pretrained(folder) == TINY
        assert ImageProcessorSettings.from_pretrained(folder / "preprocessor_config.json") == TINY

    def test_directory_without_the_file(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no preprocessor_config.json, which says how images"):
            ImageTransform.from_pretrained(tmp_path)

    @pytest.mark.parametrize(("content", "match"), [("{", "cannot be read as JSON"), ("[]", "holds a JSON list")])
    def test_damaged_file(self, tmp_path, content, match):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(UserError, match=match):
            ImageTransform.from_pretrained(tmp_path)

    def test_neither_local_nor_on_the_hub(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="'no/such-tower' is neither a local directory"):
            ImageTransform.from_pretrained("no/such-tower")


def test_transform_survives_pickling():
    transform = ImageTransform(TINY, "pad")
    picture = load_image(SOURCES / "landscape.jpg")
    assert torch.equal(pickle.loads(pickle.dumps(transform))(picture), transform(picture))
