"""Where the values of a trained parameter are, whatever divides them.

Without DeepSpeed every rank holds each parameter whole. ZeRO (arXiv:1910.02054) keeps float32 master values and the
optimizer's state in flat vectors that are divided among the ranks: stages 1 and 2 join the parameters of a group and
cut the result, so a parameter may begin on one rank and end on another; stage 3 gives each rank an equal part of every
parameter. A `Fragment` says which elements of a parameter this rank's optimizer holds, and where.

What is read here of DeepSpeed 0.19: for stages 1 and 2 `_hp_mapping` and `single_partition_of_fp32_groups` (in bfloat16
with float32 gradients `fp32_groups_flat_partition`), for stage 3 `grad_position` and `fp32_partitioned_groups_flat`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava_ft.checkpoint.names import plain_name
from llava_ft.checkpoint.restore import PutValue
from llava_ft.tuning.quant import return_freed_memory


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter that this rank's optimizer holds.

    Attributes:
        name: Plain name of the parameter (see `checkpoint/restore.py`).
        start: First element of the part in the flattened parameter.
        length: Number of elements.
        flat: The tensor that the optimizer updates and keys its state by: a flat vector of several fragments, or the
            parameter itself.
        offset: Where the part begins in the flattened `flat`.
    """

    name: str
    start: int
    length: int
    flat: torch.Tensor
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor laid out like `flat`, as a flat view."""
        return flat.detach().reshape(-1).narrow(0, self.offset, self.length)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the part of a whole parameter, or of whole state of its shape."""
        return whole.reshape(-1).narrow(0, self.start, self.length)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by plain name."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fragments_of(model: nn.Module, zero_optimizer: Any = None) -> list[Fragment]:
    """Find what this rank's optimizer holds of each trained parameter.

    Args:
        model: The model.
        zero_optimizer: DeepSpeed's optimizer, or None where nothing is divided.
    """
    fragments: list[Fragment] = []
    for name, trained in trained_parameters(model).items():
        parameter: Any = trained  # with what DeepSpeed has added to it
        if hasattr(parameter, "ds_id"):
            group, offset, length = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
            start = torch.distributed.get_rank(parameter.ds_process_group) * length
            length = max(0, min(length, parameter.ds_numel - start))  # the last parts may be padding
            flat = zero_optimizer.fp32_partitioned_groups_flat[group]
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:  # wholly on other ranks
                continue
            # Stage 1 in bfloat16 with float32 gradients has an optimizer of its own, with another name for them.
            vectors = getattr(zero_optimizer, "single_partition_of_fp32_groups", None)
            vectors = zero_optimizer.fp32_groups_flat_partition if vectors is None else vectors
            flat = vectors[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        else:
            flat, offset, start, length = parameter, 0, 0, parameter.numel()
        if length:
            fragments.append(Fragment(name, start, length, flat, offset))
    return fragments


def whole_value(given: nn.Parameter) -> torch.Tensor:
    """Return the value of a parameter, whole: the float32 master value if it is trained. All ranks call this together.

    The result may share memory with the parameter.
    """
    parameter: Any = given  # with what DeepSpeed has added to it
    if hasattr(parameter, "ds_id"):
        if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
            return parameter._z3_optimizer.get_full_hp_param(parameter)
        with gathered([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "_hp_mapping"):
        return parameter.get_full_hp_param()
    return parameter.detach()


def whole_dtype(given: nn.Parameter) -> torch.dtype:
    """Return the type of what `whole_value` returns, without asking other ranks."""
    has_master = hasattr(given, "_hp_mapping") or (hasattr(given, "_z3_optimizer") and given.requires_grad)
    return torch.float32 if has_master else given.dtype


def value_setter(model: nn.Module, zero_optimizer: Any = None) -> PutValue:
    """Return a function that gives a trained parameter a value.

    Where there are master values they get it too. All ranks call it together and in the same order.
    """
    masters: dict[str, Fragment] = {}
    if zero_optimizer is not None:
        masters = {fragment.name: fragment for fragment in fragments_of(model, zero_optimizer)}

    def put(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
        with torch.no_grad(), gathered([parameter], modified=True):
            parameter.copy_(value)
            fragment = masters.get(name)
            if fragment is not None:
                fragment.of(fragment.flat).copy_(fragment.cut(value))

    return put


@contextmanager
def gathered(parameters: list[nn.Parameter], *, modified: bool = False) -> Iterator[None]:
    """Make parameters whole on every rank where ZeRO-3 has divided them; all ranks enter together.

    Args:
        parameters: Any parameters; whole ones stay as they are.
        modified: Whether they are given new values inside, the same ones on all ranks.
    """
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if modified else None):
        yield


class ZeroDivision:
    """Divides parameters among the ranks as soon as each is read (ZeRO-3), so that no rank ever holds the model.

    Args:
        config: DeepSpeed's configuration.
    """

    def __init__(self, config: dict[str, Any]):
        self._config = config

    @property
    def reads_files(self) -> bool:
        """Whether this rank reads the values that all get."""
        return torch.distributed.get_rank() == 0

    def divide(self, parameter: nn.Parameter) -> None:
        """Spread rank 0's value of a parameter over the ranks. All ranks call this together."""
        import deepspeed

        holder = nn.Module()
        holder.register_parameter("parameter", parameter)
        deepspeed.zero.Init(module=holder, config_dict_or_path=self._config)
        if parameter.device.type == "cpu":
            return_freed_memory()

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """Make a divided parameter whole inside the context; what is changed in it then is kept."""
        return gathered([parameter], modified=True)
