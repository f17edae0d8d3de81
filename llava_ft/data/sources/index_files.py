"""Arrays that are computed once for a source and mapped into memory afterwards, by any number of processes."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from llava_ft.data.preparation.build_once import NotUsableError, open_or_build
from llava_ft.errors import UserError

logger = logging.getLogger(__name__)

_BYTES_WORTH_A_NOTE: Final = 1 << 28

Array = np.ndarray[Any, np.dtype[Any]]


def prepare_arrays(folder: Path, build: Callable[[], Mapping[str, Array]]) -> None:
    """Compute arrays and write them into `folder`, unless it is there already. One process does it, others wait.

    Args:
        folder: Where the arrays are kept. Its name has to change with what they are computed from.
        build: Computes the arrays by name, none of them empty. Its errors are passed on, and leave nothing behind.

    Raises:
        RunError: The disk is full.
        UserError: The folder cannot be written.
    """

    def write(unfinished: Path) -> None:
        for name, array in build().items():
            np.save(unfinished / f"{name}.npy", array, allow_pickle=False)

    open_or_build(folder, _map_all, write)


def note_long_search(name: str, num_bytes: int) -> None:
    """Say that the records of a source are being looked for, where this takes more than a moment."""
    if num_bytes >= _BYTES_WORTH_A_NOTE:
        logger.info("Finding the records of %s (%.1f GB), once.", name, num_bytes / 1e9)


def map_array(folder: Path, name: str) -> Array:
    """Give one of the arrays in `folder`, mapped into memory and read-only.

    Raises:
        UserError: It is not there any more.
    """
    try:
        return _map(folder / f"{name}.npy")
    except (OSError, ValueError) as error:
        raise UserError(
            f"The index of the records in {folder} is missing or damaged ({error}). Start again: it is made anew."
        ) from None


def _map_all(folder: Path) -> int:
    """Map every array, to see whether all are whole; give their number."""
    try:
        return len([_map(file) for file in folder.glob("*.npy")])
    except (OSError, ValueError) as error:
        raise NotUsableError(str(error)) from error


def _map(file: Path) -> Array:
    return np.load(file, mmap_mode="r", allow_pickle=False)
