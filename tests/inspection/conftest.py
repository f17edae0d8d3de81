"""Small data sets, looked at in this process unless a test asks for more."""

import json

import pytest

from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.preparation.truncation import Limits
from llava_ft.data.sources.open import open_source
from llava_ft.inspection.check_source import check_source
from tests.data.conftest import GEOMETRY, SOURCES, build, folder, tokenize, tokenizer, transform

__all__ = ["build", "folder", "tokenize", "tokenizer", "transform"]


@pytest.fixture
def write(tmp_path):
    """Write records into a file of a name, and open it."""

    def make(records, name="records.json"):
        path = tmp_path / name
        if isinstance(records, list):
            path.write_text(json.dumps(records))
        source = open_source(path)
        source.prepare(tmp_path / "cache")
        return source

    return make


@pytest.fixture
def make_plan(tokenize, tmp_path):
    """Say how a run reads its data, with defaults that a test may replace."""
    make_tokens = tokenize

    def make(
        *,
        max_length=2048,
        truncation="truncate",
        geometry=GEOMETRY,
        image_folder=SOURCES,
        check_images="header",
        tokenize=make_tokens,
        num_processes=1,
    ):
        needs_sizes = geometry is not None and geometry.needs_image_sizes
        return DataPlan(
            tokenize,
            Limits(geometry, max_length, truncation),
            ImageChecks(check_images, needs_sizes),
            None if image_folder is None else str(image_folder),
            PreparationSettings(tmp_path / "cache", num_processes),
        )

    return make


@pytest.fixture
def check(write, make_plan):
    """Check records."""

    def run(records, *, prompt_prefix="", **options):
        return check_source(write(records), make_plan(**options), prompt_prefix=prompt_prefix)

    return run
