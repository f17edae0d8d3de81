"""What `--data_path` names, opened: one source of records, or the sources of a mixture and what is taken of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_ft.data.preparation.tokenized_rows import Array
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.mixture import Mixture, open_mixture
from llava_ft.data.sources.open import is_mixture, open_source
from llava_ft.data.sources.select_rows import select_rows


@dataclass(frozen=True, slots=True)
class Chosen:
    """Samples that are taken, numbered over all sources, one source after the other.

    Attributes:
        train: `(T,)` int64; a sample that is taken several times stands there several times.
        held_out: `(H,)` int64, ascending; none of them is in `train`.
        num_train: How many are taken of each source.
        num_held_out: How many are held out of each source.
    """

    train: Array
    held_out: Array
    num_train: list[int]
    num_held_out: list[int]


@dataclass(frozen=True, slots=True)
class OpenedData:
    """The sources that a path names.

    Attributes:
        path: The path, as given.
        sources: At least one.
        prompt_prefixes: For each source, text in front of the first question of its records.
        mixture: What is taken of them; None for a single source, of which all is taken.
    """

    path: str
    sources: list[RecordSource]
    prompt_prefixes: list[str]
    mixture: Mixture | None

    @classmethod
    def open(cls, path: str, cache_dir: Path) -> "OpenedData":
        """Open and prepare the sources.

        Args:
            path: A file, directory, name or mixture; see `docs/data_format.md`.
            cache_dir: Where the sources keep what reading by number needs.

        Raises:
            UserError: A source is missing, damaged or empty.
        """
        mixture = open_mixture(path) if is_mixture(path) else None
        sources = [open_source(path)] if mixture is None else mixture.open_sources()
        prefixes = [""] if mixture is None else [entry.prompt_prefix for entry in mixture.entries]
        for source in sources:
            source.prepare(cache_dir)
        return cls(path, sources, prefixes, mixture)

    def choose(self, num_usable: Sequence[int], seed: int) -> Chosen:
        """Choose among the usable samples of the sources.

        Args:
            num_usable: How many each source has.
            seed: Decides which, where not all are taken.

        Raises:
            UserError: A source of the mixture has too few.
        """
        if self.mixture is None:
            return Chosen(np.arange(num_usable[0]), np.zeros(0, dtype=np.int64), [num_usable[0]], [0])
        selection = select_rows(num_usable, self.mixture, seed)
        firsts = np.cumsum([0, *num_usable])
        return Chosen(
            train=np.concatenate([rows + first for rows, first in zip(selection.train, firsts, strict=False)]),
            held_out=np.concatenate([rows + first for rows, first in zip(selection.held_out, firsts, strict=False)]),
            num_train=[len(rows) for rows in selection.train],
            num_held_out=[len(rows) for rows in selection.held_out],
        )
