"""One of two ranks is killed or fails: the run ends soon, names it, and can be resumed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llava_ft.checkpoint.resume import newest_complete_checkpoint
from tests.conftest import RECORDINGS
from tests.distributed import faulty_train
from tests.distributed.matrix import Pools, Setting
from tests.distributed.pool import free_port, run_once
from tests.training.helpers import REPOSITORY, flags

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

BIN = Path(sys.executable).parent
SECONDS = 180


def by_launcher(command: list[str], argv: list[str], fault: str) -> tuple[list[int], str]:
    """Start two ranks as a user does; returns statuses and output. Everything they started is gone afterwards."""
    process = subprocess.Popen(
        [*command, str(REPOSITORY / "tests/distributed/faulty_train.py"), *argv],
        cwd=RECORDINGS,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
        return [process.returncode], output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def by_deepspeed(argv: list[str], fault: str) -> tuple[list[int], str]:
    return by_launcher([str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())], argv, fault)


def by_torchrun(argv: list[str], fault: str) -> tuple[list[int], str]:
    return by_launcher([str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"], argv, fault)


def directly(argv: list[str], fault: str | None = None) -> tuple[list[int], str]:
    """Start two ranks that no launcher watches over."""
    ended = run_once(2, faulty_train.train, argv, fault, seconds=SECONDS)
    return [one.status for one in ended], "".join(one.said for one in ended)


@pytest.mark.parametrize(
    ("launch", "stage", "fault", "message"),
    [
        (by_deepspeed, "zero2", "kill_training:1:5", "Rank 0 ends because rank 1 "),
        (by_torchrun, "zero3", "nan:1:5", "[rank 1] The loss is nan in step 5"),
        (directly, None, "kill_training:0:5", "Rank 1 ends because "),
        (directly, "zero3", "kill_saving:1:6", "Rank 0 ends because rank 1 "),
        (directly, "zero3", "disk:0:6", "Rank 1 ends because rank 0 failed: "),
    ],
)
def test_the_run_ends_and_names_the_rank(tmp_path: Path, launch: Callable, stage: str | None, fault: str, message: str):
    started = time.monotonic()
    statuses, output = launch(flags(tmp_path, deepspeed=stage), fault)
    assert 0 not in statuses
    assert message in output
    assert time.monotonic() - started < SECONDS / 2
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert list(Path("/dev/shm").glob("deepspeed*")) == []


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path: Path):
    argv = flags(tmp_path / "out", max_steps=100_000, save_steps=100_000, deepspeed="zero2.json")
    command = [
        str(BIN / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        str(REPOSITORY / "train.py"),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *argv], cwd=RECORDINGS, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    below: list[psutil.Process] = []
    try:
        end = time.monotonic() + SECONDS
        while "step 2/" not in (tmp_path / "log").read_text() and time.monotonic() < end:
            time.sleep(0.5)
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive
    finally:
        for one in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    log_text = (tmp_path / "log").read_text()
    assert "The launcher is gone" in log_text
    assert "is complete; start the same command again to resume" in log_text
    assert newest_complete_checkpoint(tmp_path / "out") is not None


def test_killed_while_resuming_nothing_is_lost(pools: Pools, tmp_path: Path):
    setting = Setting("zero2", 2)
    pools.straight("lora", setting, "float32").copy(tmp_path)
    argv = pools.command(tmp_path, "lora", setting, "float32")
    statuses, output = directly(argv, "kill_resuming:1:0")
    assert 0 not in statuses
    assert "Rank 0 ends because rank 1 " in output
    statuses, output = directly(argv)
    assert statuses == [0, 0], output
    assert f"Resuming from {tmp_path}/checkpoint-3." in output
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_what_all_ranks_find_wrong_is_said_once(tmp_path: Path):
    statuses, output = directly(flags(tmp_path, image_folder="nowhere"))
    assert statuses == [2, 2]
    assert len([line for line in output.splitlines() if "image_folder" in line and "nowhere" in line]) == 1
