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
from llava_ft.data.preparation.processes import Progress, num_cores, run_tasks
from llava_ft.errors import BadSampleError, RunError


def square(task):
    if task == "fail":
        raise BadSampleError(7, "x", "bad-text", "no text")
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task, os.getpid()


def blame(task):
    return task, "blamed"


class TestRunTasks:
    def test_results_are_in_order_and_come_from_other_processes(self):
        results = list(run_tasks(square, range(20), 2))
        assert [result for result, _ in results] == [number * number for number in range(20)]
        assert os.getpid() not in {pid for _, pid in results}

    def test_one_process_is_this_one(self):
        assert list(run_tasks(square, [3, 4], 1)) == [(9, os.getpid()), (16, os.getpid())]

    def test_no_tasks(self):
        assert list(run_tasks(square, [], 2)) == []

    def test_tasks_are_drawn_as_they_are_needed(self):
        drawn = []
        results = run_tasks(square, (drawn.append(task) or task for task in range(1000)), 2)
        assert next(results)[0] == 0
        assert len(drawn) < 20
        results.close()

    def test_what_fails_is_raised_here(self):
        with pytest.raises(BadSampleError) as caught:
            list(run_tasks(square, [1, "fail", 2, 3], 2))
        assert (caught.value.index, caught.value.kind) == (7, "bad-text")

    def test_a_process_that_is_killed_is_an_error(self):
        with pytest.raises(RunError, match=r"ended before it was done.* use fewer --preprocessing_num_workers"):
            list(run_tasks(square, [1, "die", 2, 3], 2))

    def test_a_task_that_kills_its_process_is_named_and_the_others_are_done(self):
        results = list(run_tasks(square, [*range(9), "die", *range(10, 20)], 2, blame))
        assert [result for result, _ in results] == [*(n * n for n in range(9)), "die", *(n * n for n in range(10, 20))]
        assert results[9] == ("die", "blamed")

    def test_the_callers_script_is_not_run_again(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "from operator import neg\nfrom llava_ft.data.preparation import processes\n"
            "processes._PRELOADED = ()\nprint(list(processes.run_tasks(neg, [1, 2, 3], 2)))\n"
        )
        found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
        assert found.stdout == "[-1, -2, -3]\n"

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
        def refuse(*args, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(build_once.FileLock, "acquire", refuse)
        with pytest.raises(RunError, match=r"The disk with .* is full"):
            open_or_build(tmp_path / "made", self.open, self.build)


class TestProgress:
    def test_lines_say_how_fast(self, caplog, monkeypatch):
        monkeypatch.setattr("llava_ft.data.preparation.processes._SECONDS_BETWEEN_LINES", 0.0)
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
