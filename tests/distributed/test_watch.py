"""The watch over other ranks: who failed or died is told to all, in time."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from llava_ft.training.distributed import is_communication_error
from llava_ft.training.watch import RankWatch
from tests.distributed.pool import free_port, run_once

pytestmark = pytest.mark.distributed


def be_watched(port: int, what: str) -> None:
    """Be one of two ranks, the second of which meets with something."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    rank = int(os.environ["RANK"])
    watch = watch_over(port, rank, 2, neighbours=range(2) if what != "silent" else [], interval=0.05, silence=1.0)
    watch.start()
    time.sleep(0.3)
    if rank == 1 and what in ("die", "silent"):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and what == "fail":
        watch.report("the shelf is empty.")
        sys.exit(1)
    if what == "finish":
        if rank == 1:
            watch.finish()
            sys.exit(0)
        time.sleep(1.0)
        watch.finish()
        watch.stop()
        logging.warning("in good order")
        sys.exit(0)
    time.sleep(15)
    logging.warning("not ended")


def watch_over(port: int, rank: int, world_size: int, neighbours: Sequence[int], **seconds: float) -> RankWatch:
    """Make a watch with a connection of its own to the store."""
    timeout = timedelta(seconds=20)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timeout, wait_for_workers=False)
    return RankWatch(store, rank, world_size, neighbours=neighbours, **seconds)


@pytest.fixture
def port() -> Iterator[int]:
    number = free_port()
    store = TCPStore("127.0.0.1", number, is_master=True, wait_for_workers=False)
    yield number
    del store


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("fail", 1, "Rank 0 ends because rank 1 failed: the shelf is empty. Start the same command again"),
        ("die", 1, "is gone without a message: it was killed"),
        ("silent", 1, "has given no sign of life for 1 s"),
        ("finish", 0, "in good order"),
    ],
)
def test_the_other_rank_ends_with_the_cause(port: int, what: str, status: int, message: str):
    first, _ = run_once(2, be_watched, port, what, seconds=60)
    assert first.status == status
    assert message in first.said
    assert what == "finish" or "rank 1" in first.said
    assert "not ended" not in first.said


def test_what_all_ranks_fail_with_is_said_once(port: int):
    watches = [watch_over(port, rank, 3, neighbours=[], interval=0.01) for rank in range(3)]
    assert watches[1].report("the data is missing")
    assert not watches[0].report("the data is missing")
    assert watches[2].report("something else")


def test_a_place_says_where_a_rank_runs(port: int):
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    watch = RankWatch(store, 0, 1, neighbours=[], interval=0.01)
    watch.start()
    deadline = time.monotonic() + 10
    while not store.check(["llava_ft/place/0"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.stop()
    assert json.loads(store.get("llava_ft/place/0"))["pid"] == os.getpid()


def test_errors_whose_cause_is_another_rank():
    assert is_communication_error(RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer"))
    assert is_communication_error(torch.distributed.DistBackendError("NCCL error"))
    assert not is_communication_error(RuntimeError("shapes do not match"))
