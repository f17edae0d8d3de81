"""DeepSpeed's files of one step: finding them, and reading them without running anything that is in them.

A step is a directory, `global_stepN`. It holds for every rank an optimizer file
(`zero_pp_rank_R_mp_rank_00_optim_states.pt`, with `bf16_` before it where the run computes in bfloat16) and, once or
for every rank, a model file (`mp_rank_00_model_states.pt`; under stage 3 `zero_pp_rank_R_mp_rank_00_model_states.pt`).

The files are pickles that name classes of DeepSpeed. They are read by `pickles.py`: the classes of an allow-list
are replaced by inert stand-ins, so DeepSpeed need not be installed, and any other name is refused.
"""

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from llava_ft.checkpoint.pickles import load_pickle
from llava_ft.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEP = re.compile(r"global_step(\d+)")
_STATES = "*_states.pt"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


class Fragment:
    """Stands in for DeepSpeed's `fragment_address`: where a parameter's part lies in a flat partition."""

    numel: int
    start: int


class _Inert:
    """Stands in for an object whose content is of no use here, such as the scaler of a float16 loss."""

    def __init__(self, *_: Any):
        pass


_STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": Fragment,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Inert,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Inert,
}
"""All that the files of DeepSpeed 0.9 to 0.19 name besides tensors and builtin types."""


@dataclass
class StepFiles:
    """DeepSpeed's files of one step, by rank."""

    directory: Path
    optimizer: dict[int, Path] = field(default_factory=dict[int, Path])
    model: dict[int, Path] = field(default_factory=dict[int, Path])  # under stages 0 to 2 only that of rank 0
    is_divided: bool = False  # whether every rank wrote a model file of its own, as under stage 3


def find_step_directory(path: Path, tag: str | None = None) -> Path:
    """Find the directory that holds DeepSpeed's files, in a checkpoint or as the `global_stepN` in it.

    Without a `tag` it is the one that the file `latest` names, and without that file the newest.

    Raises:
        CheckpointError: There is none, or not the one asked for.
    """
    if not path.is_dir():
        reason = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {reason}. Give a checkpoint-N directory, or the global_stepN in it.")
    if any(path.glob(_STATES)):
        if tag is not None and tag != path.name:
            raise CheckpointError(f"{path} is itself a step, so --tag {tag} cannot be in it. Leave --tag out.")
        return path
    steps = _steps(path)
    if not steps:
        checkpoints = [entry.name for entry in sorted(path.glob("checkpoint-*")) if _steps(entry)]
        if checkpoints:
            raise CheckpointError(
                f"{path} is the output directory of a run. Give one of its checkpoints: {', '.join(checkpoints)}, such "
                f"as {path / checkpoints[-1]}."
            )
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} holds no files of DeepSpeed: neither a global_stepN with *_optim_states.pt and "
            f"*_model_states.pt, nor such files themselves. It holds {names}. A checkpoint of a run without DeepSpeed "
            "needs no consolidation."
        )
    if tag is None and (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8").strip()
    if tag is not None:
        if tag not in steps:
            raise CheckpointError(
                f"{path} holds no {tag} with DeepSpeed's files. It holds {', '.join(steps)}: choose with --tag."
            )
        return steps[tag]
    if len(steps) > 1:
        logger.info("%s has no file `latest`; of %s the newest is taken.", path, ", ".join(steps))
    return list(steps.values())[-1]


def find_step_files(directory: Path) -> StepFiles:
    """Sort DeepSpeed's files by what they hold and for which rank.

    Raises:
        CheckpointError: There are files of a kind of run that is not supported, or of two runs.
    """
    files = StepFiles(directory)
    for path in sorted(directory.glob(_STATES)):
        if match := _OPTIMIZER_FILE.fullmatch(path.name):
            rank = int(match[1])
            if rank in files.optimizer:
                raise CheckpointError(
                    f"{directory} holds both {files.optimizer[rank].name} and {path.name}: the files of a run in "
                    "bfloat16 and of another. Remove those of one run."
                )
            files.optimizer[rank] = path
        elif match := _MODEL_FILE.fullmatch(path.name):
            is_divided = match[1] is not None
            if files.model and is_divided != files.is_divided:
                raise CheckpointError(
                    f"{directory} holds model files of stage 3 (zero_pp_rank_...) and of another (mp_rank_00_...). "
                    "Remove those of one run."
                )
            files.model[int(match[1] or 0)] = path
            files.is_divided = is_divided
        if match is None or int(match[2]) != 0:
            raise CheckpointError(
                f"{path} belongs to a run with tensor, pipeline or expert parallelism. Only runs in which ranks divide "
                "nothing but data and ZeRO's partitions can be consolidated."
            )
    return files


def read_states(path: Path) -> dict[str, Any]:
    """Map one of DeepSpeed's files into memory.

    Raises:
        CheckpointError: It is missing, damaged, or names something that is not on the allow-list.
    """
    content = load_pickle(path, stand_ins=_STAND_INS)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; it is no file of a DeepSpeed checkpoint.")
    return cast("dict[str, Any]", content)


def _steps(path: Path) -> dict[str, Path]:
    """Steps in a checkpoint by name, the newest last; a directory of another name is listed first."""
    found = [entry for entry in path.iterdir() if entry.is_dir() and any(entry.glob(_STATES))]

    def order(entry: Path) -> tuple[int, str]:
        match = _STEP.fullmatch(entry.name)
        return (int(match[1]) if match else -1, entry.name)

    return {entry.name: entry for entry in sorted(found, key=order)}
