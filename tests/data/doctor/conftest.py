"""Checks of small data sets, in this process unless a test asks for workers."""

import json

import pytest

from llava_ft.data.doctor.check import check_source
from llava_ft.data.doctor.records import Plan
from llava_ft.data.doctor.workers import Workers
from llava_ft.data.preparation.progress import Progress
from llava_ft.data.preparation.samples import Limits
from llava_ft.data.sources.open import open_source
from tests.data.conftest import GEOMETRY, SOURCES


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
def make_plan(tokenize):
    """Make the plan of a run, with defaults that a test may replace."""

    def make(*, max_length=2048, truncation="truncate", geometry=GEOMETRY, image_folder=SOURCES, **options):
        folder = None if image_folder is None else str(image_folder)
        limits = Limits(geometry, max_length, truncation)
        return Plan(options.pop("tokenize", tokenize), limits, folder, **options)

    return make


@pytest.fixture
def check(write, make_plan):
    """Check records in this process."""

    def run(records, *, num_workers=1, prompt_prefix="", **options):
        plan = make_plan(**options)
        with Workers(num_workers, plan) as workers:
            return check_source(write(records), plan, workers, Progress, prompt_prefix=prompt_prefix)

    return run
