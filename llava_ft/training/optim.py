"""Parameter groups of the optimizer, and the table that says what is trained and how.

Groups follow LLaVA's: the projector may have a learning rate of its own (`mm_projector_lr`), and only matrices decay.
Differs from LLaVA: there is no empty group. DeepSpeed drops empty groups, the learning rates then move up by one, and
the projector trains at the rate of the language model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from llava_ft.models.llava import part_of


@dataclass(frozen=True)
class TrainableRow:
    """One line of the table of what is trained.

    Attributes:
        part: Part of the model.
        tensors: Number of tensors.
        parameters: Number of values.
        dtype: Type of the values, the master weights.
        learning_rate: Peak rate.
        weight_decay: Decay per step and unit of learning rate.
    """

    part: str
    tensors: int
    parameters: int
    dtype: str
    learning_rate: float
    weight_decay: float


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, mm_projector_lr: float | None
) -> list[dict[str, Any]]:
    """Divide the trainable parameters into groups: decayed and not, the projector apart if it has its own rate.

    Args:
        model: The model; only parameters that require a gradient are taken.
        learning_rate: Rate of everything but the projector.
        weight_decay: Decay of matrices. Vectors (biases, norms) do not decay.
        mm_projector_lr: Rate of the projector; `learning_rate` when absent.

    Returns:
        Groups for a torch optimizer, none of them empty, with the `names` of their parameters.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for is_projector in (False, True):
        for decays in (True, False):
            rate = mm_projector_lr if is_projector and mm_projector_lr is not None else learning_rate
            groups[is_projector, decays] = {
                "params": [],
                "names": [],
                "lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
            }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        has_own_rate = mm_projector_lr is not None and part_of(name) == "projector"
        group = groups[has_own_rate, parameter.dim() >= 2]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def trainable_table(groups: Sequence[dict[str, Any]]) -> list[TrainableRow]:
    """Summarise parameter groups by part of the model, rate and decay."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            dtype = str(parameter.dtype).removeprefix("torch.")
            key = (part_of(name), dtype, group["lr"], group["weight_decay"])
            counts = rows.setdefault(key, [0, 0])
            counts[0] += 1
            counts[1] += parameter.numel()
    return [
        TrainableRow(part, tensors, values, dtype, rate, decay)
        for (part, dtype, rate, decay), (tensors, values) in rows.items()
    ]


def format_table(rows: Sequence[TrainableRow], num_parameters: int) -> str:
    """Return the table as text, with the share of the whole model below it.

    Args:
        rows: What is trained.
        num_parameters: Number of values of the whole model.
    """
    header = ("part", "tensors", "parameters", "dtype", "learning rate", "weight decay")
    cells = [
        (
            row.part,
            str(row.tensors),
            f"{row.parameters:,}",
            row.dtype,
            f"{row.learning_rate:g}",
            f"{row.weight_decay:g}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in [header, *cells]
    ]
    trained = sum(row.parameters for row in rows)
    share = 100 * trained / max(num_parameters, 1)
    return "\n".join([*lines, f"trained: {trained:,} of {num_parameters:,} parameters ({share:.2f}%)"])


def table_as_json(rows: Sequence[TrainableRow]) -> list[dict[str, Any]]:
    """Return the table for `trainable_parameters.json`."""
    return [asdict(row) for row in rows]
