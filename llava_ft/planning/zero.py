"""DeepSpeed's settings as far as they decide memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_ft.errors import UserError


@dataclass(frozen=True)
class ZeroSettings:
    """A DeepSpeed configuration; the defaults are DeepSpeed's own.

    Attributes:
        stage: What is divided among the ranks: nothing (0), optimizer state (1), gradients too (2), weights too (3).
        offload_optimizer: Whether master weights, optimizer state and gradients are in the host's memory.
        offload_param: Whether weights wait in the host's memory (stage 3).
        reduce_bucket_size: Values that are reduced at a time; such a buffer is there during the backward pass.
        overlap_comm: Whether reducing overlaps with the backward pass, which takes a second buffer (stages 1 and 2).
        prefetch_bucket_size: Values that are gathered ahead of their use (stage 3).
        param_persistence_threshold: Parameters with fewer values stay whole on every rank (stage 3).
        max_live_parameters: No more is gathered ahead when so many values are whole (stage 3).
        max_reuse_distance: A weight stays whole if it is used again within so many values (stage 3).
        sub_group_size: Values that the optimizer updates at a time (stage 3).
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000

    @classmethod
    def from_config(cls, config: Mapping[str, Any], hidden_size: int) -> "ZeroSettings":
        """Read DeepSpeed's configuration.

        Args:
            config: The whole configuration.
            hidden_size: Width of the language model, by which transformers fills in "auto".

        Raises:
            UserError: A size is no number.
        """
        zero = config.get("zero_optimization") or {}
        stage = int(zero.get("stage", 0))
        automatic = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }

        def number(key: str, field_name: str) -> int:
            value = zero.get(key, getattr(cls, field_name))
            try:
                return automatic[key] if value == "auto" else int(value)
            except (KeyError, TypeError, ValueError):
                raise UserError(
                    f"zero_optimization.{key} of the DeepSpeed configuration is {value!r}. Allowed is a whole number "
                    f"of values{', or auto' if key in automatic else ''}."
                ) from None

        overlap = zero.get("overlap_comm")
        return cls(
            stage=stage,
            offload_optimizer=_is_offloaded(zero.get("offload_optimizer")),
            offload_param=stage == 3 and _is_offloaded(zero.get("offload_param")),
            reduce_bucket_size=number("reduce_bucket_size", "reduce_bucket_size"),
            overlap_comm=stage == 3 if overlap is None else bool(overlap),
            prefetch_bucket_size=number("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
            param_persistence_threshold=number("stage3_param_persistence_threshold", "param_persistence_threshold"),
            max_live_parameters=number("stage3_max_live_parameters", "max_live_parameters"),
            max_reuse_distance=number("stage3_max_reuse_distance", "max_reuse_distance"),
            sub_group_size=number("sub_group_size", "sub_group_size"),
        )

    def __str__(self) -> str:
        """Return the name that people use, such as `ZeRO-3 with offload`."""
        offload = " with offload" if self.offload_optimizer or self.offload_param else ""
        return f"ZeRO-{self.stage}{offload}"


def _is_offloaded(setting: Mapping[str, Any] | None) -> bool:
    return setting is not None and setting.get("device", "none") not in (None, "none")
