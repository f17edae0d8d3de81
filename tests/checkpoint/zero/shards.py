"""Writes the files that DeepSpeed writes at a step, from their structure, without DeepSpeed.

The structure was read off files that DeepSpeed 0.9.5, 0.12.6, 0.14.5, 0.15.4 and 0.19.8 wrote. Classes of DeepSpeed are
pickled under their own names.
"""

import enum
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


class ZeroStageEnum(enum.IntEnum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:  # noqa: N801 - its name in DeepSpeed
    numel: int
    start: int


class LossScaler:
    def __init__(self, scale: float):
        self.cur_scale = scale
        self.dynamic = False
        self.dtype = torch.float16


_HOMES = {
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    fragment_address: "deepspeed.utils.tensor_fragment",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
}


@contextmanager
def named_as_in_deepspeed() -> Iterator[None]:
    """Let pickle find the classes of this module in modules of DeepSpeed's names."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "deepspeed"}
    for name in before:
        del sys.modules[name]
    for cls, home in _HOMES.items():
        parts = home.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        setattr(sys.modules[home], cls.__name__, cls)
        cls.__module__ = home
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
            del sys.modules[name]
        sys.modules.update(before)
        for cls in _HOMES:
            cls.__module__ = __name__


@dataclass
class Step:
    """What a run has in memory when it saves, and how it divides it.

    Attributes:
        groups: Trained parameters of each optimizer group, float32.
        frozen: Frozen parameters.
        buffers: Buffers.
        shared: Second names of parameters.
        stage: ZeRO stage.
        ranks: Number of ranks.
        dtype: Type the run computes in.
        step: Steps done.
        version: DeepSpeed's version.
        excludes_frozen: Whether frozen parameters are left out, as recent versions of Trainer ask for with LoRA.
        sub_group_size: Values after which stage 3 starts a new vector; None is one vector for each group.
        round_robin: Whether the parameters of stages 1 and 2 are dealt out in turn.
        alignment: Multiple at which the parameters of stages 1 and 2 begin.
        has_bf16_optimizer: Whether stage 1 runs with float32 gradients, as DeepSpeed's BF16_Optimizer does.
    """

    groups: Sequence[Tensors]
    frozen: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    stage: int = 2
    ranks: int = 2
    dtype: torch.dtype = torch.bfloat16
    step: int = 7
    version: str = "0.12.6"
    excludes_frozen: bool = False
    sub_group_size: int | None = None
    round_robin: bool = False
    alignment: int = 1
    has_bf16_optimizer: bool = False

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        return {name: value for group in self.groups for name, value in group.items()}

    def write(self, directory: Path) -> Path:
        """Write all files of all ranks."""
        directory.mkdir(parents=True)
        with named_as_in_deepspeed():
            if self.stage == 0:
                self._write_stage_0(directory)
            elif self.stage == 3:
                self._write_stage_3(directory)
            else:
                self._write_stages_1_2(directory)
        return directory

    def optimizer_file(self, rank: int) -> str:
        prefix = "bf16_" if self.dtype == torch.bfloat16 else ""
        return f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    def model_file(self, rank: int = 0) -> str:
        return (f"zero_pp_rank_{rank}_" if self.stage == 3 else "") + "mp_rank_00_model_states.pt"

    def _write_stage_0(self, directory: Path) -> None:
        parameters = list(self.trained.values())
        optimizer = torch.optim.AdamW([torch.nn.Parameter(value.clone()) for value in parameters])
        model = self._model(self._module(), None) | {"optimizer": optimizer.state_dict(), "shared_params": None}
        torch.save(model, directory / self.model_file())

    def _write_stages_1_2(self, directory: Path) -> None:
        groups = [self._ordered(group) for group in self.groups]
        shapes = [OrderedDict((name, value.shape) for name, value in group.items()) for group in groups]
        model = self._model(self._module(), shapes)
        if self.stage == 2 and not self.excludes_frozen:
            model["frozen_param_shapes"] = OrderedDict((name, value.shape) for name, value in self.frozen.items())
            model["frozen_param_fragments"] = OrderedDict(self._cast(self.frozen))
        torch.save(model, directory / self.model_file())
        gaps = [[-value.numel() % self.alignment for value in group.values()] for group in groups]
        for each in gaps:
            each[-1:] = [0]
        flat = [
            torch.cat([part for value, gap in zip(group.values(), gaps[i], strict=True) for part in _with(value, gap)])
            for i, group in enumerate(groups)
        ]
        for rank in range(self.ranks):
            partitions, paddings = [], []
            for vector in flat:
                length = -(-vector.numel() // (2 * self.ranks)) * 2
                held = vector[rank * length : (rank + 1) * length]
                paddings.append(length - held.numel())
                partitions.append(torch.cat([held, torch.zeros(length - held.numel())]))
            self._write_optimizer_1_2(
                directory, rank, partitions, paddings, gaps, self._fragments(rank, partitions, gaps)
            )

    def _write_optimizer_1_2(
        self,
        directory: Path,
        rank: int,
        partitions: list[torch.Tensor],
        paddings: list[int],
        gaps: list[list[int]],
        fragments: list[Any],
    ) -> None:
        moments = [{"step": torch.tensor(float(self.step)), "exp_avg": torch.ones_like(part)} for part in partitions]
        state: dict[str, Any] = {
            "clip_grad": 0.0,
            "base_optimizer_state": {"state": dict(enumerate(moments)), "param_groups": []},
            "partition_count": [self.ranks] * len(partitions),
            "group_paddings": paddings,
            "param_slice_mappings": fragments,
            "ds_version": self.version,
        }
        if self.has_bf16_optimizer:
            state["single_partition_of_fp32_groups"] = partitions
        else:
            state |= {
                "single_partition_of_fp32_groups": [
                    part[: part.numel() - padding].clone() for part, padding in zip(partitions, paddings, strict=True)
                ],
                "zero_stage": ZeroStageEnum(self.stage),
                "loss_scaler": LossScaler(1.0),
                "dynamic_loss_scale": False,
                "overflow": False,
            }
        if self.alignment > 1:
            state["param_alignment_paddings"] = gaps
        self._save_optimizer(directory, rank, state)

    def _write_stage_3(self, directory: Path) -> None:
        groups = list(self._sub_groups())
        shapes = [OrderedDict((name, value.shape) for name, value in group.items()) for group in groups]
        for rank in range(self.ranks):
            placeholders = {name: torch.empty(0, dtype=self.dtype) for name in [*self.trained, *self.frozen]}
            model = self._model(placeholders | dict(self.buffers), shapes)
            if not self.excludes_frozen:
                model["frozen_param_shapes"] = OrderedDict((name, value.shape) for name, value in self.frozen.items())
                model["frozen_param_fragments"] = {
                    name: self._share(value, rank) for name, value in self._cast(self.frozen).items()
                }
            if rank > 0:
                model["shared_params"] = {}
            torch.save(model, directory / self.model_file(rank))
            vectors = [torch.cat([self._share(value, rank) for value in group.values()]) for group in groups]
            moments = [{"step": torch.tensor(float(self.step)), "exp_avg": torch.ones_like(each)} for each in vectors]
            state = {
                "zero_stage": ZeroStageEnum.weights,
                "loss_scaler": LossScaler(1.0),
                "partition_count": self.ranks,
                "optimizer_state_dict": {"state": dict(enumerate(moments)), "param_groups": []},
                "fp32_flat_groups": vectors,
            }
            self._save_optimizer(directory, rank, state)

    def _save_optimizer(self, directory: Path, rank: int, state: dict[str, Any]) -> None:
        content = {"optimizer_state_dict": state, "ds_config": self._config(), "ds_version": self.version}
        torch.save(content, directory / self.optimizer_file(rank))

    def _sub_groups(self) -> Iterator[Tensors]:
        for group in self.groups:
            pending: dict[str, torch.Tensor] = {}
            count = 0
            for name, value in group.items():
                pending[name] = value
                count += -(-value.numel() // self.ranks)
                if self.sub_group_size is not None and count >= self.sub_group_size:
                    yield pending
                    pending, count = {}, 0
            if pending:
                yield pending

    def _ordered(self, group: Tensors) -> Tensors:
        if not self.round_robin:
            return group
        names = [name for rank in range(self.ranks) for name in list(group)[rank :: self.ranks]]
        return {name: group[name] for name in names}

    def _fragments(self, rank: int, partitions: list[torch.Tensor], gaps: list[list[int]]) -> list[Any]:
        """Where the parameters lie in a rank's part; with `round_robin` DeepSpeed goes by the wrong order."""
        found = []
        for index, group in enumerate(self.groups):
            length = partitions[index].numel()
            fragments: OrderedDict[str, fragment_address] = OrderedDict()
            offset = 0
            for (name, value), gap in zip(group.items(), gaps[index], strict=True):
                begin, end = max(offset, rank * length), min(offset + value.numel(), (rank + 1) * length)
                if begin < end:
                    fragments[name] = fragment_address(end - begin, begin - rank * length)
                offset += value.numel() + gap
            found.append(fragments)
        return found

    def _share(self, value: torch.Tensor, rank: int) -> torch.Tensor:
        length = -(-value.numel() // self.ranks)
        held = value.reshape(-1)[rank * length : (rank + 1) * length]
        return torch.cat([held, torch.full((length - held.numel(),), 9.0, dtype=value.dtype)])

    def _module(self) -> dict[str, torch.Tensor]:
        frozen = {} if self.excludes_frozen else self.frozen
        held = self._cast(self.trained) | self._cast(frozen)
        return held | {name: held[other] for name, other in self.shared.items()} | dict(self.buffers)

    def _cast(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def _config(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.stage, "round_robin_gradients": self.round_robin}}

    def _model(self, module: Mapping[str, torch.Tensor], shapes: list[Any] | None) -> dict[str, Any]:
        return {
            "module": OrderedDict(module),
            "buffer_names": list(self.buffers),
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": None,
            "shared_params": dict(self.shared),
            "frozen_param_fragments": None,
            "lr_scheduler": {"last_epoch": self.step, "lr_lambdas": [None]},
            "skipped_steps": 0,
            "global_steps": self.step,
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
            "ds_config": self._config(),
            "ds_version": self.version,
        }


def _with(value: torch.Tensor, gap: int) -> list[torch.Tensor]:
    return [value.reshape(-1), torch.zeros(gap)]


def edit(path: Path, change: Any) -> None:
    """Change the content of a file that DeepSpeed wrote; `change` gets the dictionary in it."""
    with named_as_in_deepspeed():
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)
