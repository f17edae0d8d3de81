"""Arrays that are computed once for a source and mapped into memory afterwards, by any number of processes."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_ft.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]


def prepare_arrays(folder: Path, build: Callable[[], Mapping[str, Array]]) -> None:
    """Compute arrays and write them into `folder`, unless it is there already.

    The folder appears whole or not at all: it is written beside its place and renamed. Of two processes that do
    this at once, one keeps its files and the other throws its own away; both hold the same.

    Args:
        folder: Where the arrays are kept. Its name has to change with what they are computed from.
        build: Computes the arrays by name. Its errors are passed on, and leave nothing behind.

    Raises:
        UserError: The folder cannot be written.
    """
    if folder.is_dir():
        return
    arrays = build()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, array in arrays.items():
                np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
            unfinished.chmod(0o755)
            _rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"Cannot write the index of the records to {folder}: {error.strerror or error}. Name a writable "
            "directory with --data_cache_dir."
        ) from None


def map_array(folder: Path, name: str) -> Array:
    """Give one of the arrays in `folder`, mapped into memory and read-only.

    Raises:
        UserError: It is not there any more.
    """
    try:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The index of the records in {folder} is missing or damaged ({error}). Delete that directory "
            "and start again."
        ) from None


def _rename(unfinished: Path, folder: Path) -> None:
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():
            raise
