"""Reading weight files one tensor at a time.

A `WeightFiles` stands for the weights of one model: a single `.safetensors` or `.bin` file, or shards with an index.
Names, shapes and dtypes are known without reading data, so that a request can be refused before anything is
allocated. While streaming, a file is mapped for a limited number of bytes and then mapped anew: pages that were read
do not pile up in the process's memory.

Pickle files are read by `pickles.py`: nothing in them is executed. Indexes name files of their own directory alone.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from llava_ft.checkpoint.pickles import damaged_file_message, load_pickle
from llava_ft.errors import CheckpointError, some_of
from llava_ft.json_files import read_json

MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files with a model's weights; of several transformers takes the first."""

_BYTES_PER_MAPPING = 128 * 2**20
_MOST_NAMES_OF_A_VALUE = 4
SAFETENSORS_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The library's names of types, in the order in which it lays tensors in a file."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype  # on disk

    @property
    def num_bytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The tensors of one model, read lazily.

    Attributes:
        path: The directory or file that was opened.
        tensors: What is known of each tensor, by its name on disk.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]):
        self.path = path
        self.tensors = tensors

    @classmethod
    def open(cls, path: Path) -> "WeightFiles":
        """Open a weight file, an index file, or a directory that holds a model's weights.

        Raises:
            CheckpointError: There are no weights, a shard is missing, or a file is damaged.
        """
        source = path
        if path.is_dir():
            files = [path / name for name in MODEL_FILES if (path / name).is_file()]
            if not files:
                names = sorted(entry.name for entry in path.iterdir())
                raise CheckpointError(
                    f"{path} holds no model weights. Looked for {', '.join(MODEL_FILES)}; it holds "
                    f"{some_of(names, 12) or 'nothing'}."
                )
            source = files[0]
        return cls(path, _open_shards(source) if source.name.endswith(".index.json") else _inspect_file(source))

    def stream(
        self, names: Iterable[str] | None = None, *, may_be_nan: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors, file by file. A tensor is only valid until the next one is asked for.

        Args:
            names: The tensors wanted, by their names on disk; all when absent.
            may_be_nan: Whether NaN and infinite values are read like others.

        Raises:
            CheckpointError: A tensor holds values that are no numbers.
        """
        by_file: dict[Path, list[str]] = {}
        for name in self.tensors if names is None else names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, wanted in by_file.items():
            group: list[str] = []
            num_bytes = 0
            for name in wanted:
                group.append(name)
                num_bytes += self.tensors[name].num_bytes
                if num_bytes >= _BYTES_PER_MAPPING:
                    yield from _read(file, group, may_be_nan)
                    group, num_bytes = [], 0
            if group:
                yield from _read(file, group, may_be_nan)

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Return tensors in memory of their own. For small files, such as adapters."""
        return {name: tensor.clone() for name, tensor in self.stream(names)}


def has_model_weights(directory: Path) -> bool:
    """Whether a directory holds a model's weights under one of their usual names."""
    return any((directory / name).is_file() for name in MODEL_FILES)


def read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index of shards says it.

    Raises:
        CheckpointError: It is damaged, or names a file outside its own directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map'. The index is damaged.")
    shard_of = {name: str(shard) for name, shard in cast("dict[str, Any]", weight_map).items()}
    for shard in shard_of.values():
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not in its own directory. An index may only name files "
                "beside it; get the model from its origin again."
            )
    return shard_of


def _open_shards(index: Path) -> dict[str, TensorInfo]:
    shard_of = read_index(index)
    shards = {shard: _inspect_file(index.parent / shard) for shard in sorted(set(shard_of.values()))}
    tensors: dict[str, TensorInfo] = {}
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index} says that {shard} holds {name}, but it does not. The shard is damaged.")
        tensors[name] = shards[shard][name]
    return tensors


def _inspect_file(file: Path) -> dict[str, TensorInfo]:
    if not file.is_file():
        raise CheckpointError(f"The weight file {file} does not exist.")
    tensors: dict[str, TensorInfo] = {}
    if file.suffix == ".safetensors":
        try:
            with cast("Any", safe_open)(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    view = opened.get_slice(name)
                    dtype = SAFETENSORS_DTYPES.get(view.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{file}: {name} has the type {view.get_dtype()}, which is not supported."
                        )
                    tensors[name] = TensorInfo(file, tuple(view.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(damaged_file_message(file, error)) from None
        return tensors
    tensors = {name: TensorInfo(file, tuple(tensor.shape), tensor.dtype) for name, tensor in _load_pickle(file).items()}
    if sum(info.num_bytes for info in tensors.values()) > _MOST_NAMES_OF_A_VALUE * file.stat().st_size:
        raise CheckpointError(
            f"{file} gives the same values many names: its {len(tensors)} tensors would take more than "
            f"{_MOST_NAMES_OF_A_VALUE} times the memory of the file. Tied weights have two; get it from its origin."
        )
    return tensors


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    content = load_pickle(file)
    if isinstance(content, dict):
        tensors = cast("dict[Any, Any]", content)
        if all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()):
            return tensors
    raise CheckpointError(f"{file} is not a dictionary of tensors, so it is not a weight file.")


def _read(file: Path, names: list[str], may_be_nan: bool) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".safetensors":
        with cast("Any", safe_open)(file, framework="pt") as opened:
            for name in names:
                yield name, _checked(opened.get_tensor(name), name, file, may_be_nan)
        return
    content = _load_pickle(file)
    for name in names:
        yield name, _checked(content.pop(name), name, file, may_be_nan)


def _checked(tensor: torch.Tensor, name: str, file: Path, may_be_nan: bool) -> torch.Tensor:
    """Return a tensor that holds numbers, without the gradient that a `.bin` file may ask for."""
    tensor = tensor.detach()
    if may_be_nan or not tensor.is_floating_point() or tensor.itemsize == 1 or not tensor.numel():
        return tensor
    # The extremes take a tenth of the time that a look at each value takes, and are NaN if one of the values is.
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(
            f"{name} in {file} holds values that are no numbers (NaN or infinite): a model with them answers nothing "
            "and learns nothing. Get the file from its origin again, or use an earlier checkpoint."
        )
    return tensor
