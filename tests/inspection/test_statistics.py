"""Numbers about the records."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_ft.data.packing import pack
from llava_ft.data.preparation.truncation import Limits
from llava_ft.inspection.statistics import count_all, count_epoch, make_histogram
from tests.data.conftest import TOKENS_PER_IMAGE, record, turns


@given(lengths=st.lists(st.integers(1, 10**6), min_size=1, max_size=300))
def test_histogram(lengths):
    histogram = make_histogram(np.sort(np.array(lengths)))
    assert sum(histogram["counts"]) == len(lengths)
    assert len(histogram["counts"]) == len(histogram["edges"]) <= 18
    assert histogram["edges"][0] <= min(lengths)
    steps = np.diff(histogram["edges"])
    assert len(set(steps.tolist())) <= 1
    for start, count in zip(histogram["edges"][:-1], histogram["counts"][:-1], strict=True):
        assert count == sum(start <= length < start + steps[0] for length in lengths)


def test_one_long_record_does_not_flatten_the_rest():
    histogram = make_histogram(np.array([*range(400, 1400), 200_000]))
    assert histogram["edges"][-1] < 1500
    assert histogram["counts"][-1] == 1001 - sum(histogram["counts"][:-1])


def test_counts(check):
    records = [
        record("a", image="landscape.jpg"),
        record("b", image="landscape.jpg"),
        record("c", image="no.jpg"),
        {"conversations": turns("One?", "red", "<image>Two?", "blue " * 200), "image": "landscape.jpg"},
        "text",
    ]
    found = check(records, max_length=200)
    numbers = count_all(found, Limits(None, 200))
    assert (numbers["records"], numbers["usable"]) == (5, 3)
    assert (numbers["images"], numbers["image_files"], numbers["unusable_images"]) == (4, 2, 1)
    lost = numbers["truncation"]
    assert (lost["records_cut"], lost["answers_lost"], lost["images_lost"]) == (1, 1, 1)
    assert lost["tokens_lost"] > lost["supervised_lost"] > 200
    assert lost["tokens_lost"] > 200 + TOKENS_PER_IMAGE
    assert numbers["tokens"] + lost["tokens_lost"] == int(found.columns["tokens"].sum())
    assert numbers["lengths"]["longest"] == max(found.columns["tokens"])
    assert 0 < numbers["supervised_share"] < 1
    assert numbers["supervised_share"] == pytest.approx(numbers["supervised"] / numbers["tokens"], abs=1e-6)


def test_nothing_usable(check):
    numbers = count_all(check(["text"]), Limits(None, 200))
    assert numbers["lengths"] is None
    assert numbers["supervised_share"] == 0


def test_epoch():
    lengths = np.array([100, 50, 50, 200, 120, 80])
    epoch = count_epoch(lengths, lengths // 2, max_length=200, batch_size=2, seed=3)
    packing = epoch.pop("packing")
    assert epoch == {"records": 6, "tokens": 600, "supervised": 300}
    assert packing["rows"] == len(pack(lengths, 200, 3)) == 3
    assert packing["efficiency"] == 1.0
    assert 0.5 < packing["padded_efficiency"] <= 1.0
