"""Records, pictures and data sets for the tests of data."""

import json
import shutil
import zlib
from pathlib import Path

import pytest
from PIL import Image

from llava_ft.conversation import get_template
from llava_ft.data.build import build_datasets
from llava_ft.data.images import ImageTransform
from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.preparation.truncation import Limits
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.geometry import ImageGeometry

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCES = GOLDEN / "images" / "src"
GEOMETRY = ImageGeometry(image_size=56, tokens_per_side=4, tokens_per_tile=16, features_per_tile=16, aspect_ratio="pad")
TOKENS_PER_IMAGE = GEOMETRY.num_tokens()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizers" / "tiny512", model_max_length=2048)


@pytest.fixture(scope="session")
def tokenize(tokenizer):
    return SampleTokenizer(tokenizer, get_template("v1"))


@pytest.fixture(scope="session")
def transform():
    return ImageTransform.from_pretrained(GOLDEN / "ckpt" / "clip-tiny", "pad")


@pytest.fixture
def build(tokenize, transform, tmp_path):
    """Build from records or from a file, with defaults that a test may replace."""

    def run(records, **options):
        path = records
        if isinstance(records, list):
            path = tmp_path / "records.json"
            path.write_text(json.dumps(records))
        geometry = options.pop("geometry", GEOMETRY)
        checks = options.pop("check_images", "header"), geometry is not None and geometry.needs_image_sizes
        folder = options.pop("image_folder", SOURCES)
        plan = DataPlan(
            options.pop("tokenize", tokenize),
            Limits(geometry, options.pop("model_max_length", 2048), options.pop("truncation", "truncate")),
            ImageChecks(*checks, options.pop("exif_transpose", False)),
            None if folder is None else str(folder),
            options.pop("preparation", None) or PreparationSettings(),
        )
        return build_datasets(path, plan, image_transform=options.pop("image_transform", transform), **options)

    return run


def record(name="r", image=None, question="What is it?", answer="a red car", **extra):
    images = image if isinstance(image, list) else [image] * (image is not None)
    text = "<image>" * len(images) + "\n" * bool(images) + question
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    entry = {"id": name, "conversations": turns, **extra}
    return {**entry, "image": image} if image is not None else entry


def turns(*texts):
    roles = ["human", "gpt"] * len(texts)
    return [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]


def write_bomb(path):
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    Image.new("RGB", (4, 4)).save(path, "PNG")
    rest = path.read_bytes()[33:]
    signature = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big")
    path.write_bytes(signature + header + zlib.crc32(header).to_bytes(4, "big") + rest)


@pytest.fixture
def folder(tmp_path):
    """A folder with one good picture and several that cannot be used."""
    path = tmp_path / "pictures"
    (path / "sub.png").mkdir(parents=True)
    shutil.copy(SOURCES / "landscape.jpg", path / "good.jpg")
    content = (path / "good.jpg").read_bytes()
    (path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (path / "headless.jpg").write_bytes(content[:3])
    (path / "empty.png").touch()
    (path / "text.png").write_text("not a picture")
    write_bomb(path / "bomb.png")
    Image.new("1", (70_000, 1)).save(path / "long.png")
    return path
