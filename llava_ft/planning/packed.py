"""What the rows of a packed run hold, for its plan."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_ft.data.packing import pack

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PackedRows:
    """Rows that samples are packed into.

    Attributes:
        num_rows: How many there are.
        num_supervised: Tokens of each row that have to be predicted, most first.
        num_images: Images of each row, most first.
    """

    num_rows: int
    num_supervised: Array
    num_images: Array


def plan_rows(lengths: Array, num_supervised: Array, num_images: Array, *, max_length: int, seed: int) -> PackedRows:
    """Pack samples as the run does.

    Args:
        lengths: Tokens of each sample, in the order of the run.
        num_supervised: Tokens of each sample that have to be predicted.
        num_images: Images of each sample.
        max_length: Tokens that a row has room for.
        seed: Seed of the run's data.
    """
    rows = pack(lengths, max_length, seed)
    return PackedRows(len(rows), *(np.sort(rows.totals(values))[::-1] for values in (num_supervised, num_images)))
