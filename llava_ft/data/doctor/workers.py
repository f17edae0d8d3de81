"""Processes that work on tasks in order, with bounded memory, and survive a file that kills one of them.

Processes come from a server that has loaded the libraries once and holds no threads (`forkserver`): they start in
milliseconds and share its memory. With one worker the work is done in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Final, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASKS_AHEAD: Final = 3
"""Tasks for each worker that are handed out before the oldest result is taken."""

_PRELOADED: Final = ("llava_ft.data.doctor.records", "llava_ft.data.doctor.pictures")

_context: Any = None
"""What `context()` gives in this process."""


def context() -> Any:
    """What the workers were started with."""
    return _context


def _set_context(value: Any) -> None:
    global _context
    _context = value


def _begin(value: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _set_context(value)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class Workers:
    """A number of processes, to be used in a `with` block.

    Args:
        num_workers: How many; 1 works in this process.
        given: What `context()` returns in each of them; it is pickled once for each.
    """

    def __init__(self, num_workers: int, given: Any):
        self.num_workers = num_workers
        self._given = given
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.num_workers > 1:
            self._pool = self._start(self.num_workers)
        else:
            _set_context(self._given)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        else:
            _set_context(None)

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], when_killed: Callable[[Task], Result]
    ) -> Iterator[Result]:
        """Work on tasks, and give their results in the order of the tasks.

        Args:
            function: Does one task. It is found by its name in the worker.
            tasks: Drawn as they are needed.
            when_killed: Gives the result, here, for a task that ends the process it is worked on in.
        """
        if self._pool is None:
            yield from map(function, tasks)
            return
        remaining = iter(tasks)
        running: deque[tuple[Task, Future[Result]]] = deque()
        while True:
            while len(running) < _TASKS_AHEAD * self.num_workers:
                try:
                    task = next(remaining)
                except StopIteration:
                    break
                running.append((task, self._submit(function, task)))
            if not running:
                return
            task, future = running.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                # Every task under way is lost with the pool; one of them is to blame.
                for lost in [task, *(other for other, _ in running)]:
                    yield self.run_alone(function, lost, when_killed)
                running.clear()
                self._restart()

    def run_alone(
        self, function: Callable[[Task], Result], task: Task, when_killed: Callable[[Task], Result]
    ) -> Result:
        """Do one task in a process of its own; see `map`."""
        with self._start(1) as pool:
            pool.submit(os.getpid).result()  # a process that cannot even start is not the task's fault
            try:
                return pool.submit(function, task).result()
            except BrokenProcessPool:
                pass
        return when_killed(task)

    def _submit(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        assert self._pool is not None
        try:
            return self._pool.submit(function, task)
        except BrokenProcessPool as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            return failed

    def _restart(self) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        self._pool = self._start(self.num_workers)

    def _start(self, num_workers: int) -> ProcessPoolExecutor:
        started = multiprocessing.get_context("forkserver")
        started.set_forkserver_preload(list(_PRELOADED))
        return ProcessPoolExecutor(num_workers, mp_context=started, initializer=_begin, initargs=(self._given,))
