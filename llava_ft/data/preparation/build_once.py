"""A directory that is made once and shared: complete or not there, whoever is killed while making it.

It is filled under another name and renamed when it is complete. A file lock lets one process make it while others
wait; the system releases the lock of a process that ends, however it ends, so nobody waits for the dead. Where a file
system has no locks each process makes a directory of its own, and one of them stays.
"""

import errno
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

from filelock import FileLock, Timeout

from llava_ft.digests import file_digests
from llava_ft.errors import RunError, UserError

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

_SECONDS_AHEAD: Final = 10.0
"""How long a process that lets another go first waits for it to begin."""

_SECONDS_TILL_NOTE: Final = 2.0
_DIGESTS: Final = "digests.json"
"""Digest of each file of a finished directory, by name."""

_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class NotUsableError(Exception):
    """A directory is not there, incomplete or damaged; the message says how."""


def open_or_build(
    directory: Path, open_directory: Callable[[Path], Made], build: Callable[[Path], None], *, goes_first: bool = True
) -> Made:
    """Open a directory, after making it if it is not there or damaged.

    Args:
        directory: Where it is to be.
        open_directory: Opens a finished directory; raises `NotUsableError` if it cannot.
        build: Fills an empty directory.
        goes_first: Whether to make it at once. False lets another process of the same run begin first.

    Raises:
        RunError: The disk is full.
        UserError: The place cannot be written to.
    """

    def try_open() -> Made | None:
        if not directory.exists():
            return None
        try:
            _check_digests(directory)
            return open_directory(directory)
        except NotUsableError as error:
            logger.warning("%s is damaged (%s) and is made again.", directory, error)
            return None

    made = try_open()
    if made is not None:
        return made
    with one_at_a_time(directory, goes_first=goes_first) as is_locked:
        made = try_open()
        if made is not None:
            return made
        if is_locked:  # what killed processes left behind is nobody else's
            for remains in directory.parent.glob(f".{directory.name}.*"):
                shutil.rmtree(remains, ignore_errors=True)
        unfinished = directory.parent / f".{directory.name}.{socket.gethostname()}.{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            build(unfinished)
            _write_digests(unfinished)
            shutil.rmtree(directory, ignore_errors=True)  # a damaged one
            try:
                unfinished.rename(directory)
            except OSError as error:
                # Without locks another process may have been faster; its directory is as good.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return open_directory(directory)


def _write_digests(directory: Path) -> None:
    """Put all files of a finished directory on disk, and note their digests."""
    files = sorted(directory.iterdir())
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    digests = dict(zip([file.name for file in files], file_digests(files), strict=True))
    with (directory / _DIGESTS).open("w", encoding="utf-8") as noted:
        json.dump(digests, noted, indent=1)
        noted.flush()
        os.fsync(noted.fileno())


def _check_digests(directory: Path) -> None:
    try:
        noted: dict[str, str] = json.loads((directory / _DIGESTS).read_text(encoding="utf-8"))
        found = file_digests([directory / name for name in noted])
        damaged = [name for (name, digest), now in zip(noted.items(), found, strict=True) if now != digest]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise NotUsableError(f"{_DIGESTS} does not fit: {error}") from None
    if damaged:
        raise NotUsableError(f"{damaged[0]} is not as it was written")


@contextmanager
def one_at_a_time(path: Path, *, goes_first: bool = True) -> Generator[bool]:
    """Let processes that are about to make `path` do it one after the other; the lock is beside it.

    Yields:
        Whether the others wait; False where the file system has no locks.

    Raises:
        RunError: The disk is full, now or while the lock is held.
        UserError: The place cannot be written to.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"), fallback_to_soft=False)  # that would wait for the dead
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another process of the same run has the lock or is done, or has had time to begin.
            end = time.monotonic() + _SECONDS_AHEAD
            while not goes_first and time.monotonic() < end and not path.exists() and _is_free(lock):
                time.sleep(0.1)
            is_locked = _acquire(lock)
            held.callback(lock.release)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise _full_disk(path.parent) from error
            raise UserError(
                f"Prepared data cannot be written to {path.parent}: {error.strerror}. Give a --data_cache_dir that "
                "can be written to."
            ) from error
        try:
            yield is_locked
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise _full_disk(path.parent) from error
            raise


def _is_free(lock: FileLock) -> bool:
    try:
        with lock.acquire(blocking=False):
            return True
    except (Timeout, OSError):  # somebody has it, or there are no locks
        return False


def _acquire(lock: FileLock) -> bool:
    try:
        try:
            lock.acquire(timeout=_SECONDS_TILL_NOTE)
        except Timeout:
            logger.info("Waiting for another process that prepares the same data (%s).", lock.lock_file)
            lock.acquire()
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _full_disk(place: Path) -> RunError:
    try:
        free = f"{shutil.disk_usage(place).free / 1e9:.1f} GB"
    except OSError:
        free = "an unknown amount"
    return RunError(
        f"The disk with {place} is full ({free} is free), so the records could not be prepared there. Make room, or "
        "give a --data_cache_dir on another disk."
    )
