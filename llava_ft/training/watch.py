"""Ends a run on all ranks, with a message that names the cause, when one of them fails or dies.

A rank that waits for a dead one in a collective operation waits for half an hour by default, and then says only that
the time is over. So each rank has a thread that looks every second at the store through which the ranks found each
other:

- a rank that fails leaves its message there, and the others end with it;
- a rank that was killed leaves none: ranks on the same machine see that its process is gone, and the first two ranks
  see that its sign of life no longer changes.

The thread ends its process without asking the main thread, which may be stuck in an operation that cannot be
interrupted. Whatever was being written is staged (see `checkpoint/save.py`), so nothing half-written remains in use.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import (
    DistError,
    Store,  # pyright: ignore[reportPrivateImportUsage] - documented, but not in __all__
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

logger = logging.getLogger(__name__)

_FAILED = 1
_NUM_CHECKERS = 2
_LOOKS_PER_SIGN = 5
_CAUSE = "llava_ft/cause"


@dataclass(frozen=True)
class _Place:
    """Where a rank runs. Processes with the same namespace can see each other."""

    host: str
    namespace: str
    pid: int

    @classmethod
    def here(cls) -> "_Place":
        return cls(socket.gethostname(), _pid_namespace(), os.getpid())

    def shares_machine(self, other: "_Place") -> bool:
        return (self.host, self.namespace) == (other.host, other.namespace)


class RankWatch:
    """Watches over the other ranks of a run.

    Args:
        store: Shared by all ranks; nothing else uses this connection to it.
        rank: This rank.
        world_size: Number of ranks.
        neighbours: Ranks that may run on the same machine.
        interval: Seconds between two looks.
        silence: Seconds without a sign of life after which a rank on another machine counts as dead. Long, because
            parsing a large file keeps a process from giving signs.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        neighbours: Sequence[int],
        interval: float = 1.0,
        silence: float = 300.0,
    ):
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._store = store
        self._neighbours = [other for other in neighbours if other != rank]
        self._lock = threading.Lock()
        self._rank = rank
        self._world_size = world_size
        self._interval = interval
        self._silence = silence
        self._ended = threading.Event()
        self._reported = False
        self._places: dict[int, _Place] = {}
        self._last_sign: dict[int, tuple[bytes, float]] = {}

    @classmethod
    def connect(cls, rank: int, world_size: int, local_rank: int) -> "RankWatch":
        """Connect to the store that the launcher or rank 0 keeps, and begin to watch."""
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
        # torchrun sets the one and deepspeed the other; accelerate then writes 1 into the one that is not set.
        local_size = max(int(os.environ.get(name) or 1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
        first = rank - local_rank
        watch = cls(store, rank, world_size, neighbours=range(first, min(first + local_size, world_size)))
        watch.start()
        return watch

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def report(self, message: str) -> bool:
        """Leave the message of a failure for the other ranks, which end because of it.

        Returns:
            Whether the message is new. False if another rank failed with the same one before, as all do when the
            request is wrong, so that it need not be said again.
        """
        cause = json.dumps({"rank": self._rank, "message": message})
        try:
            with self._lock:
                first = self._store.compare_set(_CAUSE, "", cause)
                self._reported = True
        except (DistError, RuntimeError):
            return True
        told = json.loads(first)
        time.sleep(2 * self._interval)  # The store may live in this process: let the others read it.
        return told["rank"] == self._rank or told["message"] != message

    def wait_for_cause(self, seconds: float) -> None:
        """Give the watch time to find out why an operation with other ranks failed; it ends the process if it does."""
        self._ended.wait(seconds)

    def finish(self) -> None:
        """Tell the others that this rank ends in good order."""
        with self._lock:
            self._store.set(f"llava_ft/finished/{self._rank}", "1")

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join(timeout=5 * self._interval)

    def _run(self) -> None:
        count = 0
        try:
            with self._lock:
                self._store.set(self._place_key(self._rank), json.dumps(vars(_Place.here())))
            while not self._ended.wait(self._interval):
                count += 1
                with self._lock:
                    self._store.set(f"llava_ft/sign/{self._rank}", str(count))
                    cause = self._cause() or self._gone_rank()
                    if cause is None and count % _LOOKS_PER_SIGN == 0:
                        cause = self._silent_rank()
                if cause is not None and not self._reported:
                    self._end(cause)
        except (DistError, RuntimeError) as error:
            if not self._ended.is_set() and not self._reported:
                self._end(f"the ranks' store cannot be reached any more, so rank 0 or its launcher is gone ({error})")

    def _end(self, cause: str) -> None:
        logger.error(
            "Rank %d ends because %s. Start the same command again to resume from the newest complete checkpoint.",
            self._rank,
            cause.rstrip("."),
        )
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(_FAILED)

    def _cause(self) -> str | None:
        if not self._store.check([_CAUSE]):
            return None
        cause = json.loads(self._store.get(_CAUSE))
        return None if cause["rank"] == self._rank else f"rank {cause['rank']} failed: {cause['message']}"

    def _silent_rank(self) -> str | None:
        """Find a rank that gives no sign of life. Two ranks look, so that each is looked at."""
        if self._rank >= _NUM_CHECKERS:
            return None
        now = time.monotonic()
        for rank in range(self._world_size):
            key = f"llava_ft/sign/{rank}"
            if not self._store.check([key]):
                continue
            sign = self._store.get(key)
            last = self._last_sign.get(rank)
            if last is None or last[0] != sign:
                self._last_sign[rank] = (sign, now)
            elif now - last[1] > self._silence and not self._has_finished(rank):
                return self._tell(f"rank {rank}{self._where(rank)} has given no sign of life for {self._silence:.0f} s")
        return None

    def _gone_rank(self) -> str | None:
        """Find a rank on this machine whose process is gone."""
        here = _Place.here()
        for rank in self._neighbours:
            if rank not in self._places and self._store.check([self._place_key(rank)]):
                self._places[rank] = _Place(**json.loads(self._store.get(self._place_key(rank))))
            place = self._places.get(rank)
            is_gone = place is not None and place.shares_machine(here) and not _is_alive(place.pid)
            if is_gone and not self._has_finished(rank) and not self._store.check([_CAUSE]):
                return self._tell(
                    f"rank {rank}{self._where(rank)} is gone without a message: it was killed, for example for lack "
                    "of memory, or crashed"
                )
        return None

    def _tell(self, cause: str) -> str:
        """Leave what was found for ranks that cannot see it."""
        self._store.compare_set(_CAUSE, "", json.dumps({"rank": self._rank, "message": cause}))
        return cause

    def _where(self, rank: int) -> str:
        place = self._places.get(rank)
        return f" (process {place.pid} on {place.host})" if place else ""

    def _has_finished(self, rank: int) -> bool:
        return self._store.check([f"llava_ft/finished/{rank}"])

    @staticmethod
    def _place_key(rank: int) -> str:
        return f"llava_ft/place/{rank}"


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "?"


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists()
    return state not in ("Z", "X")
