"""Several adapters with weights: one model that has something of each.

Source: task arithmetic (arXiv:2212.04089) on LoRA, W + sum of w_i s_i B_i A_i: the change that each adapter makes,
times its weight. What was trained beside the adapters, the projector above all, is no change but a value. Where it
differs it is averaged with the weights divided by their sum, so that it keeps its size whatever they add up to.

PEFT's `add_weighted_adapter` gives the same sum with `combination_type="cat"` (a test compares them), but on a model
that is loaded whole, and without what was trained beside the adapters, which this file is about.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llava_ft.checkpoint.adapter import LoraAdapter, rows_of_added_tokens
from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.weights import TensorInfo, WeightFiles
from llava_ft.errors import CheckpointError, UserError
from llava_ft.models.builder import checkpoint_wishes

Adapters = Sequence[tuple[float, LoraAdapter]]
"""Adapters and the weight of each."""


class BlendedFiles(WeightFiles):
    """Tensors that were averaged, by native name; read as if they were in the file `path`."""

    def __init__(self, path: Path, values: Mapping[str, torch.Tensor]):
        super().__init__(path, {n: TensorInfo(path, tuple(value.shape), value.dtype) for n, value in values.items()})
        self._values = values

    def stream(
        self, names: Iterable[str] | None = None, *, may_be_nan: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors."""
        return ((name, self._values[name]) for name in (self.tensors if names is None else names))


def check_directories(directories: Sequence[ModelDirectory]) -> ModelDirectory:
    """Refuse directories that cannot be put together, from their configurations.

    Returns:
        One whose configuration describes the model; adapters that PEFT wrote have none.

    Raises:
        UserError: One is no adapter, or they are for models of different configurations.
    """
    others = [directory for directory in directories if directory.kind != "lora"]
    if others:
        raise UserError(
            f"{others[0].path} holds a {others[0].kind} and no adapter. Only LoRA adapters can be given weights or be "
            "put together; merge it by itself."
        )
    described = [directory for directory in directories if directory.config]
    for directory in described[1:]:
        first, wanted, other = described[0], checkpoint_wishes(described[0].config), checkpoint_wishes(directory.config)
        different = [key for key in wanted if wanted[key] != other[key]]
        if different:
            raise CheckpointError(
                f"{first.path} and {directory.path} were trained for different models: {different[0]} is "
                f"{wanted[different[0]]!r} in the one and {other[different[0]]!r} in the other. Only adapters for the "
                "same model can be put together."
            )
    return (described or directories)[0]


def check_adapters(adapters: Adapters) -> None:
    """Refuse adapters that have no weighted sum.

    Raises:
        UserError: One of several, or one with a weight, uses DoRA.
    """
    with_lengths = [adapter for _, adapter in adapters if adapter.magnitudes]
    if with_lengths and (len(adapters) > 1 or adapters[0][0] != 1.0):
        raise UserError(
            f"{with_lengths[0].path} was trained with DoRA, which sets the length of each row: there is no change that "
            "could be given a weight or be added to another's. Merge it alone, without a weight."
        )


def beside_source(adapters: Adapters, base: WeightSource, label: str, notes: list[str]) -> WeightSource | None:
    """Put together the whole tensors that were trained beside several adapters; memory holds one set of them.

    A tensor that one run trained and another did not counts with the base's value for the other. `notes` gets what was
    averaged.

    Returns:
        A source of this label; None if nothing was trained beside them.

    Raises:
        UserError: Values differ and have no average.
    """
    held: list[dict[str, tuple[WeightFiles, str]]] = []
    for _, adapter in adapters:
        files_and_names = zip(adapter.beside, adapter.replaced, strict=True)
        held.append({name: (files, key) for files, names in files_and_names for key, name in names.items()})
    in_base = {name: (base.files, key) for key, name in base.names.items()}

    def values_of(name: str) -> list[torch.Tensor]:
        values: list[torch.Tensor] = []
        for (_, adapter), of_adapter in zip(adapters, held, strict=True):
            place = of_adapter.get(name) or in_base.get(name)
            if place is None:
                raise CheckpointError(
                    f"{name} was trained beside one of the adapters, but neither {adapter.path} nor the base model "
                    "holds it, so there is no value to average with. Give a base model that holds it, or merge the "
                    "adapters one by one."
                )
            values.append(place[0].read([place[1]])[place[1]])
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise CheckpointError(
                f"{name} was trained beside the adapters in different shapes: {', '.join(map(str, sorted(shapes)))}. "
                "They belong to different models."
            )
        return values

    names = dict.fromkeys(name for of_adapter in held for name in of_adapter)
    averages = _averages(adapters, ((name, values_of(name)) for name in names), "{}", notes)
    if not averages:
        return None
    return WeightSource(label, BlendedFiles(adapters[0][1].beside[-1].path, averages), {n: n for n in averages}, True)


def blended_rows(adapters: Adapters, notes: list[str]) -> dict[str, torch.Tensor]:
    """Put together the rows of added tokens that were trained beside adapters; `notes` gets what was averaged.

    Returns:
        The rows, by the native name of the matrix whose last rows they are.

    Raises:
        UserError: They differ and have no average.
    """
    rows = [rows_of_added_tokens(adapter.beside) for _, adapter in adapters]
    names = list(dict.fromkeys(name for of_adapter in rows for name in of_adapter))
    for name in names:
        shapes = {tuple(of_adapter[name].shape) if name in of_adapter else None for of_adapter in rows}
        if len(shapes) > 1:
            raise CheckpointError(
                f"The adapters do not hold the same rows of added tokens for {name}: {shapes}. Only adapters with the "
                "same added tokens (mm_use_im_start_end) can be put together."
            )
    values = ((name, [of_adapter[name] for of_adapter in rows]) for name in names)
    return _averages(adapters, values, "the new rows of {}", notes)


def _averages(
    adapters: Adapters, values: Iterable[tuple[str, Sequence[torch.Tensor]]], subject: str, notes: list[str]
) -> dict[str, torch.Tensor]:
    """Average values, float32, with the weights divided by their sum; a value that all have stays as it is."""
    weights = [weight for weight, _ in adapters]
    averages: dict[str, torch.Tensor] = {}
    different: list[str] = []
    for name, (first, *others) in values:
        averages[name] = first
        if all(torch.equal(first, other) for other in others):
            continue
        different.append(subject.format(name))
        if min(weights) < 0 or sum(weights) == 0:
            raise UserError(
                f"{different[0]} was trained beside the adapters to different values, and with the weights "
                f"{', '.join(f'{weight:g}' for weight in weights)} they have no average. Give weights of at least 0, "
                "not all of them 0."
            )
        averages[name] = torch.zeros(first.shape)
        for value, weight in zip((first, *others), weights, strict=True):
            averages[name].add_(value.float(), alpha=weight / sum(weights))
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        ratio = " : ".join(f"{weight / sum(weights):.3g}" for weight in weights)
        notes.append(f"trained beside the adapters to different values, and averaged {ratio}: {different[0]}{more}")
    return averages
