"""A native model that was written without the rows and the tower that only its source needs, with them put back.

So it can be compared with its source tensor by tensor, as any other result.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.names import is_vision, native_name
from llava_ft.checkpoint.weights import TensorInfo, WeightFiles


class CompletedFiles(WeightFiles):
    """What was written, under native names, with what was left out taken from the source.

    Args:
        directory: Where it was written.
        whole: Its source.
    """

    def __init__(self, directory: Path, whole: FullModel):
        written = WeightFiles.open(directory)
        self._written = written
        self._whole = whole
        self._keys = {native_name(key): key for key in written.tensors}
        source = whole.base.sources[0]
        self._left_out: dict[str, TensorInfo] = {
            name: source.files.tensors[key]
            for key, name in source.names.items()
            if is_vision(name) and name not in self._keys
        }
        tensors = {name: written.tensors[key] for name, key in self._keys.items()}
        super().__init__(directory, tensors | self._left_out)

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors; those that were left out come from the source."""
        for name in self.tensors if names is None else names:
            if name in self._left_out:
                before = self._whole.before(name)
                assert before is not None
                yield name, before
                continue
            key = self._keys[name]
            value = self._written.read([key])[key]
            if value.dim() and value.shape[0] < self._whole.shapes[name][0]:
                before = self._whole.before(name)
                assert before is not None
                value = torch.cat([value, before[value.shape[0] :].to(value.dtype)])
            yield name, value
