"""Processes that share the work, directories that are made once, and what is said meanwhile."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys

import pytest

from llava_ft.data.preparation import build_once
from llava_ft.data.preparation.build_once import NotUsableError, open_or_build
from llava_ft.data.preparation.processes import num_cores, run_tasks
from llava_ft.data.preparation.progress import Progress
from llava_ft.errors import BadSampleError, RunError


def square(task, advance):
    advance(1)
    if task == "fail":
        raise BadSampleError(7, "x", "bad-text", "no text")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task, os.getpid()


class TestRunTasks:
    def test_results_are_in_order_and_come_from_other_processes(self):
        done = []
        results = run_tasks(square, list(range(20)), 2, done.append)
        assert [result for result, _ in results] == [number * number for number in range(20)]
        assert os.getpid() not in {pid for _, pid in results}
        assert sum(done) == 20

    @pytest.mark.parametrize(("tasks", "processes"), [([3], 8), ([3, 4], 1), ([], 2)])
    def test_in_this_process(self, tasks, processes):
        results = run_tasks(square, tasks, processes, lambda count: None)
        assert results == [(task * task, os.getpid()) for task in tasks]

    def test_what_fails_is_raised_here(self):
        with pytest.raises(BadSampleError) as caught:
            run_tasks(square, [1, "fail", 2, 3], 2, lambda count: None)
        assert (caught.value.index, caught.value.kind) == (7, "bad-text")

    def test_a_process_that_is_killed_is_named(self):
        with pytest.raises(RunError, match=r"ended by signal 9 .* use fewer --preprocessing_num_workers"):
            run_tasks(square, [1, "die", 2, 3], 2, lambda count: None)

    def test_cores(self):
        assert 1 <= num_cores() <= (os.cpu_count() or 1)


def test_processes_that_tokenise_do_without_pytorch():
    code = "import sys, llava_ft.data.preparation.prepare, llava_ft.data.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestOpenOrBuild:
    def open(self, directory):
        if not (directory / "whole").exists():
            raise NotUsableError("half of it is gone")
        return directory.name

    def build(self, directory):
        (directory / "whole").touch()

    def test_a_build_that_fails_leaves_nothing(self, tmp_path):
        def fail(directory):
            (directory / "half").touch()
            raise RuntimeError("no")

        with pytest.raises(RuntimeError):
            open_or_build(tmp_path / "made", self.open, fail)
        assert [path.name for path in tmp_path.iterdir()] == ["made.lock"]
        assert open_or_build(tmp_path / "made", self.open, self.build) == "made"

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        assert open_or_build(tmp_path / "made", self.open, self.build) == "made"

    def test_without_locks_the_first_result_stays(self, tmp_path, monkeypatch):
        def build_while_another_does(directory):
            self.build(directory)
            (tmp_path / "made").mkdir()
            (tmp_path / "made" / "whole").touch()
            (tmp_path / "made" / "first").touch()

        monkeypatch.setattr(build_once.shutil, "rmtree", lambda *args, **options: None)
        assert open_or_build(tmp_path / "made", self.open, build_while_another_does) == "made"
        assert (tmp_path / "made" / "first").exists()

    def test_another_may_go_first(self, tmp_path, monkeypatch):
        monkeypatch.setattr(build_once, "_SECONDS_AHEAD", 0.3)
        assert open_or_build(tmp_path / "made", self.open, self.build, goes_first=False) == "made"

    def test_full_while_the_lock_is_made(self, tmp_path, monkeypatch):
        def refuse(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(build_once.Path, "touch", refuse)
        with pytest.raises(RunError, match=r"The disk with .* is full"):
            open_or_build(tmp_path / "made", self.open, self.build)


class TestProgress:
    def test_lines_say_how_fast(self, caplog, monkeypatch):
        monkeypatch.setattr("llava_ft.data.preparation.progress._SECONDS_BETWEEN_LINES", 0.0)
        caplog.set_level(logging.INFO)
        with Progress("Tokenising a.json", 40, "records") as progress:
            progress.advance(10)
            progress.advance(30)
        assert caplog.messages[0].startswith("Tokenising a.json: 10 of 40 records, ")
        assert caplog.messages[1].endswith(" a second.")

    def test_quick_work_says_nothing(self, caplog):
        caplog.set_level(logging.INFO)
        with Progress("Tokenising a.json", 40, "records") as progress:
            progress.advance(40)
        assert not caplog.messages
