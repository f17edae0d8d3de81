"""Where records come from, as `--data_path` says it. What reads a mixture is imported where one is named."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llava_ft.data.sources.base import RecordSource, Selection
from llava_ft.data.sources.open import MIXTURE_SUFFIXES, open_source
from llava_ft.errors import UserError

if TYPE_CHECKING:
    from llava_ft.data.sources.mixture import Mixture


def is_mixture(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a YAML file, which describes several sources."""
    return Path(path).suffix.lower() in MIXTURE_SUFFIXES


@dataclass(frozen=True, slots=True)
class DataSources:
    """The sources that a path names."""

    path: str
    sources: list[RecordSource]  # at least one
    prompt_prefixes: list[str]  # for each source, text in front of the first question of its records
    mixture: "Mixture | None"  # what is taken of them; None for a single source, of which all is taken

    @classmethod
    def open(cls, path: str, cache_dir: Path) -> "DataSources":
        """Open and prepare the sources; in `cache_dir` they keep what reading by number needs.

        Raises:
            UserError: A source is missing, damaged or empty.
        """
        if is_mixture(path):
            from llava_ft.data.sources.mixture import open_mixture

            mixture = open_mixture(path)
            sources, prefixes = mixture.open_sources(), [entry.prompt_prefix for entry in mixture.entries]
        else:
            mixture, sources, prefixes = None, [open_source(path)], [""]
        for source in sources:
            source.prepare(cache_dir)
        return cls(path, sources, prefixes, mixture)

    def choose(self, num_usable: Sequence[int], seed: int) -> Selection:
        """Choose among the usable samples of the sources, `num_usable` of each, numbered over all sources.

        Raises:
            UserError: A source of the mixture has too few.
        """
        if self.mixture is None:
            return Selection([np.arange(num_usable[0])], [np.zeros(0, dtype=np.int64)])
        from llava_ft.data.sources.selection import select_rows

        selection = select_rows(num_usable, self.mixture, seed)
        firsts = list(accumulate(num_usable, initial=0))
        return Selection(
            [rows + first for rows, first in zip(selection.train, firsts, strict=False)],
            [rows + first for rows, first in zip(selection.held_out, firsts, strict=False)],
        )


def holds_out(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a mixture that keeps records for validation."""
    if not is_mixture(path):
        return False
    from llava_ft.data.sources.mixture import open_mixture

    return any(entry.held_out for entry in open_mixture(path).entries)


def check_holds_out(path: str | Path) -> None:
    """Refuse a mixture that keeps no records to evaluate on; anything but a mixture is let through.

    Raises:
        UserError: No source of the mixture has `held_out`.
    """
    if is_mixture(path) and not holds_out(path):
        raise UserError(
            f"Mixture {path} holds out no records, and eval_strategy needs some. Give a source 'held_out', name "
            "records with --validation_data_path, or set --eval_strategy no."
        )
