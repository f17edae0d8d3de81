"""Paths and tiny models that several tests use."""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["tests.isolation"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# What tests prepare is theirs: it does not go into the caches of whoever runs them.
_CACHE = tempfile.TemporaryDirectory(prefix="llava-ft-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

RECORDINGS = Path(__file__).parent / "golden"
SEVERAL_RANKS = Path(__file__).parent / "distributed"
LONGEST = {"test_compile.py", "test_gpu.py", "test_quickstart.py", "test_vision_cache.py"}


class _ByFile(LoadScopeScheduling):
    """Gives each process whole files; all those whose tests start ranks go to one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        return "ranks" if path.startswith("tests/distributed/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFile:
    """Decide which tests share a process. Groups by mark have no effect with pytest 9.2 and xdist 3.8."""
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that start ranks, then with the longest files: no process is left alone with one."""
    items.sort(key=lambda item: (SEVERAL_RANKS not in item.path.parents, item.path.name not in LONGEST))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what has been imported: each of the many small runs calls it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _short_waits() -> Iterator[None]:
    """Runs in this process do not wait for the disk, and measure what the machine can do with small products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which fails, too, if there is no such file
        if (speed := sys.modules.get("llava_ft.training.speed")) is not None:
            patch.setattr(speed, "_SECONDS_TO_MEASURE", 0.0)
            patch.setattr(speed, "_SIDE", {"cpu": 256})
        yield


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of what was recorded from original LLaVA."""
    return RECORDINGS


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget which kernels were kept out of graphs, and how many graphs of a layer there may be."""
    import torch._dynamo
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {})
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


@pytest.fixture
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in the folder that the paths inside the recordings are relative to."""
    monkeypatch.chdir(RECORDINGS)
    return RECORDINGS


def read_recording(name: str):
    """Return the content of a JSON recording."""
    return json.loads((RECORDINGS / name).read_text())
