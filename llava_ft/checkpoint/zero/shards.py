"""Whole tensors from the files that DeepSpeed writes at a step, under any ZeRO stage and number of ranks.

Neither DeepSpeed nor a GPU is needed. Everything is checked before a value is read, and then one tensor at a time is
put together in memory (`layout.py` says of which parts). Stage 0 divides nothing: the model file holds all values,
in the precision the run computed in. Under the other stages trained parameters are the optimizer's float32 copies.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from llava_ft.checkpoint.pickles import dict_or_empty
from llava_ft.checkpoint.zero.files import StepFiles, find_step_files, read_states
from llava_ft.checkpoint.zero.layout import (
    FLAT_1_2,
    FLAT_3,
    FROZEN_SHAPES,
    OPTIMIZER_STATE,
    Shape,
    ShardedTensor,
    plan_frozen_of_stage_3,
    plan_stage_3,
    plan_stages_1_2,
    plan_whole,
)
from llava_ft.errors import CheckpointError

_BYTES_PER_MAPPING = 2**30
_COMPUTED = "The trained weights are those of the model file, in the precision the run computed in."


@dataclass
class ZeroShards:
    """The tensors of one step, read lazily."""

    directory: Path
    stage: int  # of ZeRO; 0 when nothing is divided
    num_ranks: int  # among which the trained parameters are divided
    step: int
    version: str  # of DeepSpeed; "" if unknown
    trained: dict[str, ShardedTensor]
    """The trained parameters, in DeepSpeed's order. Empty under stage 0, which does not say which they are."""
    others: dict[str, ShardedTensor]
    """Everything else that is there: frozen parameters and buffers; under stage 0 all parameters."""
    shared: dict[str, str] = field(default_factory=dict[str, str])
    """Second names of parameters, with the name under which the value is kept."""
    num_optimized: int = 0  # number of parameters that the optimizer had, under stage 0; 0 if unknown
    notes: list[str] = field(default_factory=list[str])  # what is missing or less exact

    @classmethod
    def open(cls, directory: Path, *, from_model_states: bool = False) -> "ZeroShards":
        """Find out what the files of a step hold, and check that they are complete and belong together.

        Args:
            directory: A `global_stepN`.
            from_model_states: Under stages 1 and 2, take the trained parameters from the model file, in the precision
                the run computed in. The optimizer files are not looked at.

        Raises:
            CheckpointError: A file is missing, damaged, of another run, or of a kind that cannot be read.
        """
        files = find_step_files(directory)
        models = _read_models(files)
        first = min(models)
        model, file = models[first], files.model[first]
        origin: dict[str, Any] = {
            "step": int(model.get("global_steps") or 0),
            "version": str(model.get("ds_version") or ""),
        }
        if model["param_shapes"] is None:  # stage 0: the optimizer is torch's own or one around it
            halves = [value for value in model["module"].values() if value.dtype in (torch.bfloat16, torch.float16)]
            optimizer: dict[str, Any] = model.get("optimizer") or {}
            groups: list[dict[str, Any]] = optimizer.get(OPTIMIZER_STATE, optimizer).get("param_groups", [])
            if "fp32_groups_flat" in optimizer:  # there each group is one parameter to the optimizer
                groups = []
            return cls(
                directory,
                stage=0,
                num_ranks=1,
                trained={},
                others=plan_whole(file, model["module"]),
                num_optimized=sum(len(group["params"]) for group in groups),
                notes=[_COMPUTED] if halves else [],
                **origin,
            )
        groups_of_shapes: list[dict[str, Shape]] = [
            {name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]
        ]
        shapes = {name: shape for group in groups_of_shapes for name, shape in group.items()}
        notes: list[str] = []
        if from_model_states:
            if files.is_divided:
                raise CheckpointError(
                    f"{directory} is of stage 3, whose model files hold no trained weights: they are in the optimizer "
                    "files alone. Leave --from-model-states out."
                )
            stage, num_ranks = 1, 1
            others = plan_whole(file, model["module"])
            missing = [name for name, shape in shapes.items() if name not in others or others[name].shape != shape]
            if missing:
                raise CheckpointError(f"{file} does not hold {missing[0]}, although it was trained.")
            trained = {name: others[name] for name in shapes}
            notes.append(_COMPUTED)
        else:
            stage, states = _read_optimizers(files, models)
            num_ranks = len(states)
            if stage != 3:
                trained = plan_stages_1_2(files, states, groups_of_shapes)
                others = plan_whole(file, model["module"])
            else:
                trained = plan_stage_3(files, states, shapes)
                others = plan_whole(file, {name: model["module"][name] for name in model.get("buffer_names") or ()})
                absent = [rank for rank in states if rank not in models]
                if not absent:
                    others |= plan_frozen_of_stage_3(files, models)
                elif model.get(FROZEN_SHAPES):
                    notes.append(
                        f"zero_pp_rank_{absent[0]}_mp_rank_00_model_states.pt is missing, so the frozen parameters are "
                        "not whole and are left out."
                    )
        shared: dict[str, str] = dict(model.get("shared_params") or {})
        others = {name: entry for name, entry in others.items() if name not in trained and name not in shared}
        return cls(directory, stage, num_ranks, trained=trained, others=others, shared=shared, notes=notes, **origin)

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and whole tensors in memory of their own: float32, but for tensors of integers.

        Files are mapped, and mapped anew after a limited number of bytes, so pages that were read do not pile up.

        Args:
            names: The tensors wanted; all when absent, the trained ones first.
        """
        every = self.trained | self.others
        contents: dict[Path, dict[str, Any]] = {}
        num_bytes = 0
        for name in every if names is None else names:
            values: list[torch.Tensor] = []
            for part in every[name].parts:
                if part.file not in contents:
                    contents[part.file] = read_states(part.file)
                found = cast("Any", contents[part.file])
                for key in part.keys:
                    found = found[key]
                values.append(found.detach().reshape(-1)[part.start : part.start + part.length])
            whole = (torch.cat(values) if values else torch.empty(0)).reshape(every[name].shape)
            yield name, whole.to(every[name].dtype)
            num_bytes += whole.nbytes
            if num_bytes >= _BYTES_PER_MAPPING:
                del values
                contents.clear()
                num_bytes = 0


def _read_models(files: StepFiles) -> dict[int, dict[str, Any]]:
    if not files.model:
        is_stage_3 = any(FLAT_3 in _optimizer_state(path) for path in list(files.optimizer.values())[:1])
        name = ("zero_pp_rank_0_" if is_stage_3 else "") + "mp_rank_00_model_states.pt"
        raise CheckpointError(
            f"{files.directory / name} is missing. It holds the names and shapes of the parameters, without which the "
            "other files are numbers without meaning. Copy it from the machine that wrote it."
        )
    models = {rank: read_states(path) for rank, path in sorted(files.model.items())}
    first = min(models)
    for rank, content in models.items():
        if "module" not in content or "param_shapes" not in content:
            raise CheckpointError(f"{files.model[rank]} is no model file of a DeepSpeed run that trained something.")
        if content["param_shapes"] != models[first]["param_shapes"]:
            raise CheckpointError(
                f"{files.model[rank]} lists other parameters than {files.model[first].name}. Files of two runs lie in "
                "one directory; remove those of one."
            )
    return models


def _read_optimizers(
    files: StepFiles, models: Mapping[int, Mapping[str, Any]]
) -> tuple[int, dict[int, dict[str, Any]]]:
    """Return the stage and the optimizer state of every rank, after checking that together they are of one save."""
    states = {rank: _optimizer_state(path) for rank, path in sorted(files.optimizer.items())}
    counts = {rank: _partition_count(state) for rank, state in states.items()}
    ranks = max((int(model.get("dp_world_size") or 0) for model in models.values()), default=0)
    ranks = ranks or max(counts.values(), default=1)
    for rank in range(ranks):
        if rank not in states:
            prefix = "bf16_" if any(path.name.startswith("bf16_") for path in files.optimizer.values()) else ""
            advice = (
                " If it is lost, --from-model-states takes the trained weights from the model file, in the precision "
                "the run computed in."
            )
            raise CheckpointError(
                f"{files.directory}/{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt is missing: of {ranks} "
                f"optimizer files, one for each rank, {len(files.optimizer)} are there. Each holds a part of the "
                f"trained weights; copy it from that rank's machine.{'' if files.is_divided else advice}"
            )
    for rank, count in counts.items():
        if rank >= ranks or count != ranks:
            raise CheckpointError(
                f"{files.optimizer[rank]} is rank {rank} of {count}, but by the model file the run had {ranks}. It is "
                "of another run; remove what is not of this one."
            )
    steps: dict[int, float] = {}
    for rank, state in states.items():  # by the optimizer's own count, if it keeps one
        inner = dict_or_empty(state.get("base_optimizer_state") or state.get(OPTIMIZER_STATE))
        entries: list[dict[str, Any]] = [*inner.get("state", {}).values(), *inner.get("param_groups", [])]
        if counted := [float(entry["step"]) for entry in entries if "step" in entry]:
            steps[rank] = counted[0]
    if len(set(steps.values())) > 1:
        raise CheckpointError(
            f"The files in {files.directory} are of different steps: "
            + ", ".join(f"{files.optimizer[rank].name} of step {step:g}" for rank, step in steps.items())
            + ". Copy all files of one step, or use another with --tag."
        )
    # Stage 1 in bfloat16 with float32 gradients does not tell its stage.
    stages = {rank: int(state.get("zero_stage", 3 if FLAT_3 in state else 1)) for rank, state in states.items()}
    for rank, stage in stages.items():
        if stage != stages[0] or (stage == 3) != files.is_divided:
            raise CheckpointError(
                f"{files.optimizer[rank]} is of ZeRO stage {stage}, but files beside it are of another. Files of two "
                "runs lie in one directory; remove those of one."
            )
    return stages[0], states


def _optimizer_state(path: Path) -> dict[str, Any]:
    """Read a rank's optimizer state, without its record of where parameters lie where that is wrong."""
    content = read_states(path)
    state = dict_or_empty(content.get(OPTIMIZER_STATE))
    if FLAT_3 not in state and FLAT_1_2 not in state:
        raise CheckpointError(f"{path} is no optimizer file of a run with ZeRO.")
    if dict_or_empty(dict_or_empty(content.get("ds_config")).get("zero_optimization")).get("round_robin_gradients"):
        state.pop("param_slice_mappings", None)
    return state


def _partition_count(state: Mapping[str, Any]) -> int:
    count: Any = state.get("partition_count", 0)
    return max(cast("list[int]", count)) if isinstance(count, list) else int(count)
