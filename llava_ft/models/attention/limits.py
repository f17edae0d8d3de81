"""What attention kernels need of a model."""

from collections.abc import Mapping
from typing import Any, Final

_WIDEST: Final[Mapping[str, int]] = {"flash_attention_3": 256, "flash_attention_2": 256, "varlen": 256}
"""Widths of a head up to which the kernels of GPUs are made."""

_WITHOUT_DROPOUT: Final = ("flash_attention_3", "varlen", "flex_attention")
_LEAST_FLEX_WIDTH: Final = 16


def limit(kernel: str, config: Any) -> str | None:
    """Say why a kernel does not go with a model; None if it does.

    Args:
        kernel: One of `kernels.py`.
        config: The language model's configuration.
    """
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if width > _WIDEST.get(kernel, width):
        return f"its heads are {width} wide, and the kernel's at most {_WIDEST[kernel]}"
    if kernel == "varlen" and width % 8:
        return f"its heads are {width} wide, and the kernel's a multiple of 8"
    if kernel == "flex_attention" and width < _LEAST_FLEX_WIDTH:
        return f"its heads are {width} wide, and the kernel's at least {_LEAST_FLEX_WIDTH}"
    if kernel in _WITHOUT_DROPOUT and config.attention_dropout:
        return f"it has attention_dropout {config.attention_dropout}, and the kernel has none"
    return None
