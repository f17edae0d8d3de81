"""Paths and tiny models that several tests use."""

import json
import logging
import os
import tempfile
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# What tests prepare is theirs: it does not go into the caches of whoever runs them.
_CACHE = tempfile.TemporaryDirectory(prefix="llava-ft-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

RECORDINGS = Path(__file__).parent / "golden"
SEVERAL_RANKS = Path(__file__).parent / "distributed"
_LOG_LEVELS = {name: logging.getLogger(name).level for name in ("", "llava_ft")}
"""Taken before any test: fixtures of a whole file run commands before the first of its tests begins."""


class _ByFile(LoadScopeScheduling):
    """Gives each process whole files; all those whose tests start ranks go to one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        return "ranks" if path.startswith("tests/distributed/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFile:
    """Decide which tests share a process. Groups by mark have no effect with pytest 9.2 and xdist 3.8."""
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that start ranks, which take longest."""
    items.sort(key=lambda item: SEVERAL_RANKS not in item.path.parents)


@pytest.fixture(autouse=True)
def _logging_as_before():
    """Take back what the command line does to logging in this process."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    looks = [(handler, list(handler.filters), handler.formatter) for handler in handlers]
    yield
    root.handlers[:] = handlers
    for handler, filters, formatter in looks:
        handler.filters[:] = filters
        handler.setFormatter(formatter)
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True)
def _environment_as_before():
    """Take back what runs in this process leave in the environment: rank, port, accelerator."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of what was recorded from original LLaVA."""
    return RECORDINGS


@pytest.fixture
def in_recordings(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in the folder that the paths inside the recordings are relative to."""
    monkeypatch.chdir(RECORDINGS)
    return RECORDINGS


def read_recording(name: str):
    """Return the content of a JSON recording."""
    return json.loads((RECORDINGS / name).read_text())
