"""The output directory of a run: one run at a time, one kind of result, and nobody's files written over.

What a run may write over is its own: the result that its checkpoints led to, when it is started again. Anything else of
the names that it writes ends the start, before a weight is read, unless `overwrite_output_dir` allows it. That flag
never lets two kinds of result share a directory, whose readers could not tell which one is meant.
"""

import errno
import logging
import os
import socket
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from llava_ft.checkpoint.lineage import LINEAGE
from llava_ft.checkpoint.manifest import is_as_written, read_manifest
from llava_ft.checkpoint.names import (
    CONFIG,
    GENERATION_CONFIG,
    MANIFEST,
    PREPROCESSOR_CONFIG,
    RUN_CONFIG,
    TRAINABLE_TABLE,
    TRAINER_STATE,
)
from llava_ft.checkpoint.resume import checkpoints_by_step
from llava_ft.checkpoint.save import WEIGHT_FILES, ResultKind, result_kind
from llava_ft.errors import CheckpointError, UserError
from llava_ft.resolve import RunModel

logger = logging.getLogger(__name__)

LOCK: Final = ".llava_ft.lock"
"""Held for as long as a run goes on; host and process are written in it."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
_DESCRIPTIONS: Final[Mapping[ResultKind, str]] = {
    "lora": "an adapter",
    "projector": "a projector",
    "full": "a whole model",
}
_BESIDE_WEIGHTS = (
    CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, "processor_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.json", "merges.txt",
    MANIFEST, LINEAGE, RUN_CONFIG, TRAINABLE_TABLE, TRAINER_STATE,
)  # fmt: skip


@contextmanager
def lock_output_dir(training: TrainingArguments) -> Generator[None]:
    """Keep other runs out of the output directory; the rank that writes there does it for all.

    The lock is the kernel's, so that of a process that was killed holds nobody up, though its file is still there.

    Raises:
        UserError: Another run has it, or the directory cannot be written to.
    """
    if not training.should_save:
        yield
        return
    directory = Path(training.output_dir or ".")
    path = directory / LOCK
    lock = FileLock(path, blocking=False, fallback_to_soft=False)  # a soft one would outlive a process that is killed
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        owner = path.read_text(encoding="utf-8").strip() or "another process"
        raise UserError(
            f"output_dir={directory} is in use: {owner} is training there. Two runs cannot write into one directory; "
            "stop that one or wait for it, or give another --output_dir."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(
                f"output_dir={directory} cannot be written to: {error.strerror}. Give a directory that can."
            ) from error
        logger.warning("The disk with %s has no locks: make sure that no other run writes there.", directory)
    try:
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # before another can take it
            lock.release()
        if is_new:
            with suppress(OSError):  # a run that was refused leaves no trace; others are not empty
                directory.rmdir()


def check_output_dir(run: RunModel, checkpoint: Path | None) -> None:
    """Check that a run would write over nothing but what is its own.

    Args:
        run: The run, its model settled.
        checkpoint: What it is resumed from.

    Raises:
        UserError: The directory is one that the run reads, holds another kind of result, or files of others.
    """
    directory = Path(run.args.training.output_dir or ".")
    kind = result_kind(run.tuning)
    for place in (directory, *checkpoints_by_step(directory)):
        for other in _DESCRIPTIONS.keys() - {kind}:
            if names := matching_files(place, WEIGHT_FILES[other]):
                raise UserError(
                    f"output_dir={directory} holds {_DESCRIPTIONS[other]} ({place / names[0]}), and this run makes "
                    f"{_DESCRIPTIONS[kind]}. Two kinds of result cannot share a directory: give another --output_dir."
                )
    if run.args.flags.overwrite_output_dir:
        return
    start, start_flag = run.args.flags.start
    for flag, value in (("model_name_or_path", run.args.model.model_name_or_path), (start_flag, start)):
        source = Path(value).resolve()
        if value and source in (directory.resolve(), *(path.resolve() for path in checkpoints_by_step(directory))):
            raise UserError(
                f"output_dir={directory} holds what this run starts from ({flag}={value}), which it would write over. "
                "Give another --output_dir, or pass --overwrite_output_dir True."
            )
    own = _files_of_run(directory, checkpoint)
    for name in matching_files(directory, [*_BESIDE_WEIGHTS, *WEIGHT_FILES[kind]]):
        if name not in own:
            raise UserError(
                f"{directory / name} is there already, and this run would write over it without being the "
                "continuation of the one that made it. Give another --output_dir, or pass --overwrite_output_dir True."
            )


def _files_of_run(directory: Path, checkpoint: Path | None) -> set[str]:
    """Name the files in an output directory that were made by the run that is resumed there, as it made them."""
    if checkpoint is None or checkpoint.resolve().parent != directory.resolve():
        return set()
    try:
        result, resumed = read_manifest(directory), read_manifest(checkpoint)
    except CheckpointError:
        return set()
    if result is None:  # `run_config.yaml` comes first and the manifest last: it was killed while it wrote its result
        return set(os.listdir(directory)) if (directory / RUN_CONFIG).is_file() else set()
    if resumed is not None and result.base_fingerprint != resumed.base_fingerprint:
        return set()
    unchanged = {
        name
        for name, described in result.files.items()
        if (path := directory / name).is_file() and is_as_written(path, described)
    }
    return unchanged | {MANIFEST}


def matching_files(directory: Path, patterns: Iterable[str]) -> list[str]:
    """Return the names in a directory that match one of the patterns."""
    names = sorted(os.listdir(directory)) if directory.is_dir() else []
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
