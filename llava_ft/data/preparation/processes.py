"""Work on parts of a data set in several processes that end with the one that started them.

The processes are started anew, not forked: a forked copy of a process that holds a GPU, a process group or the threads
of a tokenizer may hang. Each has a pipe to its parent and nothing else, so when the parent is killed the pipe breaks
and the child ends; and it runs nothing of the script that the parent runs. The pools of the standard library promise
neither.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Final, TypeVar, cast

from llava_ft.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, Callable[[int], None]], Result]
"""What a process does: a task, and a function to call with how much more of it is done."""

_CODE: Final = "import sys; from llava_ft.data.preparation.processes import serve; serve(int(sys.argv[1]))"


def num_cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    work: Work[Task, Result], tasks: Sequence[Task], num_processes: int, advance: Callable[[int], None]
) -> list[Result]:
    """Do all tasks, in this process if `num_processes` is 1.

    Args:
        work: What to do; it and the tasks are pickled.
        tasks: Each goes to the next process that is free.
        num_processes: How many may work at once.
        advance: Is told how much more is done.

    Returns:
        The results in the order of the tasks.

    Raises:
        RunError: A process was killed.
        Exception: Whatever `work` raised first.
    """
    if num_processes <= 1 or len(tasks) <= 1:
        return [work(task, advance) for task in tasks]
    workers: dict[Connection, subprocess.Popen[bytes]] = {}
    try:
        for _ in range(min(num_processes, len(tasks))):
            ours, theirs = multiprocessing.Pipe()
            with theirs:
                workers[ours] = _start(theirs)
            ours.send(work)
        return _deal(tasks, workers, advance)
    finally:
        for connection, process in workers.items():
            connection.close()
            process.terminate()
        for process in workers.values():
            process.wait()


def _start(connection: Connection) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"},
    )


def _deal(
    tasks: Sequence[Task], workers: dict[Connection, subprocess.Popen[bytes]], advance: Callable[[int], None]
) -> list[Any]:
    results: dict[int, Any] = {}
    remaining = deque(enumerate(tasks))
    for connection in workers:
        if remaining:
            connection.send(remaining.popleft())
    while len(results) < len(tasks):
        for connection in cast("list[Connection]", wait(list(workers))):
            try:
                kind, number, value = connection.recv()
            except (EOFError, ConnectionResetError):
                raise _killed(workers[connection]) from None
            if kind == "advance":
                advance(value)
            elif kind == "failed":
                raise value
            else:
                results[number] = value
                if remaining:
                    connection.send(remaining.popleft())
    return [results[number] for number in range(len(tasks))]


def _killed(process: subprocess.Popen[bytes]) -> RunError:
    status = process.wait()
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return RunError(
        f"A process that prepared data ended {how} before it was done. If memory ran out, use fewer "
        "--preprocessing_num_workers."
    )


def serve(file_descriptor: int) -> None:
    """Do tasks in a process of its own, until the parent has no more or is gone.

    Args:
        file_descriptor: The pipe to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent gets it too, and ends its children.
    connection = Connection(file_descriptor)

    def advance(count: int) -> None:
        connection.send(("advance", 0, count))

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        work = connection.recv()
        while True:
            number, task = connection.recv()
            try:
                result = work(task, advance)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                connection.send(("failed", number, error))
                return
            connection.send(("done", number, result))
