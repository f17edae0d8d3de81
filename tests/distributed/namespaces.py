"""Two machines made of one: network namespaces, joined by a virtual cable."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.pool import Ended

INTERFACE = "cable"
"""Name of each machine's end of the cable."""

_PREFIX = "llava-"


class NamespaceError(Exception):
    """They cannot be made here; the message says why."""


@dataclass(frozen=True)
class Machine:
    """One of the two.

    Attributes:
        namespace: Name for `ip netns`.
        address: Its address on the cable.
    """

    namespace: str
    address: str

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return a command that runs another one on this machine."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def kill_all(self) -> None:
        """Kill every process of the machine; launchers start ranks in sessions of their own."""
        pids = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False)
        for pid in pids.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def remove(self) -> None:
        """Switch the machine off, if it was made at all."""
        self.kill_all()
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Make two machines that reach each other and nothing else.

    Raises:
        NamespaceError: They cannot be made here.
    """
    if shutil.which("ip") is None:
        raise NamespaceError("the command ip (iproute2) is not installed")
    if os.geteuid() != 0:
        raise NamespaceError("network namespaces take root")
    _remove_left_behind()
    machines = tuple(Machine(f"{_PREFIX}{os.getpid()}-{number}", f"10.77.0.{number}") for number in (1, 2))
    try:
        for machine in machines:
            _ip("netns", "add", machine.namespace)
        first, second = machines
        peer = ("peer", "name", INTERFACE, "netns", second.namespace)
        _ip("link", "add", INTERFACE, "netns", first.namespace, "type", "veth", *peer)
        for machine in machines:
            _ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", machine.namespace, "link", "set", interface, "up")
        yield first, second
    finally:
        for machine in machines:
            machine.remove()


def run_on_both(
    machines: Sequence[Machine], commands: Sequence[Sequence[str]], environment: dict[str, str], seconds: float
) -> list[Ended]:
    """Run one command on each machine at the same time; both are killed when the time is over.

    Raises:
        TimeoutError: One of them did not end, with what both said.
    """
    processes = [
        subprocess.Popen(
            machine.inside(command),
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine, command in zip(machines, commands, strict=False)
    ]
    end = time.monotonic() + seconds
    ended: list[Ended] = []
    too_long = False
    for process in processes:
        try:
            said = process.communicate(timeout=max(0.1, end - time.monotonic()))[0]
        except subprocess.TimeoutExpired:
            too_long = True
            for machine in machines:
                machine.kill_all()
            said = process.communicate()[0]
        ended.append(Ended(process.returncode, said))
    if too_long:
        raise TimeoutError("\n".join(one.said for one in ended))
    return ended


def _remove_left_behind() -> None:
    """Remove the machines of test processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        name = line.partition(" ")[0]
        owner = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and not Path("/proc", owner).exists():
            Machine(name, "").remove()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
