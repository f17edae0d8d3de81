"""Runs on two machines, started in each of the ways that docs/how-to/multi-node.md names.

The machines are network namespaces. What they train is compared with one process that takes both machines' samples in
one batch.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_ft.checkpoint.manifest import what_is_incomplete
from tests.distributed.matrix import ALONE, Pools
from tests.distributed.namespaces import INTERFACE, Machine, NamespaceError, run_on_both, two_machines
from tests.distributed.pool import Ended
from tests.training.helpers import REPOSITORY, flags

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

SECONDS = 240.0
RUN = {"lora_dropout": "0.0", "group_by_modality_length": None, "max_steps": 3, "save_steps": 2}
TOLERANCE = 1e-6
"""Relative; gradients are added in another order than inside one batch. Measured: 6e-8, the last digit of float32."""

ENTRY = """
import os, sys
from pathlib import Path
from llava_ft.cli import main
from llava_ft.training.artifacts import RunArtifacts

write = RunArtifacts.write_manifest

def write_and_tell(self, directory, step):
    with open(os.environ["WRITERS"], "a") as writers:
        writers.write(f"{os.environ['RANK']} {step}\\n")
    write(self, directory, step)

RunArtifacts.write_manifest = write_and_tell
sys.exit(main(["train", *sys.argv[1:]]))
"""
"""`train.py` that leaves a line for each directory a rank completes."""

PDSH = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2 :])
namespaces = dict({namespaces})
started = [
    subprocess.Popen(
        ["ip", "netns", "exec", namespaces[host], "bash", "-c", command.replace("%n", str(number))],
        env={{"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}},
    )
    for number, host in enumerate(hosts)
]
sys.exit(max(process.wait() for process in started))
"""
"""Takes the place of pdsh: enters a namespace instead of logging in, and like a login knows no variables."""


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    try:
        with two_machines() as pair:
            yield pair
    except NamespaceError as reason:
        pytest.skip(f"two machines cannot be made here: {reason}")


@pytest.fixture
def alone(pools: Pools) -> list[float]:
    """Losses of one process with batches of two."""
    batch = {"data_path": "data/mix.json", "per_device_train_batch_size": 2, "gradient_accumulation_steps": None}
    return list(pools.straight("lora", ALONE, "float32", **RUN, **batch).result.losses.values())


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(ENTRY)
    return path


def losses(log: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def launch(
    machines: tuple[Machine, Machine], commands: list[list[str]], tmp_path: Path, **environment: str
) -> list[Ended]:
    """Start a run on both machines; once more if it hangs, which starts on a CPU do once in some hundred times."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WRITERS": str(tmp_path / "writers"),
    }
    for_logins = tmp_path / "deepspeed_env"
    for_logins.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    variables |= {"DS_ENV_FILE": str(for_logins)}
    try:
        return run_on_both(machines, commands, variables | environment, SECONDS)
    except TimeoutError:
        (tmp_path / "writers").unlink(missing_ok=True)
        return run_on_both(machines, commands, variables | environment, SECONDS)


def check(output_dir: Path, ended: list[Ended], alone: list[float]) -> None:
    """Both machines ended well, the numbers are those of one process, and rank 0 alone wrote."""
    assert [one.status for one in ended] == [0] * len(ended), "\n".join(one.said for one in ended)
    state = json.loads((output_dir / "trainer_state.json").read_text())
    assert losses(state["log_history"]) == pytest.approx(alone, rel=TOLERANCE)
    assert (output_dir.parent / "writers").read_text().splitlines() == ["0 2", "0 3", "0 3"]
    assert sorted(path.name for path in output_dir.glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-3"]
    for directory in (output_dir, output_dir / "checkpoint-2", output_dir / "checkpoint-3"):
        assert what_is_incomplete(directory) is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (output_dir / "checkpoint-3").iterdir()}


def test_torchrun_with_a_rendezvous(machines, alone, entry: Path, tmp_path: Path):
    argv = flags(tmp_path / "out", **RUN, per_device_train_batch_size=1, report_to="tensorboard")
    commands = [
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"{machines[0].address}:29400"),
            *("--rdzv-conf", f"is_host={is_host}", "--local-addr", machine.address, str(entry), *argv),
        ]
        for machine, is_host in zip(machines, ("1", "0"), strict=True)
    ]
    ended = launch(machines, commands, tmp_path)
    check(tmp_path / "out", ended, alone)
    assert len(list((tmp_path / "out/runs").rglob("events*"))) == 1
    speaking = [one for one in ended if "step 1/3" in one.said]
    assert len(speaking) == 1
    assert "Done. The result is in" in speaking[0].said


def test_torchrun_with_numbered_nodes_and_deepspeed(machines, alone, entry: Path, tmp_path: Path):
    argv = flags(tmp_path / "out", **RUN, per_device_train_batch_size=1, deepspeed="zero2")
    commands = [
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
            *("--node-rank", str(number), "--master-addr", machines[0].address, "--master-port", "29500"),
            *(str(entry), *argv),
        ]
        for number in (0, 1)
    ]
    check(tmp_path / "out", launch(machines, commands, tmp_path), alone)


def test_deepspeed_started_on_one_machine(machines, alone, entry: Path, tmp_path: Path):
    """The hostfile's own way, with everything but the login."""
    tools = tmp_path / "bin"
    tools.mkdir()
    namespaces = {machine.address: machine.namespace for machine in machines}
    (tools / "pdsh").write_text(PDSH.format(python=sys.executable, namespaces=namespaces))
    (tools / "pdsh").chmod(0o755)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{machine.address} slots=1\n" for machine in machines))
    argv = flags(tmp_path / "out", **RUN, per_device_train_batch_size=1, deepspeed="zero2")
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh_check"),
        *("--master_addr", machines[0].address, "--master_port", "29501", str(entry), *argv),
    ]
    path = f"{tools}:{os.environ['PATH']}"
    check(tmp_path / "out", launch(machines, [command], tmp_path, PATH=path), alone)
