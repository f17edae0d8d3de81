"""A directory that is made once and shared: complete or not there, whoever is killed while making it.

It is filled under another name and renamed when it is complete. A file lock lets one process make it while others
wait; the system releases the lock of a process that ends, however it ends, so nobody waits for the dead. Where a file
system has no locks each process makes a directory of its own, and one of them stays.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from llava_ft.errors import RunError, UserError

logger = logging.getLogger(__name__)

Opened = TypeVar("Opened")

_LOOK_EVERY: Final = 0.1
_SECONDS_AHEAD: Final = 10.0
"""How long a process that lets another go first waits for it to begin."""

_SECONDS_OF_START: Final = 0.5
_SECONDS_TILL_NOTE: Final = 2.0
_NO_LOCKS: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class NotUsableError(Exception):
    """A directory is not there, incomplete or damaged; the message says how."""


def open_or_build(
    directory: Path,
    open_directory: Callable[[Path], Opened],
    build: Callable[[Path], None],
    *,
    goes_first: bool = True,
) -> Opened:
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
    found = _try_open(directory, open_directory)
    if found is not None:
        return found
    lock_file = _make_lock_file(directory)
    if not goes_first:
        _wait_for_another(directory, lock_file)
    with _locked(lock_file) as is_locked:
        found = _try_open(directory, open_directory)
        if found is not None:
            return found
        with _explaining_full_disk(directory.parent):
            if is_locked:
                _remove_remains(directory)
            _build(directory, build)
    return open_directory(directory)


@contextmanager
def one_at_a_time(path: Path, *, goes_first: bool = True) -> Generator[None]:
    """Let processes that are about to do the same do it one after the other.

    Args:
        path: Names what is done; the lock is beside it.
        goes_first: Whether to begin at once. False gives another process of the same run a moment's start.

    Raises:
        RunError: The disk is full.
        UserError: The place cannot be written to.
    """
    lock_file = _make_lock_file(path)
    if not goes_first:
        time.sleep(_SECONDS_OF_START)
    with _locked(lock_file):
        yield


def _try_open(directory: Path, open_directory: Callable[[Path], Opened]) -> Opened | None:
    if not directory.exists():
        return None
    try:
        return open_directory(directory)
    except NotUsableError as error:
        logger.warning("%s is damaged (%s) and is made again.", directory, error)
        return None


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    staging = directory.parent / f".{directory.name}.{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        build(staging)
        if directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
        try:
            staging.rename(directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_remains(directory: Path) -> None:
    """Delete what killed processes left behind; only the holder of the lock may."""
    for remains in directory.parent.glob(f".{directory.name}.*"):
        if remains.is_dir():
            shutil.rmtree(remains, ignore_errors=True)


def _make_lock_file(directory: Path) -> Path:
    path = directory.parent / f"{directory.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full_disk(path.parent) from error
        raise UserError(
            f"Prepared data cannot be written to {directory.parent}: {error.strerror}. Give a --data_cache_dir that "
            "can be written to."
        ) from error
    return path


def _wait_for_another(directory: Path, lock_file: Path) -> None:
    """Wait until another process has begun, or for a while; whoever has the lock is then waited for anyway."""
    end = time.monotonic() + _SECONDS_AHEAD
    while time.monotonic() < end and not directory.exists() and not _is_held(lock_file):
        time.sleep(_LOOK_EVERY)


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return not _take(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Generator[bool]:
    """Hold a lock on a file; give False where the file system has none."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield _wait_for_lock(descriptor, path)
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, path: Path) -> bool:
    start = time.monotonic()
    is_noted = False
    try:
        while not _take(descriptor):
            if not is_noted and time.monotonic() - start > _SECONDS_TILL_NOTE:
                logger.info("Waiting for another process that prepares the same data (%s).", path)
                is_noted = True
            time.sleep(_LOOK_EVERY)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def _explaining_full_disk(place: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _full_disk(place) from error
        raise


def _full_disk(place: Path) -> RunError:
    try:
        free = f"{shutil.disk_usage(place).free / 1e9:.1f} GB"
    except OSError:
        free = "an unknown amount"
    return RunError(
        f"The disk with {place} is full ({free} is free), so the records could not be prepared there. Make room, or "
        "give a --data_cache_dir on another disk."
    )
