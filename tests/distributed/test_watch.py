"""The watch over other ranks: who failed or died is told to all, in time."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

from llava_ft.training.distributed import is_communication_error
from llava_ft.training.watch import RankWatch

RANK = """
import os, sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from llava_ft.training.watch import RankWatch
import logging
logging.basicConfig(format="%(message)s")
rank, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20), wait_for_workers=False)
watch = RankWatch(store, rank, 2, neighbours=range(2) if what != "silent" else [], interval=0.05, silence=1.0)
watch.start()
time.sleep(0.3)
if rank == 1 and what in ("die", "silent"):
    os.kill(os.getpid(), 9)
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
    print("in good order")
    sys.exit(0)
time.sleep(15)
print("not ended")
"""


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", number, is_master=True, wait_for_workers=False)
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
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(port), what], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    try:
        output = ranks[0].communicate(timeout=60)[0].decode()
        assert ranks[0].returncode == status
        assert message in output
        assert what == "finish" or "rank 1" in output
        assert "not ended" not in output
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_what_all_ranks_fail_with_is_said_once(port: int):
    watches = []
    for rank in range(3):
        store = torch.distributed.TCPStore(
            "127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20), wait_for_workers=False
        )
        watches.append(RankWatch(store, rank, 3, neighbours=[], interval=0.01))
    assert watches[1].report("the data is missing")
    assert not watches[0].report("the data is missing")
    assert watches[2].report("something else")


def test_a_place_says_where_a_rank_runs(port: int):
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
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
