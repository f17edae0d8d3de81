"""Several ranks fill a vision cache together and train on it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.matrix import ALONE, SHORT, Pools, Setting

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

NUM_IMAGES = 10
"""Different images in data/mix.json."""


def sizes(cache: Path) -> list[int]:
    """Images in each file; a rank writes one file a batch."""
    return [len(load_file(path)) for path in cache.glob("features-*/features-*.safetensors")]


@pytest.mark.parametrize("others", [[Setting("none", 2), ALONE], [Setting("zero3", 2)] * 2], ids=str)
def test_two_ranks_share_the_work_and_others_find_it(pools: Pools, tmp_path: Path, others: list[Setting]):
    """Some micro-batches have images on one rank and only text on the other, which ZeRO-3 must not wait over."""
    for number, setting in enumerate(others):
        plain = pools.straight("lora", setting, "float32", **SHORT).result
        out = tmp_path / f"out{number}"
        cached = pools.train(out, "lora", setting, "float32", vision_cache=tmp_path / "cache", **SHORT)
        assert cached.losses == plain.losses
        assert all((cached.weights[name] == value).all() for name, value in plain.weights.items())
        assert sizes(tmp_path / "cache") == [NUM_IMAGES // 2, NUM_IMAGES // 2]
