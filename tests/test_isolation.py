"""What a test leaves in its process is seen, named and put back."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import isolation

REPOSITORY = Path(__file__).parents[1]
MAY_END = threading.Event()
LEAKS: dict[str, Callable[[], object]] = {
    "working directory": lambda: os.chdir("/"),
    "sys.path": lambda: sys.path.append("/somewhere"),
    "torch threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients": lambda: torch.set_grad_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "threads": lambda: threading.Thread(target=MAY_END.wait).start(),
    "processes": lambda: subprocess.Popen(["sleep", "600"]),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_named_and_put_back(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(isolation, "_SECONDS_TO_END", 0.1)
    before = isolation._state()
    assert isolation._left_behind(before) == []
    MAY_END.clear()
    leak = LEAKS[name]()
    try:
        (line,) = isolation._left_behind(before)
    finally:
        MAY_END.set()
        if isinstance(leak, subprocess.Popen):
            leak.kill()
            leak.wait()
        isolation._put_back(before)
    assert line.startswith(f"{name}: ")
    assert isolation._left_behind(before) == []


def test_a_test_that_leaves_something_fails_and_the_next_one_does_not(tmp_path: Path):
    (tmp_path / "test_two.py").write_text(
        "import os\n"
        "def test_first():\n    os.environ['LEFT'] = '1'\n    os.chdir('/')\n"
        "def test_second():\n    assert 'LEFT' not in os.environ\n    assert os.getcwd() != '/'\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.isolation", "-p", "no:randomly", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert "2 passed, 1 error" in done.stdout, done.stdout
    assert "This test leaves behind:\nworking directory: /, was " in done.stdout
