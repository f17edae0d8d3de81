"""Optimizer state on disk, by name of parameter: what makes a run continue on any number of ranks and ZeRO stage.

A run without ZeRO writes `optimizer.pt`. Under ZeRO each rank writes its own part in DeepSpeed's format
(`global_stepN/`); `zero_optimizer.py` finds the parameters in these parts. Either way state is asked for by parameter
and range of elements, so a rank reads what it needs and nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from llava_ft.checkpoint.names import OPTIMIZER
from llava_ft.checkpoint.pickles import load_pickle
from llava_ft.errors import CheckpointError

FORMAT = "llava_ft optimizer 1"
"""Value of `format` in `optimizer.pt`."""

State = Mapping[str, Any]
"""What an optimizer holds of one parameter, such as `step`, `exp_avg` and `exp_avg_sq`."""

Place = tuple[str, int, int, int]
"""Part of a parameter in a vector: its name, first element, number of elements, and where in the vector it begins."""


class SavedOptimizer(ABC):
    """The state of an optimizer, by plain name of parameter.

    Attributes:
        path: File or directory, for messages.
    """

    path: Path

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Number of elements of each parameter that state is held of."""

    @abstractmethod
    def moments(self, name: str) -> tuple[str, ...]:
        """Names of the state that has one value for each element, such as `exp_avg`."""

    @abstractmethod
    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:
        """Return `(length,)` values of a parameter's state, from element `start` of the flattened parameter."""

    @abstractmethod
    def step(self, name: str) -> float | None:
        """Number of updates the parameter had, if the optimizer counts them."""

    @abstractmethod
    def is_divisible(self, name: str) -> bool:
        """Whether all state has one value for each element. That of 8-bit optimizers is in blocks and has not."""

    @abstractmethod
    def whole_vector(self, places: Sequence[Place]) -> State | None:
        """Return the state of the vector made of exactly these parts of parameters, if there is one."""


class OptimizerFile(SavedOptimizer):
    """`optimizer.pt`: the state of a run whose ranks hold all of it.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is damaged or of another format.
    """

    def __init__(self, path: Path):
        self.path = path
        content = _mapping(load_pickle(path))
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} does not hold its state by name of parameter, so another program wrote it. Start a new run "
                "from the trained weights with --lora_weight_path, --pretrain_mm_mlp_adapter or --model_name_or_path."
            )
        self.states = {name: _mapping(state) for name, state in _mapping(content.get("state")).items()}
        self._sizes: dict[str, int] = _mapping(content.get("sizes"))
        if self._sizes.keys() != self.states.keys():
            raise CheckpointError(f"{path} does not hold the state of each parameter. Resume from another checkpoint.")

    @property
    def sizes(self) -> Mapping[str, int]:  # noqa: D102 - inherited
        return self._sizes

    def moments(self, name: str) -> tuple[str, ...]:  # noqa: D102 - inherited
        return tuple(key for key, value in self.states[name].items() if self._is_moment(name, value))

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:  # noqa: D102 - inherited
        return self.states[name][moment].reshape(-1)[start : start + length]

    def step(self, name: str) -> float | None:  # noqa: D102 - inherited
        step = self.states[name].get("step")
        return None if step is None else float(step)

    def is_divisible(self, name: str) -> bool:  # noqa: D102 - inherited
        tensors = {key for key, value in self.states[name].items() if isinstance(value, torch.Tensor)}
        return tensors <= {"step", *self.moments(name)}

    def whole_vector(self, places: Sequence[Place]) -> State | None:  # noqa: D102 - inherited
        return None

    def _is_moment(self, name: str, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() == self._sizes[name] > 1


def write_optimizer_file(path: Path, states: Mapping[str, State], sizes: Mapping[str, int]) -> None:
    """Write `optimizer.pt`."""
    torch.save({"format": FORMAT, "state": dict(states), "sizes": dict(sizes)}, path)


def open_saved_optimizer(checkpoint: Path) -> SavedOptimizer:
    """Open a checkpoint's optimizer state, whichever way it was written.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if (checkpoint / OPTIMIZER).is_file():
        return OptimizerFile(checkpoint / OPTIMIZER)
    if any(checkpoint.glob("global_step*")):
        from llava_ft.checkpoint.zero.optimizer import ZeroOptimizer

        return ZeroOptimizer(checkpoint)
    raise CheckpointError(
        f"{checkpoint} holds no optimizer state: it was written with --save_only_model. Start a new run from its "
        "weights with --lora_weight_path, --pretrain_mm_mlp_adapter or --model_name_or_path."
    )


def _mapping(value: Any) -> dict[str, Any]:
    """Return a dictionary, or an empty one for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
