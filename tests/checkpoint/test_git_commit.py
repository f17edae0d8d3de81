"""Which commit a run says it was started from."""

import os
import subprocess
from pathlib import Path

import pytest

from llava_ft.checkpoint.lineage import git_commit


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
    git(
        repository, "-c", "user.name=a", "-c", "user.email=a@b", "tag", "-a", "v1", "-m", "one"
    )  # whose name is not that of the commit
    assert git_commit(inside) == git(repository, "rev-parse", "HEAD")


def test_changed_files_are_told(repository: Path):
    (repository / "code.py").write_text("2\n")
    assert git_commit(repository) == f"{git(repository, 'rev-parse', 'HEAD')} (modified)"


def test_the_index_is_left_alone(repository: Path):
    os.utime(repository / "code.py", (1, 1))  # git would note that its content is the same
    before = (repository / ".git/index").stat()
    assert git_commit(repository) == git(repository, "rev-parse", "HEAD")
    after = (repository / ".git/index").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_it_is_asked_once(repository: Path):
    before = git_commit(repository)
    (repository / "code.py").write_text("2\n")
    assert git_commit(repository) == before


def test_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "plain"
    folder.mkdir()
    assert git_commit(folder) == ""


def test_a_repository_without_a_commit(tmp_path: Path):
    git(tmp_path, "init", "--quiet")
    assert git_commit(tmp_path) == ""


def test_no_git(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit(repository) == ""
