"""What a mixture takes of each source: exact counts, nothing of what is held out, the same everywhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_ft.data.sources.mixture import Mixture, MixtureEntry
from llava_ft.data.sources.selection import select_rows
from llava_ft.errors import UserError


def mixture(*entries, epoch_size=None):
    return Mixture(Path("mix.yaml"), tuple(entries), epoch_size)


def entry(path="a", **fields):
    return MixtureEntry(path, path, **fields)


held_out = st.none() | st.integers(1, 5) | st.floats(0.01, 0.5)
amounts = st.one_of(
    st.builds(dict),
    st.builds(dict, count=st.integers(1, 200)),
    st.builds(dict, repeat=st.integers(1, 4)),
)


@st.composite
def mixtures(draw):
    sizes = draw(st.lists(st.integers(6, 60), min_size=1, max_size=4))
    if draw(st.booleans()):
        fields = [{"weight": draw(st.floats(1e-3, 1e3))} for _ in sizes]
        epoch_size = draw(st.none() | st.integers(1, 300))
    else:
        fields, epoch_size = [draw(amounts) for _ in sizes], None
    entries = [entry(f"source {number}", held_out=draw(held_out), **some) for number, some in enumerate(fields)]
    return sizes, mixture(*entries, epoch_size=epoch_size)


@given(mixtures(), st.integers(0, 2**32 - 1))
def test_counts_are_exact_and_nothing_held_out_is_trained_on(drawn, seed):
    sizes, mixed = drawn
    selection = select_rows(sizes, mixed, seed)
    for number, size in enumerate(sizes):
        each, train, kept = mixed.entries[number], selection.train[number], selection.held_out[number]
        assert not set(train) & set(kept)
        assert set(train) | set(kept) <= set(range(size))
        assert list(kept) == sorted(set(kept))
        assert list(train) == sorted(train)
        expected = each.held_out if isinstance(each.held_out, int) else max(1, round(size * (each.held_out or 0)))
        assert len(kept) == (0 if each.held_out is None else expected)
        pool = size - len(kept)
        if each.weight is None:
            assert len(train) == (each.repeat * pool if each.count is None else each.count)
        times = np.bincount(train, minlength=size)[np.setdiff1d(np.arange(size), kept)]
        assert times.max() - times.min() <= 1, "whole passes before anything is taken again"
    if mixed.entries[0].weight is not None:
        total = mixed.epoch_size or sum(sizes) - sum(map(len, selection.held_out))
        assert sum(map(len, selection.train)) == total
        weights = [each.weight for each in mixed.entries]
        for train, weight in zip(selection.train, weights, strict=True):
            assert abs(len(train) - total * weight / sum(weights)) < 1 + 1e-6


@given(mixtures(), st.integers(0, 2**32 - 1))
def test_the_same_everywhere(drawn, seed):
    sizes, mixed = drawn
    first, second = select_rows(sizes, mixed, seed), select_rows(sizes, mixed, seed)
    for name in ("train", "held_out"):
        for one, other in zip(getattr(first, name), getattr(second, name), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_choice_does_not_depend_on_other_sources_and_changes_with_the_seed():
    some = entry("a", count=10, held_out=5)
    alone = select_rows([100], mixture(some), 7)
    among = select_rows([50, 100], mixture(entry("b"), some), 7)
    np.testing.assert_array_equal(alone.held_out[0], among.held_out[1])
    np.testing.assert_array_equal(alone.train[0], among.train[1])
    assert list(select_rows([100], mixture(some), 8).held_out[0]) != list(alone.held_out[0])
    more = select_rows([100], mixture(replace(some, count=20)), 7)
    np.testing.assert_array_equal(more.held_out[0], alone.held_out[0])
    assert set(alone.train[0]) < set(more.train[0])


def test_entries_of_one_path_choose_apart():
    first, second = select_rows([1000, 1000], mixture(entry("a", count=10), entry("a", count=10)), 0).train
    assert list(first) != list(second)


def test_known_numbers():
    three_to_one = mixture(entry("a", weight=3), entry("b", weight=1), epoch_size=10)
    assert [len(rows) for rows in select_rows([4, 100], three_to_one, 0).train] == [8, 2]
    thirds = mixture(*(entry(name, weight=0.1) for name in "abc"), epoch_size=10)
    assert [len(rows) for rows in select_rows([9, 9, 9], thirds, 0).train] == [4, 3, 3]
    assert select_rows([3], mixture(entry("a", repeat=2)), 0).train[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(select_rows([5], mixture(entry("a", weight=1, held_out=1)), 0).train[0]) == 4


def test_too_few_records():
    with pytest.raises(UserError, match=r"Source a of the mixture has no usable record"):
        select_rows([0], mixture(entry("a")), 0)
    with pytest.raises(UserError, match=r"has 5 usable record\(s\), and held_out = 5 leaves none to train on"):
        select_rows([5], mixture(entry("a", held_out=5)), 0)
    with pytest.raises(UserError, match=r"has 1 usable record\(s\), and held_out = 0.1 leaves none"):
        select_rows([1], mixture(entry("a", held_out=0.1)), 0)
