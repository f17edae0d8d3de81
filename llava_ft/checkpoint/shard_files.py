"""Writing a whole model whose tensors are known beforehand, each as it comes, so that none is held in memory.

A `.safetensors` file begins with a table of contents. Where names, shapes and types are known before the first value,
the table can be written at once and each tensor put into its place. The files are, byte for byte, those that the
safetensors library writes.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from llava_ft.checkpoint.save import write_json
from llava_ft.errors import UserError

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor."""

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""The library's names, in its order: tensors of a later type come first in a file."""

_ALIGNMENT = 8


class ShardFiles:
    """Writes a model as safetensors shards with an index; a model of one shard gets the plain file name.

    Nothing is written before the first tensor comes.

    Args:
        directory: Where to.
        layout: The tensors that will come, in whatever order.
        max_shard_bytes: A single larger tensor gets a shard of its own.
    """

    def __init__(self, directory: Path, layout: Layout, *, max_shard_bytes: int):
        self._directory = directory
        self._layout = layout
        self._pending = set(layout)
        shards: list[list[str]] = [[]]
        size = 0
        for name in layout:
            num_bytes = _num_bytes(layout, name)
            if shards[-1] and size + num_bytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += num_bytes
        numbered = [f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" for index in range(len(shards))]
        self._names = numbered if len(shards) > 1 else ["model.safetensors"]
        self._headers: list[bytes] = []
        self._places: dict[str, tuple[int, int]] = {}
        for index, names in enumerate(shards):
            header, offsets = _header(layout, names)
            self._headers.append(header)
            self._places |= {name: (index, len(header) + offset) for name, offset in offsets.items()}
        self._descriptors: dict[int, int] = {}
        self.total_bytes = layout_bytes(layout)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its place."""
        assert (tuple(tensor.shape), tensor.dtype) == self._layout[name], name
        index, offset = self._places[name]
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if index not in self._descriptors:
            file = self._directory / self._names[index]
            self._descriptors[index] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.pwrite(self._descriptors[index], self._headers[index], 0)
        while data:
            written = os.pwrite(self._descriptors[index], data, offset)  # at most 2 GiB at a time
            data, offset = data[written:], offset + written
        self._pending.discard(name)

    def finish(self) -> None:
        """Close the files and write the index."""
        assert not self._pending, sorted(self._pending)[:3]
        self.close()
        if len(self._names) == 1:
            return
        weight_map = {name: self._names[self._places[name][0]] for name in sorted(self._layout)}
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self._directory / "model.safetensors.index.json", content)

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def check_space(directory: Path, num_bytes: int) -> None:
    """Refuse to write more bytes into a staging directory than the disk has room for, before any weight is read.

    Raises:
        UserError: There is less room.
    """
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise UserError(
            f"The model takes {num_bytes / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free in {directory.parent}. "
            "Free some space, or give another place for the result."
        )


def layout_bytes(layout: Layout) -> int:
    """Size of all tensors in bytes."""
    return sum(_num_bytes(layout, name) for name in layout)


def _header(layout: Layout, names: list[str]) -> tuple[bytes, dict[str, int]]:
    """Write the table of contents of a file, and say where each tensor begins behind it."""
    ranks = {dtype: rank for rank, dtype in enumerate(_DTYPES)}
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda name: (-ranks[layout[name][1]], name)):
        shape, dtype = layout[name]
        offsets[name], end = end, end + _num_bytes(layout, name)
        table[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, offsets


def _num_bytes(layout: Layout, name: str) -> int:
    shape, dtype = layout[name]
    return torch.Size(shape).numel() * dtype.itemsize
