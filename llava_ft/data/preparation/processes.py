"""Work on parts of a data set in several processes: the one pool of this program, and how far it is.

It is the standard library's, over a fork server: a process that has loaded the libraries and holds no GPU, no process
group and no threads, all of which a fork of the training process could hang on. Its copies start in milliseconds and
share its memory. The pool adds three promises: results come in order while tasks are drawn as they are needed, a task
that kills its process can be told from the others, and the processes end with the one that started them.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any, Final, TypeVar

from llava_ft.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES: Final = 10.0
_TASKS_AHEAD: Final = 3
"""Tasks for each process that are handed out before the oldest result is taken."""

_PRELOADED: Final = ("llava_ft.data.preparation.prepare", "llava_ft.data.preparation.image_facts")

_work: Callable[[Any], Any] | None = None
"""What this process does with tasks; set in the processes of a pool only."""


def num_cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_processes: int,
    when_killed: Callable[[Task], Result] | None = None,
) -> Iterator[Result]:
    """Do tasks, and give their results in the order of the tasks.

    Args:
        work: Does one task; pickled once for each process. With much to carry, an object with `__call__` or a
            `functools.partial`.
        tasks: Drawn as they are needed; each goes to the next process that is free.
        num_processes: How many may work at once; 1 works in this process.
        when_killed: Gives the result, here, for a task that ends the process it is worked on in.

    Raises:
        RunError: A process was killed, and there is no `when_killed`.
        Exception: Whatever `work` raises.
    """
    if num_processes <= 1:
        yield from map(work, tasks)
        return
    remaining = iter(tasks)
    running: deque[tuple[Task, Future[Result]]] = deque()
    pool = _start(work, num_processes)
    try:
        while True:
            for task in islice(remaining, _TASKS_AHEAD * num_processes - len(running)):
                running.append((task, _submit(pool, task)))
            if not running:
                return
            task, future = running.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # Every task under way is lost with the pool; one of them is to blame.
                lost = [task, *(other for other, _ in running)]
                running.clear()
                pool.shutdown()
                if when_killed is None:
                    raise RunError(
                        "A process that prepared data ended before it was done. If memory ran out, use fewer "
                        "--preprocessing_num_workers."
                    ) from None
                for task in lost:
                    yield run_alone(work, task, when_killed)
                pool = _start(work, num_processes)
            else:
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def run_alone(work: Callable[[Task], Result], task: Task, when_killed: Callable[[Task], Result]) -> Result:
    """Do one task in a process of its own; see `run_tasks`."""
    with _start(work, 1) as pool:
        _submit(pool, None).result()  # a process that cannot even start is not the task's fault
        try:
            return _submit(pool, task).result()
        except BrokenProcessPool:
            pass
    return when_killed(task)


def _start(work: Callable[[Any], Any], num_processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin, initargs=(work,))


def _submit(pool: ProcessPoolExecutor, task: Any) -> "Future[Any]":
    # The standard library's processes would otherwise run the user's script.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        return pool.submit(_do, task)
    except BrokenProcessPool as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed
    finally:
        sys.modules["__main__"] = main


def _begin(work: Callable[[Any], Any]) -> None:
    """Set up a process of the pool."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its processes
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each has one core
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_the_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def _do(task: Any) -> Any:
    assert _work is not None
    return None if task is None else _work(task)


class Progress:
    """How far long work is: a bar on a terminal, a line every few seconds in a log; use it as a context.

    `what` says what is done, such as "Tokenising data.json", to `total` things, whose `unit` is a plural.
    """

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._what, unit=f" {self._unit}", mininterval=0.5, leave=False)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Count `count` more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info("%s: %d of %d %s, %.0f a second.", self._what, self._done, self._total, self._unit, self.rate)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Done in a second, on average."""
        return self._done / max(self.seconds, 1e-6)
