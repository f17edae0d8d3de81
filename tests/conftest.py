"""Paths and tiny models that several tests use."""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

RECORDINGS = Path(__file__).parent / "golden"


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
