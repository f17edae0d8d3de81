"""Ranks on this machine's CPU: some that stay, in which many small runs are made one after another, and some for once.

Starting a rank takes ten seconds of a core, nearly all of it for imports, and a run on the tiny recordings about one.
So a server imports once what runs import, and ranks are forked from it. A `Pool` keeps its ranks between tasks; a task
that fails or takes too long costs it its processes, which are killed and replaced before the next task. What is to end
as a program ends - killed, with a status, with a message - runs in ranks of its own: `run_once`.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.conftest import RECORDINGS

SECONDS_PER_TASK = 120.0
IMPORTED = (
    "bitsandbytes",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "peft",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "llava_ft.args",
    "llava_ft.cli",
    "llava_ft.convert.merge",
    "llava_ft.training.run",
    "torch._dynamo",
    "torch.distributed.fsdp",
)
"""What a run imports; a name that does not exist is passed over, and imported by every rank anew."""


class RankError(AssertionError):
    """A rank raised, died or did not answer."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, negative for a signal, and what it said on both outputs."""

    status: int
    said: str


class Pool:
    """Some ranks that make runs together.

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
        for rank in self._connections:
            rank.send((task, args))
        answers = []
        for rank, its_connection in enumerate(self._connections):
            answers.append(self._answer(rank, its_connection, timeout))
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

    def _answer(self, rank: int, its_connection: Connection, timeout: float) -> tuple[bool, Any]:
        try:
            if its_connection.poll(timeout):
                return its_connection.recv()
            return False, f"no answer within {timeout:.0f} s"
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(10)
            return False, f"died with exit code {self._processes[rank].exitcode}"

    def _start(self) -> None:
        context, environments = _server(), _environments(self.world_size, machines=1)
        for environment in environments:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


def run_once(
    world_size: int, task: Callable[..., Any], *args: Any, machines: int = 1, seconds: float = SECONDS_PER_TASK
) -> list[Ended]:
    """Call a function, which has to be importable, on ranks of its own, and wait until all of them have ended.

    Args:
        world_size: Number of ranks.
        task: The function; what it passes to `sys.exit` is the rank's status.
        args: Its arguments.
        machines: Over how many machines the ranks believe to be spread.
        seconds: Time after which those that still run are killed.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(world_size)]
        processes = [
            context.Process(target=_run_task, args=(output, environment, task, args), daemon=True)
            for output, environment in zip(outputs, _environments(world_size, machines), strict=True)
        ]
        end = time.monotonic() + seconds
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join(10)
        return [
            Ended(process.exitcode or 0, output.read_text() if output.exists() else "")
            for process, output in zip(processes, outputs, strict=True)
        ]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _server() -> ForkServerContext:
    """Start the process that ranks are forked from, if it does not run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    # torch reads the number of threads when it is imported; the package under test is the one of this repository.
    repository = RECORDINGS.parent.parent
    path = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=path), contextlib.chdir(repository):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _environments(world_size: int, machines: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    port, per_machine = free_port(), world_size // machines
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_machine),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(per_machine),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(world_size)
    ]


def _become_rank(environment: dict[str, str]) -> None:
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    # A run calls the garbage collector several times; it need not go through all that was imported.
    gc.freeze()
    # Ranks do not outlive what started them, even if they wait for each other.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _serve(tasks: Connection, environment: dict[str, str]) -> None:
    _become_rank(environment)
    before = dict(os.environ)
    while True:
        try:
            task, args = tasks.recv()
        except EOFError:
            return
        try:
            answer = (True, task(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        # Where a run has used DeepSpeed, accelerate leaves a variable behind with which the next one would use it too.
        os.environ.clear()
        os.environ.update(before)
        tasks.send(answer)


def _run_task(output: Path, environment: dict[str, str], task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _become_rank(environment)
    task(*args)
