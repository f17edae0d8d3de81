"""The optimizer state that DeepSpeed's ZeRO wrote, one file a rank, asked for by parameter.

Stages 1 and 2 join a group's parameters into one vector and cut it into equal parts, one for each rank;
`param_slice_mappings` says where each parameter begins in a rank's part. Stage 3 gives each rank an equal part of every
parameter, the last one padded; a rank's parts follow each other in the order of `param_shapes`, over all its vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from llava_ft.checkpoint.optimizer import Place, SavedOptimizer, State
from llava_ft.checkpoint.restore import plain_name
from llava_ft.checkpoint.zero_files import find_step_directory, find_step_files, read_states
from llava_ft.errors import CheckpointError


@dataclass(frozen=True)
class _Part:
    """Some elements of a parameter in one of a rank's vectors."""

    rank: int
    vector: int
    offset: int
    start: int
    length: int


class ZeroOptimizer(SavedOptimizer):
    """The optimizer state in a `global_stepN` directory.

    Args:
        checkpoint: The directory that holds it.

    Raises:
        CheckpointError: A rank's file is missing or damaged.
    """

    def __init__(self, checkpoint: Path):
        self.path = find_step_directory(checkpoint)
        self._files = find_step_files(self.path)
        self._ranks = [read_states(path)["optimizer_state_dict"] for _, path in sorted(self._files.optimizer.items())]
        self._check_ranks()
        self.stage = int(self._ranks[0]["zero_stage"])

    @cached_property
    def _parts(self) -> Mapping[str, list[_Part]]:
        located = self._located_whole() if self.stage == 3 else self._located_slices()
        parts: dict[str, list[_Part]] = {}
        for name, part in located:
            parts.setdefault(plain_name(name), []).append(part)
        return parts

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {name: sum(part.length for part in parts) for name, parts in self._parts.items()}

    @property
    def sizes(self) -> Mapping[str, int]:  # noqa: D102 - inherited
        return self._sizes

    def moments(self, name: str) -> tuple[str, ...]:  # noqa: D102 - inherited
        part = self._parts[name][0]
        length = self._vector_length(part)
        state = self._state(part)
        return tuple(
            key
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() == length > 1
        )

    def read(self, name: str, moment: str, start: int, length: int) -> torch.Tensor:  # noqa: D102 - inherited
        pieces: list[torch.Tensor] = []
        for part in self._parts[name]:
            first, last = max(start, part.start), min(start + length, part.start + part.length)
            if first < last:
                offset = part.offset + first - part.start
                pieces.append(self._state(part)[moment].reshape(-1)[offset : offset + last - first])
        return torch.cat(pieces)

    def step(self, name: str) -> float | None:  # noqa: D102 - inherited
        step = self._state(self._parts[name][0]).get("step")
        return None if step is None else float(step)

    def is_divisible(self, name: str) -> bool:  # noqa: D102 - inherited
        state = self._state(self._parts[name][0])
        tensors = {key for key, value in state.items() if isinstance(value, torch.Tensor)}
        return tensors <= {"step", *self.moments(name)}

    def whole_vector(self, places: Sequence[Place]) -> State | None:  # noqa: D102 - inherited
        wanted = sorted(places)
        for (rank, vector), held in self._vectors.items():
            if held == wanted:
                return self._base_states(rank).get(vector)
        return None

    @cached_property
    def _vectors(self) -> Mapping[tuple[int, int], list[Place]]:
        vectors: dict[tuple[int, int], list[Place]] = {}
        for name, parts in self._parts.items():
            for part in parts:
                place = (name, part.start, part.length, part.offset)
                vectors.setdefault((part.rank, part.vector), []).append(place)
        return {key: sorted(held) for key, held in vectors.items()}

    def _check_ranks(self) -> None:
        count = self._ranks[0]["partition_count"] if self._ranks else 0
        count = max(count) if isinstance(count, list) else int(count)
        if not self._ranks or sorted(self._files.optimizer) != list(range(count)):
            raise CheckpointError(
                f"{self.path} was written by {count or 'some'} ranks, and holds optimizer files of "
                f"{len(self._ranks)}. Those of all ranks are needed; where each machine has a file system of its own, "
                "copy them together."
            )

    def _located_slices(self) -> Iterator[tuple[str, _Part]]:
        reached: dict[str, int] = {}
        for rank, content in enumerate(self._ranks):
            for vector, slices in enumerate(content["param_slice_mappings"]):
                for name, slice_ in slices.items():
                    start = reached.get(name, 0)
                    reached[name] = start + int(slice_.numel)
                    yield name, _Part(rank, vector, int(slice_.start), start, int(slice_.numel))

    def _located_whole(self) -> Iterator[tuple[str, _Part]]:
        shapes = [item for group in read_states(self._files.model[0])["param_shapes"] for item in group.items()]
        world_size = len(self._ranks)
        for rank, content in enumerate(self._ranks):
            lengths = [int(vector.numel()) for vector in content["fp32_flat_groups"]]
            vector = offset = 0
            for name, shape in shapes:
                size = int(torch.Size(shape).numel())
                length = -(-size // world_size)
                if offset == lengths[vector]:
                    vector, offset = vector + 1, 0
                if vector >= len(lengths) or offset + length > lengths[vector]:
                    raise CheckpointError(f"{self.path}: the sizes of its vectors and parameters do not fit together.")
                start = rank * length
                yield name, _Part(rank, vector, offset, start, max(0, min(length, size - start)))
                offset += length

    def _base_states(self, rank: int) -> Mapping[int, State]:
        content = self._ranks[rank]
        states = content["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]["state"]
        return {vector: _flat(state) for vector, state in states.items()}

    def _state(self, part: _Part) -> State:
        return self._base_states(part.rank).get(part.vector, {})

    def _vector_length(self, part: _Part) -> int:
        content = self._ranks[part.rank]
        if self.stage == 3:
            return int(content["fp32_flat_groups"][part.vector].numel())
        length = int(content["single_partition_of_fp32_groups"][part.vector].numel())
        return length + int(content["group_paddings"][part.vector])


def _flat(state: State) -> State:
    """Return a state on one level: bitsandbytes writes what it quantised of it as a dictionary inside."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        flat |= cast("dict[str, Any]", value) if isinstance(value, dict) else {key: value}
    return flat
