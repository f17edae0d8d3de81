"""Several adapters with weights: one model that has something of each.

Source: task arithmetic (arXiv:2212.04089) on LoRA, W + sum of w_i s_i B_i A_i: the change that each adapter makes,
times its weight. What was trained beside the adapters, the projector above all, is no change but a value. Where it
differs it is averaged with the weights divided by their sum, so that it keeps its size whatever they add up to.

PEFT's `add_weighted_adapter` gives the same sum with `combination_type="cat"` (a test compares them), but on a model
that is loaded whole, and without what was trained beside the adapters, which this file is about.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from llava_ft.checkpoint.adapter import LoraAdapter
from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.weights import TensorInfo, WeightFiles
from llava_ft.errors import CheckpointError, UserError
from llava_ft.models.builder import checkpoint_wishes

Adapters = Sequence[tuple[float, LoraAdapter]]
"""Adapters and the weight of each."""

_Place = tuple[WeightFiles, str]
"""A file and a key in it."""


class BlendedFiles(WeightFiles):
    """Tensors that are averaged over several files, by native name; read as if they were in one."""

    def __init__(self, first: WeightFiles, places: Mapping[str, Sequence[_Place]], shares: Sequence[float]):
        """Average the values at `places` with `shares`, which add up to 1; messages name the file `first`."""
        infos = {name: files.tensors[key] for name, ((files, key), *_) in places.items()}
        tensors = {name: TensorInfo(first.path, info.shape, info.dtype) for name, info in infos.items()}
        super().__init__(first.path, tensors)
        self._places, self._shares = places, shares

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors."""
        for name in self.tensors if names is None else names:
            yield name, blended([files.read([key])[key] for files, key in self._places[name]], self._shares)


def blended(values: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """Return the weighted average of tensors, float32; the first of them as it is where all are equal."""
    if all(torch.equal(values[0], value) for value in values[1:]):
        return values[0]
    average = torch.zeros(values[0].shape)
    for value, share in zip(values, shares, strict=True):
        average.add_(value.float(), alpha=share)
    return average


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
    """Put together the whole tensors that were trained beside several adapters.

    A tensor that one run trained and another did not counts with the base's value for the other. `notes` gets what was
    averaged.

    Returns:
        A source of this label; None if nothing was trained beside them.

    Raises:
        UserError: Values differ and have no average.
    """
    held: list[dict[str, _Place]] = []
    for _, adapter in adapters:
        files_and_names = zip(adapter.beside, adapter.replaced, strict=True)
        held.append({name: (files, key) for files, names in files_and_names for key, name in names.items()})
    in_base: dict[str, _Place] = {name: (base.files, key) for key, name in base.names.items()}
    places: dict[str, list[_Place]] = {}
    for name in dict.fromkeys(name for of_adapter in held for name in of_adapter):
        found: list[_Place] = []
        for (_, adapter), of_adapter in zip(adapters, held, strict=True):
            place = of_adapter.get(name) or in_base.get(name)
            if place is None:
                raise CheckpointError(
                    f"{name} was trained beside one of the adapters, but neither {adapter.path} nor the base model "
                    "holds it, so there is no value to average with. Give a base model that holds it, or merge the "
                    "adapters one by one."
                )
            found.append(place)
        shapes = {files.tensors[key].shape for files, key in found}
        if len(shapes) > 1:
            raise CheckpointError(
                f"{name} was trained beside the adapters in different shapes: {', '.join(map(str, sorted(shapes)))}. "
                "They belong to different models."
            )
        places[name] = found
    if not places:
        return None
    different: list[str] = []
    for name, found in places.items():
        first, *others = (files.read([key])[key] for files, key in found)
        if not all(torch.equal(first, other) for other in others):
            different.append(name)
    shares = _shares_of_average(adapters, different, notes)
    return WeightSource(label, BlendedFiles(adapters[0][1].beside[-1], places, shares), {n: n for n in places}, True)


def blended_rows(adapters: Adapters, notes: list[str]) -> dict[str, torch.Tensor]:
    """Put together the rows of added tokens that were trained beside adapters; `notes` gets what was averaged.

    Returns:
        The rows, by the native name of the matrix whose last rows they are.

    Raises:
        UserError: They differ and have no average.
    """
    rows = [adapter.new_rows() for _, adapter in adapters]
    if len(rows) < 2:
        return rows[0] if rows else {}
    names = list(dict.fromkeys(name for of_adapter in rows for name in of_adapter))
    for name in names:
        shapes = {tuple(of_adapter[name].shape) if name in of_adapter else None for of_adapter in rows}
        if len(shapes) > 1:
            raise CheckpointError(
                f"The adapters do not hold the same rows of added tokens for {name}: {shapes}. Only adapters with the "
                "same added tokens (mm_use_im_start_end) can be put together."
            )
    different = [name for name in names if not all(torch.equal(rows[0][name], other[name]) for other in rows[1:])]
    shares = _shares_of_average(adapters, [f"the new rows of {name}" for name in different], notes)
    return {name: blended([of_adapter[name] for of_adapter in rows], shares) for name in names}


def _shares_of_average(adapters: Adapters, different: Sequence[str], notes: list[str]) -> list[float]:
    """Divide the weights by their sum and note what they average; any will do where nothing differs."""
    weights = [weight for weight, _ in adapters]
    if not different:
        return [1.0, *[0.0] * (len(weights) - 1)]
    if min(weights) < 0 or sum(weights) == 0:
        raise UserError(
            f"{different[0]} was trained beside the adapters to different values, and with the weights "
            f"{', '.join(f'{weight:g}' for weight in weights)} they have no average. Give weights of at least 0, "
            "not all of them 0."
        )
    shares = [weight / sum(weights) for weight in weights]
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    ratio = " : ".join(f"{share:.3g}" for share in shares)
    notes.append(f"trained beside the adapters to different values, and averaged {ratio}: {different[0]}{more}")
    return shares
