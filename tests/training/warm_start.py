"""`train.py` in processes of their own that begin at once.

A process takes several seconds to import torch and transformers, and many tests need one for a run that takes less. So
one process imports them, and each start is a fork of it: with streams, environment, folder, signals and end of its own,
as if it had been started anew.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_LARGEST_REQUEST = 2**18
_IMPORTED = ("torch._dynamo", "transformers.trainer", "datasets", "peft", "llava_ft.training.run")
"""What every run takes long to import."""


class Program:
    """A run of `train.py`: what tests use of `subprocess.Popen`, with texts.

    Args:
        argv: Its command line.
        cwd: The folder it runs in.
        environment: All its variables.
    """

    def __init__(self, argv: Sequence[str], cwd: Path, environment: Mapping[str, str]):
        out, err, status = os.pipe(), os.pipe(), os.pipe()
        request = json.dumps({"argv": list(argv), "cwd": str(cwd), "environment": dict(environment)}).encode()
        socket.send_fds(_server(), [request], [out[1], err[1], status[1]])
        for _, end in (out, err, status):
            os.close(end)
        self.stdout, self.stderr, self._status = (os.fdopen(start) for start, _ in (out, err, status))
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return how it ended, or None if it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float) -> int:
        """Wait for its end."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired("train.py", timeout)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; return the rest of standard output and of standard error."""
        with ThreadPoolExecutor(2) as threads:
            texts = [threads.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return texts[0].result(), texts[1].result()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode


_SERVERS: list[socket.socket] = []


def _server() -> socket.socket:
    """Return the connection to the process that has imported everything; it ends with this one."""
    if not _SERVERS:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, "-m", "tests.training.warm_start", str(theirs.fileno())],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        atexit.register(ours.close)
        _SERVERS.append(ours)
    return _SERVERS[0]


def _serve(server: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns it in the process that is to answer it, and None at the end in this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever waits for a program has ended with it
    while True:
        request, files, _, _ = socket.recv_fds(server, _LARGEST_REQUEST, 3)
        if not request:
            return None
        if os.fork() == 0:  # waits for the program, which it alone can
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            out, err, status = files
            program = os.fork()
            if program == 0:
                server.close()
                os.close(status)
                for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
                    os.dup2(file, number)
                    os.close(file)
                return json.loads(request)
            os.close(out)
            os.close(err)
            os.write(status, f"{program}\n".encode())
            _, ended = os.waitpid(program, 0)
            os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
            os._exit(0)
        for file in files:
            os.close(file)


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["cwd"])
        sys.argv = [str(REPOSITORY / "train.py"), *asked["argv"]]
        runpy.run_path(sys.argv[0], run_name="__main__")
