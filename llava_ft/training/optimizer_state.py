"""Saving the optimizer's state by name of parameter, and restoring it on any number of ranks and ZeRO stage."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from llava_ft.checkpoint.optimizer import OptimizerFile, SavedOptimizer, State, write_optimizer_file
from llava_ft.checkpoint.pickles import load_pickle
from llava_ft.errors import CheckpointError, some_of
from llava_ft.training.fragments import Fragment, fragments_of, trained_parameters


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Write the state of an optimizer that is not divided.

    Args:
        optimizer: The optimizer, without wrappers.
        model: The model whose parameters it updates.
        path: The file.
    """
    parameters = trained_parameters(model)
    states = {name: dict(optimizer.state.get(parameter, {})) for name, parameter in parameters.items()}
    write_optimizer_file(path, states, {name: parameter.numel() for name, parameter in parameters.items()})


def load_optimizer(
    saved: SavedOptimizer, optimizer: torch.optim.Optimizer, model: nn.Module, zero_optimizer: Any = None
) -> None:
    """Restore the optimizer's state; parameters and their sizes have to be the same, ranks and stage need not.

    Args:
        saved: The state.
        optimizer: The optimizer, without wrappers.
        model: The model whose parameters it updates.
        zero_optimizer: DeepSpeed's optimizer, where it divides the state.

    Raises:
        CheckpointError: The state is of other parameters, or cannot be divided in another way.
    """
    _check_parameters(saved, model)
    if zero_optimizer is None and isinstance(saved, OptimizerFile):
        _load_whole(saved, optimizer, model)
        return
    flats: dict[int, list[Fragment]] = {}
    for fragment in fragments_of(model, zero_optimizer):
        flats.setdefault(id(fragment.flat), []).append(fragment)
    for fragments in flats.values():
        places = [(f.name, f.start, f.length, f.offset) for f in fragments]
        flat, whole = fragments[0].flat, saved.whole_vector(places)
        state = _divided_state(saved, optimizer, fragments) if whole is None else _on_device(whole, flat.device)
        optimizer.state[flat] = count_where_it_is_read(state, optimizer, flat.device)


def restore_schedule(scheduler: LRScheduler, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore the position in the schedule, and the rates that belong to it.

    The rates are those of the run at hand: its schedule may be longer than the one that the checkpoint was made with,
    and its learning rates others.

    Args:
        scheduler: The schedule of this run.
        optimizer: The optimizer whose groups it sets.
        path: `scheduler.pt` of the checkpoint.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so the learning rates cannot be continued. Use another checkpoint.")
    rates = list(scheduler.base_lrs)
    scheduler.load_state_dict(load_pickle(path))
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = rates
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _check_parameters(saved: SavedOptimizer, model: nn.Module) -> None:
    here = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in trained_parameters(model).items()}
    missing = [name for name in here if name not in saved.sizes]
    unexpected = [name for name in saved.sizes if name not in here]
    resized = [
        f"{name} has {saved.sizes[name]} values in it and {size} here"
        for name, size in here.items()
        if name in saved.sizes and saved.sizes[name] != size
    ]
    if missing or unexpected or resized:
        raise CheckpointError(
            f"The optimizer state in {saved.path} is of another run. "
            + (f"Trained here but not in it: {some_of(missing)}. " if missing else "")
            + (f"In it but not trained here: {some_of(unexpected)}. " if unexpected else "")
            + (f"{some_of(resized, 2)}. " if resized else "")
            + "Use the flags the checkpoint was made with, or a new output_dir."
        )


def _load_whole(saved: OptimizerFile, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Restore as the optimizer's own class does, which knows where it keeps what."""
    names = {parameter: name for name, parameter in trained_parameters(model).items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: dict(saved.states[name]) for index, name in enumerate(order) if saved.states[name]}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _divided_state(
    saved: SavedOptimizer, optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment]
) -> dict[str, Any]:
    """Put together the state of one tensor that the optimizer updates."""
    flat = fragments[0].flat
    state: dict[str, Any] = {}
    for fragment in fragments:
        if not saved.is_divisible(fragment.name):
            raise CheckpointError(
                f"The optimizer state in {saved.path} is in blocks, as 8-bit optimizers keep it, which cannot "
                "be divided among the ranks in another way. Resume with the number of ranks and the ZeRO stage that "
                "the checkpoint was made with, or start a new run from its weights."
            )
        for moment in saved.moments(fragment.name):
            values = state.setdefault(moment, torch.zeros_like(flat, requires_grad=False))
            fragment.of(values).copy_(saved.read(fragment.name, moment, fragment.start, fragment.length))
    steps = {saved.step(fragment.name) for fragment in fragments}
    if len(steps) > 1:
        raise CheckpointError(
            f"{saved.path}: parameters that are updated together here have had different numbers of steps ({steps}). "
            "Resume with the number of ranks and the ZeRO stage that the checkpoint was made with."
        )
    step = steps.pop()
    if step is not None:
        # torch counts in a tensor; DeepSpeed's and bitsandbytes' own optimizers count in an integer.
        counts_in_tensor = type(optimizer).__module__.startswith("torch.optim")
        state["step"] = torch.tensor(step) if counts_in_tensor else int(step)
    return state


def count_where_it_is_read(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Put the count of steps where the optimizer's kernel reads it: a fused one on the device, others on the host.

    Args:
        state: Of one tensor; it is changed.
        optimizer: The optimizer.
        device: Where the tensor is.
    """
    step = state.get("step")
    if isinstance(step, torch.Tensor):
        is_on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = step.to(device if is_on_device else "cpu", torch.float32)
    return state


def _on_device(state: State, device: torch.device) -> dict[str, Any]:
    """Copy the state of a vector; counters stay where they are."""
    return {
        key: value.to(device, copy=True) if isinstance(value, torch.Tensor) and value.dim() else copy.copy(value)
        for key, value in state.items()
    }
