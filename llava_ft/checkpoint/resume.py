"""The checkpoints of a run: finding the one to continue from, opening its optimizer state, deleting old ones."""

import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from llava_ft.checkpoint.fields import RankFields, TrainerStateFields
from llava_ft.checkpoint.manifest import MERGED_BASE, is_as_written, read_manifest, what_is_incomplete
from llava_ft.checkpoint.names import OPTIMIZER, RANKS, SCHEDULER, TRAINER_STATE
from llava_ft.checkpoint.optimizer import OptimizerFile, SavedOptimizer
from llava_ft.checkpoint.pickles import check_pickle
from llava_ft.errors import CheckpointError
from llava_ft.json_files import read_json

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
_STAGING = re.compile(rf"\.({_CHECKPOINT.pattern}|result|{MERGED_BASE})\.incomplete")
"""Directories that a run writes before they get their name; nobody else's are touched."""

_THREADS: Final = 8
"""That read files to compare their digests."""


@dataclass(frozen=True)
class RankLayout:
    """How the samples of a step were divided."""

    world_size: int
    batch: int  # samples, or packed rows, of an optimizer step, all ranks and accumulation together
    epoch: int | None = None  # samples, or packed rows, of an epoch; None in checkpoints that do not say it

    def difference(self, now: "RankLayout") -> str:
        """Say what makes a position in steps of this layout another one in steps of `now`; "" if nothing does."""
        differences: list[str] = []
        if self.batch != now.batch:
            differences.append(f"a step took {self.batch} samples and takes {now.batch} now")
        if self.epoch is not None and self.epoch != now.epoch:
            differences.append(f"an epoch had {self.epoch} samples or packed rows and has {now.epoch} now")
        return " and ".join(differences)


def read_ranks(checkpoint: Path) -> RankLayout | None:
    """Return how a checkpoint's run divided its steps, or None for one that another program wrote."""
    path = checkpoint / RANKS
    if not path.is_file():
        return None
    content = read_json(path, RankFields)
    return RankLayout(content["world_size"], content["batch"], content.get("epoch"))


def checkpoints_by_step(output_dir: Path) -> list[Path]:
    """Return the checkpoint-N directories of a run, the newest first."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in output_dir.glob("checkpoint-*")}
    steps = [(int(match[1]), path) for path, match in found.items() if match]
    return [path for _, path in sorted(steps, reverse=True)]


def newest_complete_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint in an output directory, or None if there is none.

    Incomplete ones are named in the log and left alone.
    """
    for path in checkpoints_by_step(output_dir):
        reason = what_is_incomplete(path)
        if reason is None:
            return path
        logger.warning("%s is not resumed from: %s.", path, reason)
    return None


def check_checkpoint(path: Path) -> None:
    """Check a checkpoint that the user named.

    Raises:
        CheckpointError: It does not exist, is an incomplete one of this program, or holds files that are not read.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"The checkpoint {path} does not exist. Give one of the checkpoint-N directories of a run."
        )
    if not (path / TRAINER_STATE).is_file():
        raise CheckpointError(
            f"{path} has no {TRAINER_STATE}, so it is no checkpoint to resume from. To start from its weights with "
            "a new optimizer, use --lora_weight_path or --pretrain_mm_mlp_adapter."
        )
    if read_manifest(path) is not None and (reason := what_is_incomplete(path)) is not None:
        raise CheckpointError(f"{path} is incomplete: {reason}. Resume from another one.")
    check_training_state(path)


class IntegrityCheck:
    """Compares all files of a checkpoint with the digests in its manifest while other things are loaded.

    A context: what has not been looked at when it ends is left.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS)
        self._results: dict[Path, Future[bool]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, checkpoint: Path) -> None:
        """Begin with a checkpoint; one that another program wrote has no digests to compare with."""
        manifest = read_manifest(checkpoint)
        for name, described in manifest.files.items() if manifest else ():
            self._results[checkpoint / name] = self._pool.submit(is_as_written, checkpoint / name, described)

    def finish(self) -> None:
        """Wait for what was found.

        Raises:
            CheckpointError: A file is damaged or cannot be read.
        """
        for path, result in self._results.items():
            try:
                if result.result():
                    continue
                reason = "its content is not what was written"
            except OSError as error:
                reason = str(error.strerror)
            raise CheckpointError(
                f"{path} is damaged: {reason}. Resume from another checkpoint with --resume_from_checkpoint, or copy "
                "the file again."
            )


def check_training_state(checkpoint: Path) -> None:
    """Check what this program or transformers reads of a checkpoint to continue; pickles without unpickling them.

    Raises:
        CheckpointError: A file is damaged, or holds more than tensors, plain values and NumPy's random numbers.
    """
    read_json(checkpoint / TRAINER_STATE, TrainerStateFields)
    read_ranks(checkpoint)
    for name in (OPTIMIZER, SCHEDULER, "scaler.pt"):
        if (checkpoint / name).is_file():
            check_pickle(checkpoint / name)
    for path in sorted(checkpoint.glob("rng_state*.pth")):
        check_pickle(path, with_numpy=True)


def delete_old_checkpoints(output_dir: Path, limit: int | None, *, written: Path, best: str | None) -> None:
    """Keep a number of a run's complete checkpoints, and delete older ones.

    What is incomplete, not of this program or a link to elsewhere is neither counted nor deleted: each would take the
    place of one to resume from. Checkpoints without optimizer state (`save_only_model`) are counted by themselves for
    the same reason.

    Args:
        output_dir: Of the run.
        limit: How many to keep of each kind; None keeps all.
        written: The newest in time, which is kept, as is the one with the highest number.
        best: Path of the best one, which is kept.
    """
    if limit is None or limit < 1:
        return
    complete = [
        path for path in checkpoints_by_step(output_dir) if not path.is_symlink() and what_is_incomplete(path) is None
    ]
    resumable = [path for path in complete if _has_optimizer(path)]
    for kind in (resumable, [path for path in complete if path not in resumable]):
        kept = {path for path in kind if path in (kind[0], written) or (best is not None and path == Path(best))}
        num_to_delete = len(kind) - max(limit, len(kept))
        for path in [path for path in reversed(kind) if path not in kept][: max(0, num_to_delete)]:
            # Renamed first: a kill in between would leave files without their names in the manifest being there.
            leftover = path.with_name(f".{path.name}.incomplete")
            shutil.rmtree(leftover, ignore_errors=True)
            os.replace(path, leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def remove_staging(output_dir: Path) -> None:
    """Remove what a killed run left half-written, and put back a checkpoint that it was about to replace."""
    for path in output_dir.glob(".checkpoint-*.outdated"):
        checkpoint = path.with_name(path.name.removeprefix(".").removesuffix(".outdated"))
        if not _CHECKPOINT.fullmatch(checkpoint.name):
            continue
        if checkpoint.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            logger.info("%s is put back: a run was replacing it when it was killed.", checkpoint)
            os.replace(path, checkpoint)
    for path in output_dir.glob(".*.incomplete"):
        if _STAGING.fullmatch(path.name):
            logger.info("Removing %s, which a run was writing when it was killed.", path)
            shutil.rmtree(path, ignore_errors=True)


def _has_optimizer(checkpoint: Path) -> bool:
    return (checkpoint / OPTIMIZER).is_file() or any(checkpoint.glob("global_step*"))


def open_saved_optimizer(checkpoint: Path) -> SavedOptimizer:
    """Open a checkpoint's optimizer state, whichever way it was written.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if (checkpoint / OPTIMIZER).is_file():
        return OptimizerFile(checkpoint / OPTIMIZER)
    if any(checkpoint.glob("global_step*")):
        from llava_ft.checkpoint.zero.optimizer import ZeroOptimizer

        return ZeroOptimizer(checkpoint)
    raise CheckpointError(
        f"{checkpoint} holds no optimizer state: it was written with --save_only_model. Start a new run from its "
        "weights with --lora_weight_path, --pretrain_mm_mlp_adapter or --model_name_or_path."
    )
