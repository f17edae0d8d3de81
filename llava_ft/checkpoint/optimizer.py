"""Optimizer state on disk, by name of parameter: what makes a run continue on any number of ranks and ZeRO stage.

A run without ZeRO writes `optimizer.pt`. Under ZeRO each rank writes its own part in DeepSpeed's format
(`global_stepN/`). Either way state is asked for by parameter and range of elements, so a rank reads what it needs and
nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch

from llava_ft.checkpoint.names import OPTIMIZER, plain_name
from llava_ft.checkpoint.pickles import dict_or_empty, load_pickle
from llava_ft.checkpoint.zero.files import find_step_directory, read_states
from llava_ft.checkpoint.zero.layout import FLAT_1_2, FLAT_3, OPTIMIZER_STATE, Part
from llava_ft.checkpoint.zero.shards import ZeroShards
from llava_ft.errors import CheckpointError

FORMAT = "llava_ft optimizer 1"
"""Value of `format` in `optimizer.pt`."""

State = Mapping[str, Any]
"""What an optimizer holds of one parameter, such as `step`, `exp_avg` and `exp_avg_sq`."""

Place = tuple[str, int, int, int]
"""Part of a parameter in a vector: its name, first element, number of elements, and where in the vector it begins."""

_Vector = tuple[Path, int]
"""A rank's file, and the number of a vector in it."""


class SavedOptimizer(ABC):
    """The state of an optimizer, by plain name of parameter.

    Attributes:
        path: File or directory, for messages.
        sizes: Number of elements of each parameter that state is held of.
    """

    path: Path
    sizes: Mapping[str, int]

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
        return _vectors_among(self.states[name], self.sizes[name]) if self.sizes[name] > 1 else ()

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:  # noqa: D102 - inherited
        return self.states[name][moment].reshape(-1)[start : start + length]


class ZeroOptimizer(SavedOptimizer):
    """The optimizer state in a `global_stepN` directory, one file a rank.

    The moments are vectors laid out like the float32 weights beside them, so where a parameter lies among the weights
    (`zero/layout.py`) it lies among the moments.

    Raises:
        CheckpointError: A rank's file is missing, damaged or of another run.
    """

    def __init__(self, checkpoint: Path):
        self.path = find_step_directory(checkpoint)
        shards = ZeroShards.open(self.path)
        self._parts = {plain_name(name): tensor.parts for name, tensor in shards.trained.items()}
        self.sizes = {name: sum(part.length for part in parts) for name, parts in self._parts.items()}
        weights, states = (FLAT_3, OPTIMIZER_STATE) if shards.stage == 3 else (FLAT_1_2, "base_optimizer_state")
        self._states: dict[_Vector, State] = {}
        self._lengths: dict[_Vector, int] = {}
        for file in {part.file for parts in self._parts.values() for part in parts}:
            content = read_states(file)[OPTIMIZER_STATE]
            self._lengths |= {(file, index): int(vector.numel()) for index, vector in enumerate(content[weights])}
            for index, state in content[states]["state"].items():
                # bitsandbytes writes what it quantised as a dictionary inside; here it is brought to one level.
                flat: dict[str, Any] = {}
                for key, value in state.items():
                    flat |= cast("dict[str, Any]", value) if isinstance(value, dict) else {key: value}
                self._states[file, int(index)] = flat
        self._vectors: dict[_Vector, list[Place]] = {}
        for name in sorted(self._parts):
            for part, begin in self._placed(name):
                self._vectors.setdefault(_vector(part), []).append((name, begin, part.length, part.start))

    def state(self, name: str) -> State:  # noqa: D102 - inherited
        return self._states.get(_vector(self._parts[name][0]), {})

    def moments(self, name: str) -> tuple[str, ...]:  # noqa: D102 - inherited
        return _vectors_among(self.state(name), self._lengths[_vector(self._parts[name][0])], or_longer=True)

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:  # noqa: D102 - inherited
        pieces: list[torch.Tensor] = []
        for part, begin in self._placed(name):
            first, last = max(start, begin), min(start + length, begin + part.length)
            if first < last:
                offset = part.start + first - begin
                pieces.append(self._states[_vector(part)][moment].reshape(-1)[offset : offset + last - first])
        return torch.cat(pieces)

    def whole_vector(self, places: Sequence[Place]) -> State | None:  # noqa: D102 - inherited
        wanted = sorted(places)
        vector = next((vector for vector, held in self._vectors.items() if held == wanted), None)
        return None if vector is None else self._states.get(vector)

    def _placed(self, name: str) -> Iterator[tuple[Part, int]]:
        """Yield the parts of a parameter, each with the element of the parameter that it begins with."""
        parts = self._parts[name]
        return zip(parts, accumulate((part.length for part in parts), initial=0), strict=False)


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
        return ZeroOptimizer(checkpoint)
    raise CheckpointError(
        f"{checkpoint} holds no optimizer state: it was written with --save_only_model. Start a new run from its "
        "weights with --lora_weight_path, --pretrain_mm_mlp_adapter or --model_name_or_path."
    )


def _vector(part: Part) -> _Vector:
    return part.file, int(part.keys[-1])


def _vectors_among(state: State, size: int, *, or_longer: bool = False) -> tuple[str, ...]:
    """Names of what has one value for each element; ZeRO's moments keep the padding that the weights leave out."""
    return tuple(
        key
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() > 0
        and (value.numel() == size or (or_longer and value.numel() > size))
    )
