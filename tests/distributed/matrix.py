"""Method x ZeRO stage x ranks x dtype, and resuming from one on another: writes `docs/internals/zero-matrix.md`.

    python -m tests.distributed.matrix --write docs/internals/zero-matrix.md

Every run is one of six steps with 4 samples a step, on the recorded tiny checkpoints and CPU ranks. A run is compared
with the same run in one process without DeepSpeed; a resumed run with the uninterrupted one it continues.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.conftest import RECORDINGS
from tests.distributed import tasks
from tests.distributed.pool import Pool
from tests.training.helpers import flags

STAGES = ("none", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
METHODS = {
    "lora": ("lora", {"lora_dropout": 0.0, "group_by_modality_length": False}),
    "full": ("full", {}),
    "projector": ("projector", {}),
    "lora + im_start_end": ("lora", {"lora_dropout": 0.0, "mm_use_im_start_end": True}),
}
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest difference of a step's loss that counts as agreement.

float32: ranks and stages differ only in the order in which gradients are summed; 1e-6 is usual. bfloat16 keeps 8 bits
of a number, so a loss near 8 is known to about 0.03, and gradients are summed among ranks in bfloat16.
"""


@dataclass(frozen=True)
class Setting:
    """Where a run is made."""

    stage: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.stage} x {self.ranks}"


CORRECT = [Setting(stage, ranks) for stage in STAGES for ranks in (1, 2)]
FROM = [Setting("none", 1), Setting("none", 2), Setting("zero1", 2), Setting("zero2", 2), Setting("zero3", 2)]
TO = [
    Setting("none", 1),
    Setting("none", 2),
    Setting("zero1", 2),
    Setting("zero2", 1),
    Setting("zero2", 2),
    Setting("zero2_offload", 2),
    Setting("zero3", 1),
    Setting("zero3", 2),
    Setting("zero2", 4),
    Setting("zero3", 4),
]
SAMPLES_PER_STEP = 4
ALONE = Setting("none", 1)
SHORT = {"max_steps": 3, "save_strategy": "no"}
"""For runs that say all they have to in three steps."""


class Pools:
    """A pool for each number of ranks, and the records they train on: 24, so that an epoch is 6 whole steps."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._straight: dict[str, Straight] = {}
        for name in ("mix.json", "pretrain.json"):
            recorded = json.loads((RECORDINGS / "data" / name).read_text())
            (Path(self._folder.name) / name).write_text(json.dumps((recorded * 3)[: 6 * SAMPLES_PER_STEP]))

    def command(self, output_dir: Path, method: str, setting: Setting, dtype: str, **changes: object) -> list[str]:
        """Return the command line of a run of six steps with the same samples in each step whatever the ranks."""
        name, own = METHODS[method]
        given: dict[str, object] = {
            "data_path": Path(self._folder.name) / ("pretrain.json" if name == "projector" else "mix.json"),
            **own,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": SAMPLES_PER_STEP // setting.ranks,
            "bf16": dtype == "bfloat16",
            "deepspeed": None if setting.stage == "none" else setting.stage,
            **changes,
        }
        return flags(output_dir, name, **given)

    def train(self, output_dir: Path, method: str, setting: Setting, dtype: str, **changes: object) -> tasks.Result:
        """Make a run and return what rank 0 saw."""
        argv = self.command(output_dir, method, setting, dtype, **changes)
        return self.of(setting.ranks).run(tasks.train, argv)[0]

    def straight(self, method: str, setting: Setting, dtype: str, **changes: object) -> "Straight":
        """Make a run, or return the one that was made before: for comparison and to resume copies of."""
        key = repr((method, setting, dtype, sorted(changes.items())))
        if key not in self._straight:
            output_dir = Path(tempfile.mkdtemp(dir=self._folder.name))
            self._straight[key] = Straight(output_dir, self.train(output_dir, method, setting, dtype, **changes))
        return self._straight[key]

    def resume(
        self, straight: "Straight", output_dir: Path, method: str, target: Setting, dtype: str, **changes: object
    ) -> tasks.Result:
        """Continue a copy of a run from its third step."""
        straight.copy(output_dir)
        result = self.train(output_dir, method, target, dtype, **changes)
        assert result.resumed == "checkpoint-3"
        return result

    def of(self, ranks: int) -> Pool:
        """Return the pool with a number of ranks."""
        return self._pools.setdefault(ranks, Pool(ranks))

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()
        self._folder.cleanup()


@dataclass(frozen=True)
class Straight:
    """A run of six steps that nothing interrupted. Its folder is only read.

    Attributes:
        path: Its output directory.
        result: What rank 0 saw.
    """

    path: Path
    result: tasks.Result

    def copy(self, output_dir: Path) -> None:
        """Copy the run as it was after its third step."""
        shutil.copytree(self.path, output_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-6"))


def difference(expected: tasks.Result, got: tasks.Result, first_step: int = 1) -> float:
    """Largest difference of a step's loss."""
    steps = [step for step in expected.losses if step >= first_step]
    return max(abs(expected.losses[step] - got.losses[step]) for step in steps)


def cell(compute: Callable[[], float], tolerance: float) -> str:
    """Return a table's cell: the difference, marked if it is too large or the run failed."""
    try:
        value = compute()
    except AssertionError as error:
        print(error, file=sys.stderr)
        return "**failed**"
    text = "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")
    return text if value <= tolerance else f"**{text}**"


def correctness(pools: Pools, folder: Path) -> Iterator[str]:
    """Rows of the first table."""
    yield "| method | dtype | " + " | ".join(map(str, CORRECT)) + " |"
    yield "| --- " * (len(CORRECT) + 2) + "|"
    for method in METHODS:
        for dtype, tolerance in TOLERANCES.items():
            reference = pools.train(folder / f"reference-{method}-{dtype}", method, ALONE, dtype, save_strategy="no")
            cells = []
            for setting in CORRECT:

                def compute(setting: Setting = setting, reference: tasks.Result = reference) -> float:
                    shutil.rmtree(folder / "run", ignore_errors=True)
                    result = pools.train(folder / "run", method, setting, dtype, save_strategy="no")  # noqa: B023
                    return difference(reference, result)

                cells.append(cell(compute, tolerance))
            yield f"| {method} | {dtype} | " + " | ".join(cells) + " |"


def resuming(pools: Pools, folder: Path, method: str, dtype: str) -> Iterator[str]:
    """Rows of a table of resumed runs."""
    yield "| from \\ to | " + " | ".join(map(str, TO)) + " |"
    yield "| --- " * (len(TO) + 1) + "|"
    for origin in FROM:
        straight = pools.straight(method, origin, dtype)
        cells = []
        for target in TO:

            def compute(target: Setting = target, straight: Straight = straight) -> float:
                shutil.rmtree(folder / "resumed", ignore_errors=True)
                resumed = pools.resume(straight, folder / "resumed", method, target, dtype, save_strategy="no")
                return difference(straight.result, resumed, first_step=4)

            cells.append(cell(compute, TOLERANCES[dtype]))
        yield f"| {origin} | " + " | ".join(cells) + " |"


def report(pools: Pools, folder: Path) -> Iterator[str]:
    """Lines of the page."""
    yield from INTRODUCTION.strip().splitlines()
    yield "\nVersions: " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + f"; {os.cpu_count()} CPU cores."
    yield "\n## Losses\n"
    yield from correctness(pools, folder)
    for method, dtype in (("lora", "float32"), ("full", "float32"), ("projector", "float32"), ("lora", "bfloat16")):
        yield f"\n## Resuming: {method}, {dtype}\n"
        yield from resuming(pools, folder, method, dtype)


PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
INTRODUCTION = """
# What was run: ZeRO stage, ranks, dtype and method

Made by `python -m tests.distributed.matrix --write docs/internals/zero-matrix.md` on CPU ranks (gloo) with the tiny
models of the tests: six steps of 4 samples, images and text mixed. Numbers are the largest difference of a step's loss,
near 8 at the start. A difference above the tolerance would be bold: 1e-4 for float32, where only the order of sums
differs; 0.05 for bfloat16, which keeps 8 bits, so that a loss near 8 is known to about 0.03 and gradients are summed in
bfloat16.

`none` is training without DeepSpeed, `zero2 x 2` is `--deepspeed zero2` with 2 ranks. Losses are compared with those of
one process without DeepSpeed. A resumed run took 3 of its 6 steps on the one setting (rows) and 3 on the other
(columns); its losses are compared with those of the run that stayed where it was.
"""


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file to write; standard output when absent")
    target = parser.parse_args().write
    target = target and target.resolve()
    os.chdir(RECORDINGS)
    pools = Pools()
    started = time.monotonic()
    lines = []
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(pools):
        for line in report(pools, Path(folder)):
            print(line, flush=True)
            lines.append(line)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    if target is not None:
        target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
