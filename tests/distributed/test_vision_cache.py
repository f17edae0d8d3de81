"""Several ranks fill a vision cache together and train on it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.matrix import Pools, Setting

pytestmark = pytest.mark.distributed

SHORT = {"max_steps": 3, "save_strategy": "no"}
NUM_IMAGES = 10
"""Different images in data/mix.json."""


def sizes(cache: Path) -> list[int]:
    """Images in each file; a rank writes one file a batch."""
    return [len(load_file(path)) for path in cache.glob("features-*/features-*.safetensors")]


@pytest.mark.parametrize("stage", ["none", "zero3"])
def test_two_ranks_share_the_work(pools: Pools, tmp_path: Path, stage: str):
    """Some micro-batches have images on one rank and only text on the other, which ZeRO-3 must not wait over."""
    setting, cache = Setting(stage, 2), tmp_path / "cache"
    plain = pools.train(tmp_path / "plain", "lora", setting, "float32", **SHORT)
    for _ in ("filled", "found"):
        cached = pools.train(tmp_path / "cached", "lora", setting, "float32", vision_cache=cache, **SHORT)
        assert cached.losses == plain.losses
        assert all((cached.weights[name] == value).all() for name, value in plain.weights.items())
        assert sorted(sizes(cache)) == [NUM_IMAGES // 2, NUM_IMAGES // 2]


def test_other_ranks_find_what_is_there(pools: Pools, tmp_path: Path):
    cache = tmp_path / "cache"
    for setting in (Setting("none", 2), Setting("none", 1)):
        plain = pools.train(tmp_path / "plain", "lora", setting, "float32", **SHORT)
        cached = pools.train(tmp_path / "cached", "lora", setting, "float32", vision_cache=cache, **SHORT)
        assert cached.losses == plain.losses
    assert sum(sizes(cache)) == NUM_IMAGES
