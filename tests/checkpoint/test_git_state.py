"""Which commit a run says it was started from."""

import subprocess
from pathlib import Path

import pytest

from llava_ft.checkpoint.lineage import git_state


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    root = tmp_path / "work"
    root.mkdir()
    git(root, "init", "--quiet")
    (root / "code.py").write_text("1\n")
    git(root, "add", "code.py")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_folder_inside_a_repository(repository: Path):
    inside = repository / "runs"
    inside.mkdir()
    (inside / "notes.txt").write_text("not tracked")
    state = git_state(inside)
    assert state is not None
    assert state.commit == git(repository, "rev-parse", "HEAD")
    assert state.root == repository.resolve()
    assert not state.is_modified
    assert str(state) == state.commit


def test_changed_files_are_told(repository: Path):
    (repository / "code.py").write_text("2\n")
    state = git_state(repository)
    assert state is not None
    assert state.is_modified
    assert str(state) == f"{state.commit} (modified)"


def test_it_is_asked_once(repository: Path):
    before = git_state(repository)
    (repository / "code.py").write_text("2\n")
    assert git_state(repository) is before


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "plain"
    folder.mkdir()
    assert git_state(folder) is None


def test_a_repository_without_a_commit(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    assert git_state(tmp_path) is None


def test_no_git(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(repository) is None
