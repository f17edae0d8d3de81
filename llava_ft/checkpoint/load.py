"""Filling a model from its files: one pass, tensor by tensor, with a ledger of what came from where.

A model's weights may lie in several places: a language model, a CLIP directory, a projector file. Each is a
`WeightSource`; where two hold the same parameter the later one wins. What each parameter needs is settled from names
and shapes before any data is read, so a file that does not fit is refused at once. Memory holds the weights that are
kept and little else.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import nn

from llava_ft.checkpoint.names import EMBEDDINGS, HEAD, IMAGE_NEWLINE, is_derived
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import CheckpointError, some_of
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.parts import DECODER_LAYER, part_of
from llava_ft.tuning.quant import is_quantized, set_quantized_weight

logger = logging.getLogger(__name__)

Plan = dict[str, tuple[int, str]]
"""For each parameter: position of its source, name on disk."""

_OF_LANGUAGE_MODEL: Final = re.compile(rf"{DECODER_LAYER}|model\.norm\.|{re.escape(EMBEDDINGS)}|{re.escape(HEAD)}")


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Weights for some parameters of a model."""

    label: str  # what the source is, for the ledger and for messages, such as "vision tower"
    files: WeightFiles  # the tensors
    names: Mapping[str, str]
    """Parameter name in the model, for each tensor name on disk. A tensor that is not listed is not used."""
    must_fit: bool = False  # whether a tensor that the model has no place for is an error and not only noted

    @classmethod
    def of(
        cls, label: str, files: WeightFiles, rename: Callable[[str], str | None], *, must_fit: bool = False
    ) -> "WeightSource":
        """Make a source from a function that gives the parameter name for a name on disk, or None to leave it out."""
        names = {key: name for key in files.tensors if (name := rename(key)) is not None and not is_derived(name)}
        return cls(label, files, names, must_fit)


class Division(Protocol):
    """How parameters are divided among ranks while they are loaded."""

    @property
    def reads_files(self) -> bool:
        """Whether this rank reads the values that all get; the others give memory for them."""
        ...

    def divide(self, parameter: nn.Parameter) -> None:
        """Spread the reading rank's value of a parameter over the ranks. All ranks call this in the same order."""
        ...

    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """Make a divided parameter whole inside the context; what is changed in it then is kept."""
        ...


@dataclass
class Ledger:
    """Where each weight of a model came from."""

    loaded: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """Number of tensors, by part of the model and source; `num_bytes` of those in memory likewise."""
    num_bytes: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    initialised: list[str] = field(default_factory=list[str])  # declared new, and in no file
    grown: dict[str, int] = field(default_factory=dict[str, int])  # number of new rows, by parameter
    unexpected: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # without a place, by source

    def log(self) -> None:
        """Write the ledger to the log."""
        lines = [
            f"{part}: {count} tensors, {self.num_bytes[part, source] / 2**20:,.1f} MiB from {source}"
            for (part, source), count in self.loaded.items()
        ]
        if self.initialised:
            lines.append(f"newly initialised: {some_of(self.initialised)}")
        lines += [f"{name}: {count} new rows" for name, count in self.grown.items()]
        lines += [f"not used from {source}: {some_of(names)}" for source, names in self.unexpected.items()]
        for line in lines:
            logger.info("Weights: %s", line)


def load_weights(
    model: LlavaForCausalLM,
    sources: Sequence[WeightSource],
    *,
    dtype_of: Callable[[str], torch.dtype],
    new_modules: Collection[str] = (),
    num_new_rows: int = 0,
    device: torch.device | str = "cpu",
    division: Division | None = None,
) -> Ledger:
    """Give every parameter of a model that was built without memory its value.

    Args:
        model: The model; its parameters are on the meta device.
        sources: Where the weights lie. A later source wins over an earlier one.
        dtype_of: The dtype in memory for a parameter name.
        new_modules: Names of modules, or of `image_newline`, that start from their random initialisation when no source
            holds them.
        num_new_rows: Rows by which embeddings and head may be larger than on disk; they start from the mean of the
            other rows, as in LLaVA's `initialize_vision_tokenizer`.
        device: Where the parameters are put.
        division: Divides each parameter among the ranks as soon as it has its value; absent where each holds all.

    Returns:
        What came from where.

    Raises:
        CheckpointError: A parameter is missing or has another shape, or a source that must fit does not.
    """
    ledger = Ledger()
    plan = plan_sources(model, sources, ledger, num_new_rows=num_new_rows, new_modules=new_modules)
    _initialise(model, ledger.initialised, dtype_of, device)
    if division is not None:
        for name in ledger.initialised:
            division.divide(model.get_parameter(name))
    for name, source, tensor in stream_planned(sources, plan):
        shape = tuple(model.get_parameter(name).shape)
        # A weight that is to be quantised is quantised from its values on disk.
        dtype = tensor.dtype if _is_to_be_quantized(model, name) else dtype_of(name)
        if division is None or division.reads_files:
            value = fit_rows(tensor.to(device=device, dtype=dtype, copy=True), shape)
        else:
            value = torch.empty(shape, dtype=dtype, device=device)
        if shape[:1] != tensor.shape[:1]:
            ledger.grown[name] = shape[0] - tensor.shape[0]
        ledger.loaded[part_of(name), f"{source.label} {source.files.path}"] += 1
        ledger.num_bytes[part_of(name), f"{source.label} {source.files.path}"] += _assign(model, name, value)
        if division is not None:
            division.divide(model.get_parameter(name))
    if _head_is_tied(model):
        model.lm_head.weight = model.model.embed_tokens.weight
    return ledger


def plan_sources(
    model: LlavaForCausalLM,
    sources: Sequence[WeightSource],
    ledger: Ledger,
    *,
    num_new_rows: int = 0,
    new_modules: Collection[str] = (),
) -> Plan:
    """Choose where each parameter is read from, and check that everything is there and fits.

    Arguments as for `load_weights`; the model need have no memory. `ledger` gets what is unexpected and what is to be
    initialised.

    Raises:
        CheckpointError: A parameter is missing or has another shape, or a source that must fit does not.
    """
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if _head_is_tied(model):
        parameters.pop(HEAD, None)  # becomes the embeddings once these are read
    plan: Plan = {}
    for index, source in enumerate(sources):
        unexpected: list[str] = []
        for key, name in source.names.items():
            if name in parameters:
                plan[name] = (index, key)
            elif not (name == HEAD and _head_is_tied(model)):
                unexpected.append(key)
        unread = [key for key in unexpected if _OF_LANGUAGE_MODEL.match(source.names[key])]
        if unread:
            raise CheckpointError(
                f"{source.files.path} holds weights of a language model that would not be used: {some_of(unread)}. "
                "Does its config.json belong to these weights?"
            )
        if unexpected and source.must_fit:
            raise CheckpointError(
                f"The {source.label} {source.files.path} holds {some_of(unexpected)}, for which the model has no "
                "place. Does the configuration, such as mm_projector_type, belong to this file?"
            )
        if unexpected:
            ledger.unexpected[f"{source.label} {source.files.path}"] = unexpected
    for name, (index, key) in plan.items():
        info = sources[index].files.tensors[key]
        shape, needed = info.shape, parameters[name]
        may_grow = name in (EMBEDDINGS, HEAD) and shape[1:] == needed[1:] and needed[0] - shape[0] == num_new_rows
        if shape != needed and not may_grow:
            raise CheckpointError(
                f"{key} in {info.file} is {_size(shape)}, but the model needs {_size(needed)} for {name}. "
                f"The {sources[index].label} belongs to another model or configuration."
            )
    missing = [name for name in parameters if name not in plan]
    ledger.initialised = [name for name in missing if any(f"{name}.".startswith(f"{new}.") for new in new_modules)]
    undeclared = [name for name in missing if name not in ledger.initialised]
    if undeclared:
        places = ", ".join(f"{source.label} ({source.files.path})" for source in sources)
        raise CheckpointError(
            f"{len(undeclared)} weights of the model are in none of its files: {some_of(undeclared)}. Looked in "
            f"{places}. Is this the right directory, and is it complete?"
        )
    return plan


def stream_planned(sources: Sequence[WeightSource], plan: Plan) -> Iterator[tuple[str, WeightSource, torch.Tensor]]:
    """Yield each planned parameter's name, source and value as it is on disk. A value is valid until the next one."""
    for index, source in enumerate(sources):
        wanted = {key: name for key, name in source.names.items() if plan.get(name) == (index, key)}
        for key, tensor in source.files.stream(wanted):
            yield wanted[key], source, tensor


def fit_rows(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a matrix with rows added to reach `shape`; they hold the mean of the others, as in LLaVA."""
    if tuple(tensor.shape) == shape:
        return tensor
    grown = tensor.new_empty(shape)
    grown[: tensor.shape[0]] = tensor
    grown[tensor.shape[0] :] = tensor.float().mean(dim=0)
    return grown


def _initialise(
    model: nn.Module, names: Sequence[str], dtype_of: Callable[[str], torch.dtype], device: torch.device | str
) -> None:
    """Let new modules draw their own initial values, in float32 on the CPU whatever the dtype and device."""
    ours = [name for name in names if name != IMAGE_NEWLINE]
    for name in ours:
        _assign(model, name, torch.empty(model.get_parameter(name).shape))
    whole: set[str] = set()
    for name in ours:
        # The outermost module with a `reset_parameters`: a projector that has one settles all that is in it.
        steps = name.split(".")
        paths = [".".join(steps[:depth]) for depth in range(1, len(steps))]
        path = next((path for path in paths if hasattr(model.get_submodule(path), "reset_parameters")), None)
        assert path is not None, f"{name} is new, and no module around it has reset_parameters()"
        if path not in whole:
            whole.add(path)
            module: Any = model.get_submodule(path)
            module.reset_parameters()
    for name in ours:
        _assign(model, name, model.get_parameter(name).detach().to(device=device, dtype=dtype_of(name)))
    if IMAGE_NEWLINE in names:
        width = model.get_parameter(IMAGE_NEWLINE).shape[0]
        value = torch.randn(width) / width**0.5
        _assign(model, IMAGE_NEWLINE, value.to(device=device, dtype=dtype_of(IMAGE_NEWLINE)))


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> int:
    """Give a parameter its value, quantised if its layer is; returns the bytes it takes."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if _is_to_be_quantized(model, name):
        return set_quantized_weight(module, value)
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return value.nbytes


def _is_to_be_quantized(model: nn.Module, name: str) -> bool:
    module_name, _, leaf = name.rpartition(".")
    return leaf == "weight" and is_quantized(model.get_submodule(module_name))


def _head_is_tied(model: LlavaForCausalLM) -> bool:
    return bool(model.config.tie_word_embeddings)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
