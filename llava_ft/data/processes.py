"""Work on parts of a data set in several processes that end with the one that started them.

The processes are started anew, not forked: a forked copy of a process that holds a GPU, a process group or the threads
of a tokenizer may hang. Each has a pipe to its parent and nothing else, so when the parent is killed the pipe breaks
and the child ends. The pools of the standard library do not promise that.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from llava_ft.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task, Callable[[int], None]], Result]
"""What a process does: a task, and a function to call with how much more of it is done."""


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
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(num_processes, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = process
        return _deal(tasks, workers, advance)
    finally:
        for connection, process in workers.items():
            connection.close()
            process.terminate()
        for process in workers.values():
            process.join()


def _deal(tasks: Sequence[Task], workers: dict[Connection, BaseProcess], advance: Callable[[int], None]) -> list[Any]:
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


def _killed(process: BaseProcess) -> RunError:
    process.join()
    status = process.exitcode or 0
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return RunError(
        f"A process that prepared data ended {how} before it was done. If memory ran out, use fewer "
        "--preprocessing_num_workers."
    )


def _serve(connection: Connection, work: Callable[[Any, Callable[[int], None]], Any]) -> None:
    """Do tasks until the parent has no more or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent gets it too, and ends its children.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # There is a process for each core.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, task = connection.recv()
            try:
                result = work(task, lambda count, number=number: connection.send(("advance", number, count)))
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                connection.send(("failed", number, error))
                return
            connection.send(("done", number, result))
