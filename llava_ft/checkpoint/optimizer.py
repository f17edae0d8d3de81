"""Optimizer state on disk, by name of parameter: what makes a run continue on any number of ranks and ZeRO stage.

A run without ZeRO writes `optimizer.pt`. Under ZeRO each rank writes its own part in DeepSpeed's format
(`global_stepN/`). Either way state is asked for by parameter and range of elements, so a rank reads what it needs and
nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from llava_ft.checkpoint.pickles import dict_or_empty, load_pickle
from llava_ft.errors import CheckpointError

FORMAT = "llava_ft optimizer 1"
"""Value of `format` in `optimizer.pt`."""

State = Mapping[str, Any]
"""What an optimizer holds of one parameter, such as `step`, `exp_avg` and `exp_avg_sq`."""

Place = tuple[str, int, int, int]
"""Part of a parameter in a vector: its name, first element, number of elements, and where in the vector it begins."""


class SavedOptimizer(ABC):
    """The state of an optimizer, by plain name of parameter."""

    path: Path  # file or directory, for messages
    sizes: Mapping[str, int]  # number of elements of each parameter that state is held of

    @abstractmethod
    def state(self, name: str) -> State:
        """Return all state of a parameter, or of the vector that it begins in."""

    @abstractmethod
    def moments(self, name: str) -> tuple[str, ...]:
        """Names of the state that has one value for each element, such as `exp_avg`."""

    @abstractmethod
    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:
        """Return `(length,)` values of a parameter's state, from element `start` of the flattened parameter."""

    def step(self, name: str) -> float | None:
        """Number of updates the parameter had, if the optimizer counts them."""
        step = self.state(name).get("step")
        return None if step is None else float(step)

    def is_divisible(self, name: str) -> bool:
        """Whether all state has one value for each element. That of 8-bit optimizers is in blocks and has not."""
        tensors = {key for key, value in self.state(name).items() if isinstance(value, torch.Tensor)}
        return tensors <= {"step", *self.moments(name)}

    def whole_vector(self, places: Sequence[Place]) -> State | None:
        """Return the state of the vector made of exactly these parts of parameters, if there is one."""
        return None


class OptimizerFile(SavedOptimizer):
    """`optimizer.pt`: the state of a run whose ranks hold all of it.

    Raises:
        CheckpointError: It is damaged or of another format.
    """

    def __init__(self, path: Path):
        self.path = path
        content = dict_or_empty(load_pickle(path))
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} does not hold its state by name of parameter, so another program wrote it. Start a new run "
                "from the trained weights with --lora_weight_path, --pretrain_mm_mlp_adapter or --model_name_or_path."
            )
        self.states = {name: dict_or_empty(state) for name, state in dict_or_empty(content.get("state")).items()}
        self.sizes = cast("dict[str, int]", dict_or_empty(content.get("sizes")))
        if self.sizes.keys() != self.states.keys():
            raise CheckpointError(f"{path} does not hold the state of each parameter. Resume from another checkpoint.")

    def state(self, name: str) -> State:  # noqa: D102 - inherited
        return self.states[name]

    def moments(self, name: str) -> tuple[str, ...]:  # noqa: D102 - inherited
        return vectors_among(self.states[name], self.sizes[name]) if self.sizes[name] > 1 else ()

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:  # noqa: D102 - inherited
        return self.states[name][moment].reshape(-1)[start : start + length]


def write_optimizer_file(path: Path, states: Mapping[str, State], sizes: Mapping[str, int]) -> None:
    """Write `optimizer.pt`."""
    torch.save({"format": FORMAT, "state": dict(states), "sizes": dict(sizes)}, path)


def vectors_among(state: State, size: int, *, or_longer: bool = False) -> tuple[str, ...]:
    """Names of what has one value for each element; ZeRO's moments keep the padding that the weights leave out."""
    return tuple(
        key
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() > 0
        and (value.numel() == size or (or_longer and value.numel() > size))
    )
