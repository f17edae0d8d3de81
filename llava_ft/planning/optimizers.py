"""What optimizers keep for each trained value, by transformers' name, and what a step of theirs takes on top.

Sizes of state are those of torch, transformers and bitsandbytes: bitsandbytes' 8-bit state is a byte for each value and
moment with a float32 scale for each block of 256, and parameters below 4096 values keep 32-bit state.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_MIN_8BIT_VALUES: Final = 4096
_BLOCK_8BIT: Final = 256


@dataclass(frozen=True)
class OptimizerKind:
    """How an optimizer uses memory.

    Attributes:
        moments: Values kept for each trained value.
        bits: Bits of each.
        is_factored: Whether a matrix keeps one value for each row and column instead (Adafactor).
        is_foreach: Whether a step on a GPU makes a temporary of all parameters of a group at once.
    """

    moments: int
    bits: int = 32
    is_factored: bool = False
    is_foreach: bool = False

    def state_bytes(self, shapes: Iterable[tuple[int, ...]]) -> int:
        """Return the bytes of the state for parameters of these shapes."""
        return sum(self._state_of(shape) for shape in shapes)

    def step_bytes(self, sizes: Iterable[int], *, on_gpu: bool) -> int:
        """Return the bytes that a step takes beside gradients and state.

        Args:
            sizes: Numbers of values of the parameters that are updated together, float32.
            on_gpu: Whether the kernels are those of a GPU.
        """
        counts = list(sizes)
        if self.is_foreach and on_gpu:
            return 4 * sum(counts)
        if self.bits == 8 and on_gpu:
            return 0
        temporaries = 2 if self.bits == 32 else 5
        return 4 * temporaries * max(counts, default=0)

    def _state_of(self, shape: tuple[int, ...]) -> int:
        count = math.prod(shape)
        if self.is_factored and len(shape) >= 2:
            return 4 * (count // shape[-1] + count // shape[-2])
        if self.bits == 8 and count >= _MIN_8BIT_VALUES:
            return self.moments * (count + 4 * math.ceil(count / _BLOCK_8BIT))
        return 4 * self.moments * count


KINDS: Final = {
    "adamw_torch": OptimizerKind(2, is_foreach=True),
    "adamw_torch_fused": OptimizerKind(2),
    "adamw_8bit": OptimizerKind(2, bits=8),
    "adamw_bnb_8bit": OptimizerKind(2, bits=8),
    "paged_adamw_32bit": OptimizerKind(2),
    "paged_adamw_8bit": OptimizerKind(2, bits=8),
    "adafactor": OptimizerKind(1, is_factored=True),
    "lion_32bit": OptimizerKind(1),
    "lion_8bit": OptimizerKind(1, bits=8),
    "paged_lion_32bit": OptimizerKind(1),
    "paged_lion_8bit": OptimizerKind(1, bits=8),
    "sgd": OptimizerKind(0),
    "adagrad": OptimizerKind(1, is_foreach=True),
    "rmsprop": OptimizerKind(1, is_foreach=True),
}
"""By transformers' name for `optim`."""


def optimizer_kind(name: str) -> tuple[OptimizerKind, str | None]:
    """Return how an optimizer uses memory, and a note if it is not known and was taken for AdamW."""
    if name in KINDS:
        return KINDS[name], None
    return KINDS["adamw_torch"], f"optim {name} is not known here; its state is counted like adamw_torch's."
