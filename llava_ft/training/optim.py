"""Parameter groups of the optimizer, and the table that says what is trained and how, and what is quantised.

Groups follow LLaVA's: a part may have a learning rate of its own (`mm_projector_lr`), and only matrices decay.
Differs from LLaVA: there is no empty group. DeepSpeed drops empty groups, the learning rates then move up by one, and
the projector trains at the rate of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llava_ft.checkpoint.restore import whole_shape
from llava_ft.models.parts import Part, part_of
from llava_ft.terminal import columns
from llava_ft.tuning.plan import TuningPlan
from llava_ft.tuning.quant import dtype_name, is_quantized, size_in_memory


@dataclass
class TrainableRow:
    """One line of the table of what is trained."""

    part: Part
    tensors: int
    parameters: int  # number of values
    dtype: str  # of the master weights where they are trained
    learning_rate: float  # at its peak; 0 for what is frozen
    weight_decay: float
    bytes: int  # in memory, with the scales of quantised values
    trained: bool = True  # frozen values are listed in runs on quantised weights


def parameter_groups(
    model: nn.Module, plan: TuningPlan, *, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Divide the trainable parameters into groups by the plan's rates and decays, those with the run's own rate first.

    Args:
        model: The model; only parameters that require a gradient are taken.
        plan: What is trained.
        learning_rate: Rate of the parts that have none of their own.
        weight_decay: Decay of the matrices of parts that have none of their own.

    Returns:
        Groups for a torch optimizer, none of them empty, with the `names` of their parameters.
    """
    groups: dict[tuple[float | None, float | None], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate, decay = plan.rate_and_decay(name, len(whole_shape(parameter)))
        group = groups.setdefault(
            (rate, decay),
            {
                "params": [],
                "names": [],
                "lr": learning_rate if rate is None else rate,
                "weight_decay": weight_decay if decay is None else decay,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    # The order is that of the learning rates in a checkpoint's schedule.
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0] is not None, key[1] == 0.0))]


def parameter_table(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[TrainableRow]:
    """Summarise what is trained by part of the model, rate and decay; and what is frozen, if some of it is quantised.

    Args:
        model: The model.
        groups: Of `parameter_groups`.
    """
    listed = [
        (name, p, g["lr"], g["weight_decay"]) for g in groups for name, p in zip(g["names"], g["params"], strict=True)
    ]
    if any(is_quantized(module) for module in model.modules()):
        listed += [(name, p, 0.0, 0.0) for name, p in model.named_parameters() if not p.requires_grad]
    rows: dict[tuple[Any, ...], TrainableRow] = {}
    for name, parameter, rate, decay in listed:
        key = (part_of(name), dtype_name(parameter), rate, decay, parameter.requires_grad)
        row = rows.setdefault(key, TrainableRow(key[0], 0, 0, key[1], rate, decay, 0, parameter.requires_grad))
        values, num_bytes = size_in_memory(parameter)
        row.tensors += 1
        row.parameters += values
        row.bytes += num_bytes
    return list(rows.values())


def format_table(rows: Sequence[TrainableRow], model: nn.Module) -> str:
    """Return the table as text, with the share of the whole model below it."""
    header = ("part", "tensors", "parameters", "dtype", "MiB", "learning rate", "weight decay")
    cells = [
        (
            row.part,
            str(row.tensors),
            f"{row.parameters:,}",
            row.dtype,
            f"{row.bytes / 2**20:,.2f}",
            f"{row.learning_rate:g}" if row.trained else "frozen",
            f"{row.weight_decay:g}" if row.trained else "",
        )
        for row in rows
    ]
    trained = sum(row.parameters for row in rows if row.trained)
    total = sum(size_in_memory(parameter)[0] for parameter in model.parameters())
    summary = f"trained: {trained:,} of {total:,} parameters ({100 * trained / max(total, 1):.2f}%)"
    return "\n".join([*columns([header, *cells]), summary])
