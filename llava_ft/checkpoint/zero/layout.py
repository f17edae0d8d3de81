"""Where each parameter lies in the shards that DeepSpeed's ZeRO writes.

Source: ZeRO (arXiv:1910.02054), section 5, for what is divided; the layout is that of DeepSpeed 0.9 to 0.19.

- Stages 1 and 2 lay the trained parameters of each optimizer group end to end, pad the vector to a multiple of twice
  the number of ranks, and give each rank an equal part of it, of which the file holds what is not padding.
- Stage 3 cuts every parameter into as many parts as there are ranks, each of ceil(size / ranks) values; a rank lays its
  parts end to end, in one vector for each sub-group.

The order of the parameters is that of `param_shapes` in the model file. A rank's own record of where its parts lie,
`param_slice_mappings`, serves as a check; with `round_robin_gradients` it follows another order and is wrong.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from llava_ft.checkpoint.zero.files import Fragment, StepFiles
from llava_ft.errors import CheckpointError

OPTIMIZER_STATE = "optimizer_state_dict"
FLAT_1_2 = "single_partition_of_fp32_groups"
FLAT_3 = "fp32_flat_groups"
FROZEN_SHAPES = "frozen_param_shapes"
FROZEN_PARTS = "frozen_param_fragments"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive values in a file."""

    file: Path
    keys: tuple[str | int, ...]  # the way to the tensor inside it
    start: int  # in the flat tensor
    length: int


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """A tensor and the parts it is made of, in order."""

    shape: Shape
    parts: tuple[Part, ...]
    dtype: torch.dtype = torch.float32  # that it is given out as: float32, but for integers


def plan_stages_1_2(
    files: StepFiles, states: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Shape]]
) -> dict[str, ShardedTensor]:
    """Lay each group's partitions end to end and cut the parameters out, one after the other.

    `states` is the optimizer state of every rank; `groups` are the shapes of the parameters of each optimizer group, in
    DeepSpeed's order.

    Raises:
        CheckpointError: The sizes do not fit together.
    """
    for rank, state in states.items():
        if len(state[FLAT_1_2]) != len(groups):
            raise CheckpointError(
                f"{files.optimizer[rank]} holds {len(state[FLAT_1_2])} groups of parameters, but the model file lists "
                f"{len(groups)}. They are of different runs."
            )
    planned: dict[str, ShardedTensor] = {}
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for index, group in enumerate(groups):
        partitions = [
            Part(files.optimizer[rank], (OPTIMIZER_STATE, FLAT_1_2, index), 0, states[rank][FLAT_1_2][index].numel())
            for rank in sorted(states)
        ]
        begins, needed, offset = dict[str, int](), 0, 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            begins[name] = offset
            needed = offset + prod(shape)
            offset = needed + padding
            planned[name] = ShardedTensor(shape, tuple(_cut(partitions, begins[name], prod(shape))))
        num_held = sum(partition.length for partition in partitions)
        alignment = 2 * len(states)
        if not needed <= num_held <= -(-offset // alignment) * alignment:
            raise CheckpointError(
                f"The optimizer files in {files.directory} hold {num_held} values for group {index}, but its "
                f"{len(group)} parameters have {needed}. The files are of different runs, or one is damaged."
            )
        first = 0  # value of the group that a rank's partition begins with
        for rank, partition in enumerate(partitions):
            records: Sequence[Mapping[str, Fragment]] = states[rank].get("param_slice_mappings") or ()
            for name, fragment in records[index].items() if records else ():
                inside = max(begins.get(name, -1), first)
                end = begins[name] + prod(group[name]) if name in group else -1
                if fragment.start != inside - first or inside + fragment.numel > end:
                    raise CheckpointError(
                        f"{files.optimizer[rank]} says that {name} begins at value {fragment.start} of its part, but "
                        "by the sizes of the other files it does not. A file of another rank or run lies under this "
                        "name, or one is damaged."
                    )
            first += partition.length
    return planned


def plan_stage_3(
    files: StepFiles, states: Mapping[int, Mapping[str, Any]], shapes: Mapping[str, Shape]
) -> dict[str, ShardedTensor]:
    """Walk through every rank's vectors in step; each parameter takes the same number of values from each.

    Raises:
        CheckpointError: The sizes do not fit together.
    """
    ranks = len(states)
    lengths = [group.numel() for group in states[0][FLAT_3]]
    for rank, state in states.items():
        if [group.numel() for group in state[FLAT_3]] != lengths:
            raise CheckpointError(
                f"{files.optimizer[rank]} holds other numbers of values than {files.optimizer[0].name}. The files are "
                "of different runs, or one is damaged."
            )
    vectors = {
        rank: [
            Part(files.optimizer[rank], (OPTIMIZER_STATE, FLAT_3, index), 0, length)
            for index, length in enumerate(lengths)
        ]
        for rank in range(ranks)
    }
    planned: dict[str, ShardedTensor] = {}
    offset = 0
    for name, shape in shapes.items():
        parts = [part for rank in range(ranks) for part in _cut(vectors[rank], offset, _own(shape, rank, ranks))]
        planned[name] = ShardedTensor(shape, tuple(parts))
        offset += -(-prod(shape) // ranks)
    if offset != sum(lengths):
        raise CheckpointError(
            f"The optimizer files in {files.directory} hold {sum(lengths)} values each, but {len(shapes)} parameters "
            f"divided among {ranks} ranks have {offset}. The files are of different runs, or the optimizer was "
            "offloaded to NVMe, where its values are not in these files."
        )
    return planned


def plan_frozen_of_stage_3(files: StepFiles, models: Mapping[int, Mapping[str, Any]]) -> dict[str, ShardedTensor]:
    """Put the frozen parameters together, of which every rank's model file holds a part.

    Raises:
        CheckpointError: A rank holds less than its part.
    """
    ranks = len(models)
    planned: dict[str, ShardedTensor] = {}
    sizes: Mapping[str, Shape] = models[0].get(FROZEN_SHAPES) or {}
    for name, size in sizes.items():
        shape = tuple(size)
        parts: list[Part] = []
        for rank, model in models.items():
            own = _own(shape, rank, ranks)
            if name not in model[FROZEN_PARTS] or model[FROZEN_PARTS][name].numel() < own:
                raise CheckpointError(f"{files.model[rank]} lacks its part of {name}. It is damaged or of another run.")
            parts.append(Part(files.model[rank], (FROZEN_PARTS, name), 0, own))
        planned[name] = ShardedTensor(shape, tuple(parts), _given_dtype(models[0][FROZEN_PARTS][name]))
    return planned


def plan_whole(file: Path, module: Mapping[str, Any]) -> dict[str, ShardedTensor]:
    """Describe tensors that are whole in a model file."""
    return {
        name: ShardedTensor(tuple(value.shape), (Part(file, ("module", name), 0, value.numel()),), _given_dtype(value))
        for name, value in module.items()
        if isinstance(value, torch.Tensor)
    }


def _given_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype


def _own(shape: Shape, rank: int, ranks: int) -> int:
    """Values that a rank holds of a parameter under stage 3, without padding."""
    share = -(-prod(shape) // ranks)
    return max(0, min(share, prod(shape) - rank * share))


def _cut(vectors: Sequence[Part], start: int, length: int) -> Iterator[Part]:
    """Yield the parts in which `length` values from `start` on lie, in vectors that are laid end to end."""
    first = 0
    for vector in vectors:
        begin, end = max(start, first), min(start + length, first + vector.length)
        if end > begin:
            yield Part(vector.file, vector.keys, begin - first, end - begin)
        first += vector.length
