"""The tensors of any weight file by name, shape and type, without their values, and without stopping at damage.

Headers of .safetensors files are read here, since the library refuses a file as a whole: of one that was cut short the
names are still of use. Pickles are read by `pickles.py`, which executes nothing.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch

from llava_ft.checkpoint.names import is_derived, plain_name
from llava_ft.checkpoint.pickles import load_pickle
from llava_ft.checkpoint.weights import SAFETENSORS_DTYPES
from llava_ft.errors import CheckpointError
from llava_ft.models.parts import VISION_PREFIX, part_of

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS: Final = re.compile(
    r"training_args\.bin|(?:optimizer|scheduler|scaler)\.(?:pt|bin)|rng_state.*\.pth|.*_states\.pt"
)
_TEXT_HALF: Final = re.compile(r"(?:text_model|text_projection|visual_projection)\.|logit_scale$")
_CONTAINERS: Final = ("state_dict", "model", "module", "model_state_dict")
_MOST_HEADER_BYTES: Final = 100 * 10**6

PARTS_OF_FILES: Final = (
    "embeddings", "layers", "norm", "head", "projector", "image newline", "vision tower", "LoRA A", "LoRA B",
    "DoRA magnitudes", "LoRA biases", "rows of added tokens", "CLIP text half", "derived", "other",
)  # fmt: skip
"""Parts of files, in the order in which they are shown: those of `models/parts.py`, decoder and LoRA in pieces."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor without its values; sizes and type are those on disk."""

    key: str  # its name in the file
    name: str  # its native name
    part: str  # one of `PARTS_OF_FILES`
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    file: str

    @property
    def num_values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class FileHeader:
    """What a weight file holds, as far as it can be read."""

    path: Path
    num_bytes: int
    tensors: tuple[TensorHeader, ...] = ()
    problem: str = ""  # "" if nothing is wrong with it
    others: tuple[str, ...] = ()  # names of what it holds beside tensors


def part_of_tensor(name: str) -> str:
    """Return which part of a model a tensor belongs to, by its native name."""
    finer = (
        ("DoRA magnitudes", ".lora_magnitude_vector" in name),
        ("LoRA biases", ".lora_B.bias" in name),
        ("LoRA A", ".lora_A." in name or ".lora_embedding_A" in name),
        ("LoRA B", ".lora_B." in name or ".lora_embedding_B" in name),
        ("derived", is_derived(name)),
        ("CLIP text half", name.startswith("clip.")),
        ("layers", name.startswith("model.layers.")),
        ("norm", name.startswith("model.norm.")),
    )
    # What only contains such a name is no such tensor: an optimizer's `state.model.mm_projector.0.weight.exp_avg`.
    coarse = part_of(name) if name.startswith(("model.", "lm_head.")) else "other"
    part = next((part for part, holds_it in finer if holds_it), coarse)
    return {"new token rows": "rows of added tokens", "language model": "other"}.get(part, part)


def is_weight_file(path: Path) -> bool:
    """Whether a file is one of weights, by its name: neither state to resume from nor settings."""
    return path.suffix in _WEIGHT_SUFFIXES and _NO_WEIGHTS.fullmatch(path.name) is None


def read_header(path: Path) -> FileHeader:
    """Read what a weight file holds. What is wrong with it is in the result and not raised."""
    num_bytes = path.stat().st_size
    try:
        return _read_safetensors(path, num_bytes) if path.suffix == ".safetensors" else _read_pickle(path, num_bytes)
    except (CheckpointError, OSError) as error:
        problem = f"{path} cannot be read: {error.strerror}." if isinstance(error, OSError) else str(error)
        return FileHeader(path, num_bytes, problem=problem)


def _read_safetensors(path: Path, num_bytes: int) -> FileHeader:
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        content = opened.read(length) if length <= min(num_bytes - 8, _MOST_HEADER_BYTES) else b""
    tensors: list[TensorHeader] = []
    ends: list[int] = []
    try:
        for key, entry in json.loads(content).items():
            if key == "__metadata__":
                continue
            shape, (start, end) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
            if not 0 <= start <= end or min(shape, default=0) < 0:
                raise ValueError("negative sizes")
            dtype = str(SAFETENSORS_DTYPES.get(entry["dtype"], str(entry["dtype"]).lower()))
            tensors.append(_tensor(key, shape, dtype, end - start, path))
            ends.append(8 + length + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path} is damaged or no .safetensors file: its {num_bytes:,} bytes do not begin with a header. Copy "
            "or download it again."
        ) from None
    needed, num_cut = max(ends, default=8 + length), sum(end > num_bytes for end in ends)
    problem = ""
    if needed > num_bytes:
        problem = (
            f"{path} is cut short: it has {num_bytes:,} of {needed:,} bytes, and {num_cut} of its {len(ends)} tensors "
            "are incomplete. Copy or download it again."
        )
    elif needed < num_bytes:
        problem = f"{path} is damaged: {num_bytes - needed:,} bytes at its end belong to no tensor. Copy it again."
    return FileHeader(path, num_bytes, tuple(tensors), problem)


def _read_pickle(path: Path, num_bytes: int) -> FileHeader:
    content = list(_flattened(load_pickle(path)))
    tensors = [
        _tensor(key, tuple(value.shape), str(value.dtype), value.nbytes, path)
        for key, value in content
        if isinstance(value, torch.Tensor)
    ]
    others = tuple(key for key, value in content if not isinstance(value, torch.Tensor))
    problem = "" if tensors else f"{path} holds no tensors, so it is not a weight file. Is it the right file?"
    return FileHeader(path, num_bytes, tuple(tensors), problem, others)


def _tensor(key: str, shape: tuple[int, ...], dtype: str, num_bytes: int, file: Path) -> TensorHeader:
    """Describe a tensor of a file of any kind, a vision tower's own among them."""
    if key.startswith("vision_model."):
        name = VISION_PREFIX + key.removeprefix("vision_model.")
    else:
        name = f"clip.{key}" if _TEXT_HALF.match(key) else plain_name(key)
    return TensorHeader(key, name, part_of_tensor(name), shape, dtype.removeprefix("torch."), num_bytes, file.name)


def _flattened(content: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield what is in dictionaries inside each other; names of usual containers are left out."""
    if not isinstance(content, dict) or depth > 8:
        yield prefix.removesuffix(".") or "(content)", cast("object", content)
        return
    for key, value in cast("dict[Any, object]", content).items():
        inside = prefix if key in _CONTAINERS and type(value) in (dict, OrderedDict) else f"{prefix}{key}."
        yield from _flattened(value, inside, depth + 1)
