"""A whole model as a stream of tensors: a base with what was trained on it put in, nothing loaded at once.

Merging and every export read a model through `FullModel`. Each weight is read, what was trained is put in with float32
arithmetic, and the result is rounded once, a block of rows at a time: beside the tensor that is yielded, memory holds
the adapter, or what several come to, and a few megabytes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from llava_ft.checkpoint.adapter import merged
from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.load import Ledger, Plan, WeightSource, fit_rows, plan_sources, stream_planned
from llava_ft.checkpoint.model import ModelSpec, count_new_rows
from llava_ft.checkpoint.names import EMBEDDINGS, native_name
from llava_ft.checkpoint.overrides import Force
from llava_ft.models.builder import build_skeleton
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.parts import any_in, language_model_linears
from llava_ft.tuning.quant import Quantization

Origin = Literal["frozen", "changed", "replaced", "tower"]
"""`frozen` as in the base; `changed` by an adapter or by quantisation; `replaced` by a trained one, whole or in the
rows of added tokens; `tower` from a vision tower in a directory of its own."""


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of a whole model."""

    name: str  # native
    value: torch.Tensor  # as it is to be written, in memory of its own
    origin: Origin
    source: str  # the files it comes from, for a report


class FullModel:
    """A model as a stream of tensors.

    Attributes:
        base: What it is made of: the base, and what was trained on it.
        directory: What the user gave, the first of several: a whole model, or what was trained on a base.
        config: Its configuration, with the vocabulary as large as the tokenizer's.
        num_new_rows: Rows by which the vocabulary is larger than the base's.
        shapes: Shape of each parameter by native name, after growth; the vision tower's included.
        dtype: Type of most of the base's bytes.
        rows: Trained rows of added tokens, by the native name of the matrix whose last rows they are.
        quantization: If set, linear layers have the values that they are worth after being quantised like this.
    """

    def __init__(self, base: ModelSpec, quantization: Quantization | None = None):
        self.base, self.directory, self.adapters = base, base.given[0], base.adapters
        self.tokenizer, self.fingerprint = base.tokenizer, base.fingerprint
        self.quantization = quantization
        self.config: LlavaModelConfig = self.base.config
        self.num_new_rows = count_new_rows(self.config, self.tokenizer, base.directory.path)
        self.config.vocab_size += self.num_new_rows
        skeleton = build_skeleton(self.config)
        sources = self.base.sources
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()
        }
        self._plan: Plan = plan_sources(skeleton, sources, Ledger(), num_new_rows=self.num_new_rows)
        self._quantized = (
            {f"{name}.weight" for name in language_model_linears(skeleton)} if quantization is not None else set[str]()
        )
        self._keys = {id(source): {name: key for key, name in source.names.items()} for source in sources}
        rows = dict(base.rows)
        files = self.base.token_rows
        if files is not None and self.num_new_rows:  # trained with a projector alone
            key = next(key for key in files.tensors if native_name(key) == EMBEDDINGS)
            rows[EMBEDDINGS] = files.read([key])[key][-self.num_new_rows :]
        self.rows: Mapping[str, torch.Tensor] = rows
        num_bytes: Counter[torch.dtype] = Counter()
        for info in self.base.sources[0].files.tensors.values():
            num_bytes[info.dtype] += info.num_bytes
        self.dtype = max(num_bytes, key=lambda dtype: num_bytes[dtype])
        for _, adapter in self.adapters:
            adapter.check_shapes(self.shapes)
        self._tower_is_changed = any(any_in("vision tower", adapter.changed) for _, adapter in self.adapters)

    def names(self, *, with_tower: bool) -> list[str]:
        """Native names of the tensors that `stream` yields, in its order."""
        return list(self.layout(with_tower=with_tower))

    def layout(
        self, dtype: torch.dtype | None = None, *, with_tower: bool
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of the tensors that `stream` yields, in its order."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for index, source in enumerate(self._sources(with_tower)):
            infos = source.files.tensors
            wanted = {key: name for key, name in source.names.items() if self._plan.get(name) == (index, key)}
            files = {file: place for place, file in enumerate(dict.fromkeys(infos[key].file for key in wanted))}
            for key in sorted(wanted, key=lambda key: files[infos[key].file]):
                name = wanted[key]
                found[name] = self.shapes[name], self._dtype(name, infos[key].dtype, dtype)
        return found

    def origin(self, name: str) -> Origin:
        """Say where a parameter's value comes from."""
        source = self.base.sources[self._plan[name][0]]
        if name in self._quantized or any(name in adapter.changed for _, adapter in self.adapters):
            return "changed"
        if source.label == "vision tower":
            return "tower"
        return "frozen" if source.label == "base model" and name not in self.rows else "replaced"

    def stream(self, dtype: torch.dtype | None = None, *, with_tower: bool) -> Iterator[ModelTensor]:
        """Yield every tensor, computed in float32 and rounded once.

        Args:
            dtype: Type of all tensors. When absent, frozen ones keep the type they have on disk, so that they stay bit
                for bit what they are; all others get that of most of the base's bytes.
            with_tower: Whether a vision tower that lies in a directory of its own is yielded too; one that the base
                holds, or that was trained or changed, always is.
        """
        for name, source, tensor in stream_planned(self._sources(with_tower), self._plan):
            yield self._finished(name, source, tensor, dtype)

    def before(self, name: str) -> torch.Tensor | None:
        """Return the value that the base itself has for a parameter, as on disk; None if the base does not hold it.

        It is not to be changed: its memory is the file.
        """
        for source in self.base.sources:
            if source.label in ("base model", "vision tower") and name in self._keys[id(source)]:
                return _mapped(source, self._keys[id(source)][name])
        return None

    def on_disk(self, name: str) -> tuple[str, torch.Tensor]:
        """Return what file a parameter is taken from, and its value there; it is not to be changed."""
        index, key = self._plan[name]
        source = self.base.sources[index]
        return f"the {source.label} {source.files.path}", _mapped(source, key)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> ModelTensor:
        """Return what `stream` yields for one parameter."""
        index, key = self._plan[name]
        source = self.base.sources[index]
        return self._finished(name, source, _mapped(source, key), dtype)

    def quantized_value(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what a weight is worth after being quantised, if this model is made of such weights."""
        return self.quantization.round_trip(tensor) if self.quantization and name in self._quantized else tensor

    def _finished(
        self, name: str, source: WeightSource, tensor: torch.Tensor, wanted: torch.dtype | None
    ) -> ModelTensor:
        origin, dtype = self.origin(name), self._dtype(name, tensor.dtype, wanted)
        tensor = self.quantized_value(name, tensor)
        changing = [(share, adapter) for share, adapter in self.adapters if name in adapter.changed]
        if changing:
            value = merged(name, fit_rows(tensor, self.shapes[name]), changing, dtype)
        else:
            value = fit_rows(tensor.to(dtype=dtype, copy=True), self.shapes[name])
        if name in self.rows:
            value[-self.rows[name].shape[0] :] = self.rows[name].to(dtype)
        label = f"{source.label} {source.files.path}"
        if origin == "changed":
            quantized = [f"being quantised as {self.quantization}"] * bool(self.quantization)
            changes = [*quantized, *(f"adapter {adapter.path}" for _, adapter in self.adapters)]
            label += f", changed by {' and '.join(changes)}"
        return ModelTensor(name, value, origin, label)

    def _dtype(self, name: str, on_disk: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
        return wanted or (on_disk if self.origin(name) == "frozen" else self.dtype)

    def _sources(self, with_tower: bool) -> list[WeightSource]:
        """The sources in their order; a tower that is not wanted has no names, so that nothing of it is read."""
        with_tower |= self._tower_is_changed
        return [
            source if with_tower or source.label != "vision tower" else WeightSource(source.label, source.files, {})
            for source in self.base.sources
        ]


def open_full_model(
    directory: ModelDirectory,
    model_base: str | None,
    *,
    vision_tower: str | None = None,
    force: Force = False,
    quantization: Quantization | None = None,
) -> FullModel:
    """Open a whole model, or what was trained together with its base; arguments as for `open_base_and_adapters`.

    With `quantization`, linear layers get the values that they are worth after being quantised like this.

    Raises:
        UserError: Something is missing, damaged or does not fit.
    """
    source = open_base_and_adapters([(1.0, directory)], model_base, vision_tower=vision_tower, force=force)
    return FullModel(source, quantization)


def _mapped(source: WeightSource, key: str) -> torch.Tensor:
    return next(tensor for _, tensor in source.files.stream([key]))
