"""The tensors of any weight file by name, shape and type, without their values, and without stopping at damage.

Headers of .safetensors files are read here, since the library refuses a file as a whole: of one that was cut short the
names are still of use. Pickles are read by `pickles.py`, which executes nothing.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch

from llava_ft.checkpoint.names import (
    EMBEDDINGS,
    HEAD,
    IMAGE_NEWLINE,
    NEW_ROWS_SUFFIX,
    clip_to_native_name,
    is_derived,
    is_projector,
    is_vision,
)
from llava_ft.checkpoint.pickles import load_pickle
from llava_ft.checkpoint.restore import plain_name
from llava_ft.errors import CheckpointError

PARTS: Final = (
    "embeddings",
    "layers",
    "norm",
    "head",
    "projector",
    "image newline",
    "vision tower",
    "LoRA A",
    "LoRA B",
    "DoRA magnitudes",
    "LoRA biases",
    "rows of added tokens",
    "CLIP text half",
    "derived",
    "other",
)
"""What a tensor can belong to, in the order in which parts are shown."""

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS: Final = re.compile(
    r"training_args\.bin|(?:optimizer|scheduler|scaler)\.(?:pt|bin)|rng_state.*\.pth|.*_states\.pt"
)
_CLIP: Final = re.compile(r"(?:vision_model|text_model|text_projection|visual_projection)\.|logit_scale$")
_CONTAINERS: Final = ("state_dict", "model", "module", "model_state_dict")
_MOST_HEADER_BYTES: Final = 100 * 10**6
_DTYPE_NAMES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor without its values.

    Attributes:
        key: Its name in the file.
        name: Its native name.
        part: What it belongs to; one of `PARTS`.
        shape: Its size in each dimension.
        dtype: Its type on disk.
        num_bytes: Its size on disk.
        file: Name of its file.
    """

    key: str
    name: str
    part: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    file: str

    @property
    def num_values(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class FileScan:
    """What a weight file holds.

    Attributes:
        path: The file.
        num_bytes: Its size.
        tensors: Its tensors, as far as they could be found.
        problem: What is wrong with it; "" if nothing is.
        others: Names of what it holds beside tensors.
    """

    path: Path
    num_bytes: int
    tensors: tuple[TensorHeader, ...] = ()
    problem: str = ""
    others: tuple[str, ...] = ()


def is_weight_file(path: Path) -> bool:
    """Whether a file is one of weights, by its name: neither state to resume from nor settings."""
    return path.suffix in _WEIGHT_SUFFIXES and _NO_WEIGHTS.fullmatch(path.name) is None


def scan_file(path: Path) -> FileScan:
    """Read what a weight file holds. What is wrong with it is in the result and not raised."""
    num_bytes = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            return _scan_safetensors(path, num_bytes)
        return _scan_pickle(path, num_bytes)
    except CheckpointError as error:
        return FileScan(path, num_bytes, problem=str(error))
    except OSError as error:
        return FileScan(path, num_bytes, problem=f"{path} cannot be read: {error.strerror}.")


def describing_name(key: str) -> str:
    """Return the native name of a key from a file of any kind, a CLIP directory's among them."""
    if _CLIP.match(key):
        return clip_to_native_name(key) or f"clip.{key}"
    return plain_name(key)


def part_of_tensor(name: str) -> str:
    """Return which of `PARTS` a tensor belongs to, by its native name."""
    for marker, part in (
        (".lora_magnitude_vector", "DoRA magnitudes"),
        (".lora_B.bias", "LoRA biases"),
        (".lora_A.", "LoRA A"),
        (".lora_embedding_A", "LoRA A"),
        (".lora_B.", "LoRA B"),
        (".lora_embedding_B", "LoRA B"),
    ):
        if marker in name:
            return part
    if is_derived(name):
        return "derived"
    if name.endswith(NEW_ROWS_SUFFIX):
        return "rows of added tokens"
    if name.startswith("clip."):
        return "CLIP text half"
    exact = {EMBEDDINGS: "embeddings", HEAD: "head", "lm_head.bias": "head", IMAGE_NEWLINE: "image newline"}
    if name in exact:
        return exact[name]
    if is_vision(name):
        return "vision tower"
    if is_projector(name):
        return "projector"
    if name.startswith("model.layers."):
        return "layers"
    return "norm" if name.startswith("model.norm.") else "other"


def header(key: str, shape: tuple[int, ...], dtype: str, num_bytes: int, file: Path) -> TensorHeader:
    """Describe a tensor of a file."""
    name = describing_name(key)
    return TensorHeader(key, name, part_of_tensor(name), shape, dtype, num_bytes, file.name)


def _scan_safetensors(path: Path, num_bytes: int) -> FileScan:
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if num_bytes < 8 or length > min(num_bytes - 8, _MOST_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is damaged or no .safetensors file: its {num_bytes:,} bytes do not begin with a header. Copy "
                "or download it again."
            )
        try:
            content = json.loads(opened.read(length))
            entries = {str(key): _entry(value) for key, value in content.items() if key != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(
                f"{path} is damaged: its header is not what .safetensors files begin with. Copy or download it again."
            ) from None
    tensors = [
        header(key, shape, _DTYPE_NAMES.get(dtype, dtype.lower()), end - start, path)
        for key, (dtype, shape, start, end) in entries.items()
    ]
    ends = [end for _, _, _, end in entries.values()]
    needed = 8 + length + max(ends, default=0)
    problem = ""
    if needed > num_bytes:
        num_cut = sum(8 + length + end > num_bytes for end in ends)
        problem = (
            f"{path} is cut short: it has {num_bytes:,} of {needed:,} bytes, and {num_cut} of its {len(ends)} tensors "
            "are incomplete. Copy or download it again."
        )
    elif needed < num_bytes:
        problem = f"{path} is damaged: {num_bytes - needed:,} bytes at its end belong to no tensor. Copy it again."
    return FileScan(path, num_bytes, tuple(tensors), problem)


def _entry(value: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    shape = tuple(int(size) for size in value["shape"])
    start, end = (int(offset) for offset in value["data_offsets"])
    if start > end or start < 0 or any(size < 0 for size in shape):
        raise ValueError("negative sizes")
    return str(value["dtype"]), shape, start, end


def _scan_pickle(path: Path, num_bytes: int) -> FileScan:
    others: list[str] = []
    tensors: list[TensorHeader] = []
    for key, value in _flattened(load_pickle(path)):
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            tensors.append(header(key, tuple(value.shape), dtype, value.nbytes, path))
        else:
            others.append(key)
    problem = "" if tensors else f"{path} holds no tensors, so it is not a weight file. Is it the right file?"
    return FileScan(path, num_bytes, tuple(tensors), problem, tuple(others))


def _flattened(content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield what is in dictionaries inside each other; names of usual containers are left out."""
    if not isinstance(content, dict) or depth > 8:
        yield prefix.removesuffix(".") or "(content)", cast("object", content)
        return
    for key, value in cast("dict[Any, object]", content).items():
        inside = prefix if key in _CONTAINERS and type(value) in (dict, OrderedDict) else f"{prefix}{key}."
        yield from _flattened(value, inside, depth + 1)
