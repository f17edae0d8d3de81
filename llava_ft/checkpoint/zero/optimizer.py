"""The optimizer state that DeepSpeed's ZeRO wrote, one file a rank, asked for by parameter.

The optimizer's moments are vectors laid out like the float32 weights beside them, so where a parameter lies among the
weights (`zero_layout.py`) it lies among the moments.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch

from llava_ft.checkpoint.optimizer import Place, SavedOptimizer, State
from llava_ft.checkpoint.restore import plain_name
from llava_ft.checkpoint.zero.files import find_step_directory, read_states
from llava_ft.checkpoint.zero.layout import FLAT_1_2, FLAT_3, OPTIMIZER, Part
from llava_ft.checkpoint.zero.shards import ZeroShards

_Vector = tuple[Path, int]
"""A rank's file, and the number of a vector in it."""

_STAGES_1_2 = (FLAT_1_2, "base_optimizer_state")
_STAGE_3 = (FLAT_3, OPTIMIZER)
"""Where a rank's file holds the weights, and the optimizer's state."""


class ZeroOptimizer(SavedOptimizer):
    """The optimizer state in a `global_stepN` directory.

    Args:
        checkpoint: The directory that holds it.

    Raises:
        CheckpointError: A rank's file is missing, damaged or of another run.
    """

    def __init__(self, checkpoint: Path):
        self.path = find_step_directory(checkpoint)
        shards = ZeroShards.open(self.path)
        self._parts = {plain_name(name): tensor.parts for name, tensor in shards.trained.items()}
        self._states: dict[_Vector, State] = {}
        self._lengths: dict[_Vector, int] = {}
        for file in {part.file for parts in self._parts.values() for part in parts}:
            self._read(file, _STAGE_3 if shards.stage == 3 else _STAGES_1_2)

    def _read(self, file: Path, keys: tuple[str, str]) -> None:
        content = read_states(file)[OPTIMIZER]
        for index, vector in enumerate(content[keys[0]]):
            self._lengths[file, index] = int(vector.numel())
        for index, state in content[keys[1]]["state"].items():
            self._states[file, int(index)] = _flat(state)

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {name: sum(part.length for part in parts) for name, parts in self._parts.items()}

    @property
    def sizes(self) -> Mapping[str, int]:  # noqa: D102 - inherited
        return self._sizes

    def moments(self, name: str) -> tuple[str, ...]:  # noqa: D102 - inherited
        vector = _vector(self._parts[name][0])
        return tuple(
            key
            for key, value in self._states.get(vector, {}).items()
            if isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.dim() > 0
            and value.numel() >= self._lengths[vector]  # the moments keep the padding that the weights leave out
        )

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:  # noqa: D102 - inherited
        pieces: list[torch.Tensor] = []
        for part, begin in self._placed(name):
            first, last = max(start, begin), min(start + length, begin + part.length)
            if first < last:
                offset = part.start + first - begin
                pieces.append(self._states[_vector(part)][moment].reshape(-1)[offset : offset + last - first])
        return torch.cat(pieces)

    def step(self, name: str) -> float | None:  # noqa: D102 - inherited
        step = self._state(name).get("step")
        return None if step is None else float(step)

    def is_divisible(self, name: str) -> bool:  # noqa: D102 - inherited
        tensors = {key for key, value in self._state(name).items() if isinstance(value, torch.Tensor)}
        return tensors <= {"step", *self.moments(name)}

    def whole_vector(self, places: Sequence[Place]) -> State | None:  # noqa: D102 - inherited
        wanted = sorted(places)
        vector = next((vector for vector, held in self._vectors.items() if held == wanted), None)
        return None if vector is None else self._states.get(vector)

    @cached_property
    def _vectors(self) -> Mapping[_Vector, list[Place]]:
        vectors: dict[_Vector, list[Place]] = {}
        for name in self._parts:
            for part, begin in self._placed(name):
                vectors.setdefault(_vector(part), []).append((name, begin, part.length, part.start))
        return {key: sorted(held) for key, held in vectors.items()}

    def _placed(self, name: str) -> Iterator[tuple[Part, int]]:
        """Yield the parts of a parameter, each with the element of the parameter that it begins with."""
        parts = self._parts[name]
        return zip(parts, accumulate((part.length for part in parts), initial=0), strict=False)

    def _state(self, name: str) -> State:
        return self._states.get(_vector(self._parts[name][0]), {})


def _vector(part: Part) -> _Vector:
    return part.file, int(part.keys[-1])


def _flat(state: State) -> State:
    """Return a state on one level: bitsandbytes writes what it quantised of it as a dictionary inside."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat |= cast("dict[str, Any]", value) if isinstance(value, dict) else {key: value}
    return flat
