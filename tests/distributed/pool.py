"""Ranks that stay: processes in which many small runs are made one after another.

Starting two ranks takes ten seconds on a small machine, and a run on the tiny recordings a fraction of one. A pool
starts its ranks once and gives them tasks; a task that fails or takes too long costs the pool its processes, which are
killed and replaced before the next task.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SECONDS_PER_TASK = 120.0


class RankError(AssertionError):
    """A rank raised, died or did not answer."""


class Pool:
    """Some ranks on this machine's CPU that make runs together.

    Args:
        world_size: Number of ranks.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, task: Callable[..., Any], *args: Any, timeout: float = SECONDS_PER_TASK) -> list[Any]:
        """Call a function, which has to be importable, on all ranks; returns what each returned, by rank."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((task, args))
        answers = []
        for rank, connection in enumerate(self._connections):
            answers.append(self._answer(rank, connection, timeout))
        failures = [f"rank {rank}:\n{answer[1]}" for rank, answer in enumerate(answers) if not answer[0]]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [answer[1] for answer in answers]

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join(10)
        self._processes, self._connections = [], []

    def _answer(self, rank: int, connection: Connection, timeout: float) -> tuple[bool, Any]:
        try:
            if connection.poll(timeout):
                return connection.recv()
            return False, f"no answer within {timeout:.0f} s"
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(10)
            return False, f"died with exit code {self._processes[rank].exitcode}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    while True:
        try:
            task, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, task(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
