"""One of two ranks is killed or fails, under real launchers: the run ends soon, names it, and can be resumed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_ft.checkpoint.resume import newest_complete_checkpoint
from tests.conftest import RECORDINGS
from tests.training.helpers import REPOSITORY, flags

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "0"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
}
SECONDS = 180


def launch(launcher: str, argv: list[str], fault: str | None = None) -> tuple[int, str, float]:
    """Start two ranks; returns status, output and seconds. Everything they started is gone afterwards."""
    script = "tests/distributed/faulty_train.py" if fault else "train.py"
    prefix = [part if part != "0" else str(free_port()) for part in LAUNCHERS[launcher]]
    started = time.monotonic()
    process = subprocess.Popen(
        [*prefix, str(REPOSITORY / script), *argv],
        cwd=RECORDINGS,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "FAULT": fault or ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output, time.monotonic() - started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("launcher", "stage", "fault", "message"),
    [
        ("deepspeed", "zero2", "kill_training:1:5", "Rank 0 ends because rank 1 "),
        ("torchrun", "zero3", "kill_saving:1:6", "Rank 0 ends because rank 1 "),
        ("torchrun", None, "nan:1:5", "[rank 1] The loss is nan in step 5"),
        ("deepspeed", "zero3", "disk:0:6", "Rank 1 ends because rank 0 failed: "),
    ],
)
def test_the_run_ends_and_names_the_rank(tmp_path: Path, launcher: str, stage: str | None, fault: str, message: str):
    argv = flags(tmp_path, deepspeed=stage)
    status, output, seconds = launch(launcher, argv, fault)
    assert status != 0
    assert message in output
    assert seconds < SECONDS / 2
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert list(Path("/dev/shm").glob("deepspeed*")) == []


def test_killed_while_resuming_nothing_is_lost(tmp_path: Path):
    argv = flags(tmp_path, deepspeed="zero2")
    assert launch("deepspeed", argv, "kill_training:0:5")[0] != 0
    status, output, _ = launch("deepspeed", argv, "kill_resuming:1:0")
    assert status != 0
    assert "Rank 0 ends because rank 1 " in output
    status, output, _ = launch("deepspeed", argv)
    assert status == 0, output
    assert f"Resuming from {tmp_path}/checkpoint-3." in output
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_what_all_ranks_find_wrong_is_said_once(tmp_path: Path):
    status, output, _ = launch("torchrun", flags(tmp_path, image_folder="nowhere"))
    assert status != 0
    assert output.count("nowhere") >= 1
    assert len([line for line in output.splitlines() if "image_folder" in line and "nowhere" in line]) <= 1
