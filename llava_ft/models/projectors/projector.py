"""What a type of projector says of itself."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


def _as_many(num_features: int) -> int:
    return num_features


@dataclass(frozen=True)
class ProjectorType:
    """A type of projector.

    A new projector starts from the `reset_parameters()` of the module, or of the modules in it. Parameters are called
    in files as in the module, behind `model.mm_projector.`.

    Attributes:
        name: What `mm_projector_type` says, as messages list it.
        pattern: The same as an expression, which is compared with the whole of what is said.
        build: Makes the module, `(K, N, C)` to `(K, num_tokens(N), D)`, from what is said, C and D.
        num_tokens: Number of tokens that it makes of a number of features of one tile.
        keeps_grid: Whether it makes a smaller or equal square of a square of features, in reading order. Layouts of
            tiles as one picture (`mm_patch_merge_type=spatial...`) need it.
        keeps_width: Whether C has to be D.
    """

    name: str
    pattern: re.Pattern[str]
    build: Callable[[str, int, int], nn.Module]
    num_tokens: Callable[[int], int] = _as_many
    keeps_grid: bool = True
    keeps_width: bool = False
