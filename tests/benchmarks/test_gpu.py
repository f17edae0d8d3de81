"""The call that measures everything on a GPU: budgets, failures, pages; and that its parts start, on a CPU."""

import argparse
import json
import sys
import time
from pathlib import Path

import gpu
import pytest

WHERE = {"commit": "0" * 40, "gpu": "NVIDIA H200"}


def options(output: Path | None, seconds: float = 1000.0) -> argparse.Namespace:
    return argparse.Namespace(output=output, budget_seconds=seconds, dry_run=False)


def part(name: str, code: str, weight: float = 1.0) -> gpu.Part:
    """A part that runs a line of Python; FOLDER in it is that of its results."""
    return gpu.Part(
        name, name.title(), weight, lambda call: [sys.executable, "-c", code.replace("FOLDER", repr(str(call.output)))]
    )


WRITES = (
    "import pathlib; folder = pathlib.Path(FOLDER); folder.mkdir(); "
    "(folder / 'a.md').write_text('# Heading\\n\\n| 1 |\\n'); (folder / 'a.json').write_text('[1, 2]')"
)


def test_a_part_that_fails_or_hangs_does_not_lose_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_SECONDS", 1.0)
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(1000)'])"
    parts = [part("fails", "raise SystemExit('boom')", 50), part("hangs", hangs), part("writes", WRITES, 49)]
    begin = time.monotonic()
    gpu.run_parts(parts, options(tmp_path, 100.0), WHERE)
    assert time.monotonic() - begin < 50
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["fails"]["status"] == "failed (status 1)"
    assert "boom" in results["fails"]["said"]
    assert results["hangs"]["status"].startswith("not done within")
    assert results["writes"]["status"] == "done"
    assert results["writes"]["data"] == {"a.json": [1, 2]}
    page = (tmp_path / "gpu.md").read_text()
    assert "| attention | Attention kernels against each other | not yet measured |" in page
    assert "Heading\n\n| 1 |" in page
    assert "boom" in page
    assert "NVIDIA H200" in page


def test_results_of_an_earlier_call_stay_unless_the_part_runs_again(tmp_path):
    gpu.run_parts([part("one", WRITES), part("two", WRITES)], options(tmp_path), WHERE)
    again = part("one", "raise SystemExit(3)")
    gpu.run_parts([again], options(tmp_path), WHERE | {"gpu": "another"})
    results = gpu.read_results(tmp_path)
    assert {name: result["status"] for name, result in results.items()} == {"one": "failed (status 3)", "two": "done"}
    assert [results[name]["where"]["gpu"] for name in ("one", "two")] == ["another", "NVIDIA H200"]
    gpu.run_parts([part("two", WRITES), part("three", WRITES)], options(tmp_path, 1.0), WHERE)
    statuses = {name: result["status"] for name, result in gpu.read_results(tmp_path).items()}
    assert statuses == {"one": "failed (status 3)", "two": "done", "three": "not run: no time was left"}


def test_what_a_part_leaves_of_the_budget_goes_to_those_behind_it(tmp_path):
    given = []

    def command(call: gpu.Call) -> list[str]:
        given.append(call.seconds)
        return [sys.executable, "-c", ""]

    gpu.run_parts([gpu.Part("a", "", 1, command), gpu.Part("b", "", 3, command)], options(None, 400.0), WHERE)
    assert given[0] == pytest.approx(100, abs=1)
    assert 300 < given[1] < 400


def test_requests_that_make_no_sense(capsys, tmp_path):
    for argv, said in (
        (["--output", str(tmp_path), "--parts", "nothing"], "there are attention, tests"),
        ([], "--output is missing"),
        (["--dry-run", "--output", str(tmp_path)], "a dry run has no results"),
    ):
        with pytest.raises(SystemExit, match="2"):
            gpu.main(argv)
        assert said in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


SEEN_ELSEWHERE = {"step_7b", "step_qlora", "step_full", "step_13b", "tests"}
"""Steps that `test_step.py` makes with the smallest model; and a dry run of the tests only collects this suite."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [part.name for part in gpu.PARTS if part.name not in SEEN_ELSEWHERE])
def test_every_part_starts_on_a_cpu(name):
    parts = [part for part in gpu.PARTS if part.name == name]
    assert {part.name for part in gpu.PARTS} > SEEN_ELSEWHERE
    wish = argparse.Namespace(output=None, budget_seconds=500.0, dry_run=True)
    result = gpu.run_parts(parts, wish, WHERE)[name]
    assert result["status"] == "done", result["said"]
