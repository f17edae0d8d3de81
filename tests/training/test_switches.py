"""Losses and gradients of combinations of all switches are those of the plain path.

Every pair of settings occurs in some combination. All combinations, a run each, are tested with

    LLAVA_FT_ALL_SWITCHES=1 python -m pytest tests/training/test_switches.py
"""

import os

import pytest
import torch

from tests.training.switches import (
    NUM_STEPS,
    PLAIN,
    SWITCHES,
    Combination,
    Observed,
    all_combinations,
    observe,
    pairs_of,
    pairwise,
)

pytestmark = pytest.mark.usefixtures("in_recordings", "fresh_compiler")

ALL = list(all_combinations())
CHOSEN = ALL if os.environ.get("LLAVA_FT_ALL_SWITCHES") else pairwise(ALL)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def plain() -> dict[str, Observed]:
    """What the plain path gives, by method; each is run once."""
    return {}


def name_of(combination: Combination) -> str:
    changed = [f"{name}={value}" for name, value in combination.items() if value != PLAIN[name]]
    return "-".join(changed).replace(" ", "_") or "plain"


@pytest.mark.parametrize("combination", CHOSEN, ids=name_of)
def test_a_combination_gives_what_the_plain_path_gives(combination, plain, cache, tmp_path, monkeypatch):
    method = combination["method"]
    if method not in plain:
        with monkeypatch.context() as patch:
            plain[method] = observe(PLAIN | {"method": method}, tmp_path / "plain", cache, patch)
    expected = plain[method]
    with monkeypatch.context() as patch:
        observed = observe(combination, tmp_path / "run", cache, patch)
    assert len(observed.losses) == len(expected.losses) == NUM_STEPS
    assert observed.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    for gradients, wanted in zip(observed.gradients, expected.gradients, strict=True):
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.norm() > 0, f"{name} says nothing"
            assert (gradients[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def test_every_pair_of_settings_that_is_allowed_is_tested():
    settings = {(name, value) for name, values in SWITCHES.items() for value in values}
    tested = set().union(*map(pairs_of, CHOSEN))
    assert {setting for pair in tested for setting in pair} == settings
    assert tested == set().union(*map(pairs_of, ALL))
    assert len(CHOSEN) < 60 or len(CHOSEN) == len(ALL)


def test_the_plain_path_computes_the_logits_of_all_positions(cache, tmp_path, monkeypatch):
    calls = []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    with monkeypatch.context() as patch:
        observe(PLAIN, tmp_path, cache, patch)
    assert len(calls) == NUM_STEPS
    assert all(len(shape) == 2 and shape[0] > 14 * 20 for shape in calls)
