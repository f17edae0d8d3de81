"""Counting the bytes of every tensor that is alive, with the highest count so far.

A `MemoryTracker` sees each operation that torch runs inside it, forward and backward, and the storage of each result.
When a storage dies its bytes are taken off again. That works alike for real tensors and for fake ones, which have
shapes but no memory, so a training step that was never run can be measured. What it does not see is memory that
kernels take and give back within one operation, and what an allocator loses to fragmentation.

torch's own `torch.distributed._tools.mem_tracker` counts in the same way, by module and by what a tensor is to the
optimizer. It is not used, because it cannot tell the phases of a step, logits and copies of weights, and is private.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class _Storage:
    reference: Any
    num_bytes: int
    label: str


class MemoryTracker(TorchDispatchMode):
    """Counts living tensor storage while it is active.

    Args:
        granularity: Sizes are rounded up to a multiple of it, as CUDA's caching allocator does with 512 bytes.
    """

    def __init__(self, granularity: int = 1):
        super().__init__()
        self.label = "activations"  # what new storage is counted as, until it is changed
        self.phase = "forward"  # part of the step, for `peaks`
        self.peaks: dict[str, dict[str, int]] = {}  # by phase the bytes that were alive, by label, when most were
        self.now = 0  # bytes that are alive
        self._most: Counter[str] = Counter()  # by phase
        self._granularity = granularity
        self._living: dict[int, _Storage] = {}
        self._by_label: Counter[str] = Counter()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storage of these tensors as nothing: the model's weights, which are known."""
        for tensor in tensors:
            self._living[tensor.untyped_storage()._cdata] = _Storage(tensor.untyped_storage(), 0, "")

    def relabel(self, tensor: torch.Tensor, label: str) -> None:
        """Count a tensor's storage under another label from now on."""
        entry = self._living.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            self._by_label[entry.label] -= entry.num_bytes
            self._by_label[label] += entry.num_bytes
            entry.label = label

    def label_of(self, func: Callable[..., Any], result: torch.Tensor) -> str:
        """Return what a new tensor is counted as; a subclass may look at the operation that made it."""
        return self.label

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation."""
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self.run(func, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._living:
                self._add(tensor.untyped_storage(), self.label_of(func, tensor))
        return result

    def _add(self, storage: torch.UntypedStorage, label: str) -> None:
        key, num_bytes = storage._cdata, -(-storage.nbytes() // self._granularity) * self._granularity
        self._living[key] = _Storage(weakref.ref(storage, lambda _: self._forget(key)), num_bytes, label)
        self.now += num_bytes
        self._by_label[label] += num_bytes
        if self.now > self._most[self.phase]:
            self._most[self.phase] = self.now
            self.peaks[self.phase] = {name: size for name, size in self._by_label.items() if size}

    def _forget(self, key: int) -> None:
        entry = self._living.pop(key)
        self.now -= entry.num_bytes
        self._by_label[entry.label] -= entry.num_bytes
