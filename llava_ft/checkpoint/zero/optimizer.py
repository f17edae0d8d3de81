"""The optimizer state in DeepSpeed's files, by name of parameter."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch

from llava_ft.checkpoint.names import plain_name
from llava_ft.checkpoint.optimizer import Place, SavedOptimizer, State, vectors_among
from llava_ft.checkpoint.zero.files import find_step_directory, read_states
from llava_ft.checkpoint.zero.layout import FLAT_1_2, FLAT_3, OPTIMIZER_STATE, Part
from llava_ft.checkpoint.zero.shards import ZeroShards

_Vector = tuple[Path, int]
"""A rank's file, and the number of a vector in it."""


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
        return vectors_among(self.state(name), self._lengths[_vector(self._parts[name][0])], or_longer=True)

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


def _vector(part: Part) -> _Vector:
    return part.file, int(part.keys[-1])
