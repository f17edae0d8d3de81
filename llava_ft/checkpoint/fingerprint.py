"""A short name for the weights of a language model or vision tower, whatever the file format, sharding or path."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch

from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.names import native_name
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.models.parts import LANGUAGE_MODEL, module_part

_VALUES_PER_TENSOR = 64


def language_model_fingerprint(sources: Iterable[WeightSource]) -> str:
    """Fingerprint the language model that an adapter is trained on.

    For each tensor its name, shape and 64 values spread evenly over it, as float32, go into a SHA-256. That touches a
    few pages of each file, so a 13B model takes a second, and finds a model that was fine-tuned, which changes all of
    its matrices. It is no protection against a forger.

    Returns:
        `sha256:` and 32 hexadecimal digits.
    """
    samples: dict[str, bytes] = {}
    for name, tensor in _tensors(sources, lambda name: module_part(name) in LANGUAGE_MODEL):
        flat = tensor.reshape(-1)
        stride = max(1, flat.numel() // _VALUES_PER_TENSOR)
        samples[name] = _shape_and_values(tensor, flat[::stride][:_VALUES_PER_TENSOR])
    return _digest(samples)


def vision_tower_fingerprint(sources: Iterable[WeightSource]) -> str:
    """Fingerprint a vision tower by all of its values, as float32.

    Features that were kept are used again if this is the same, so every value counts. CLIP-L takes about two seconds.

    Returns:
        `sha256:` and 32 hexadecimal digits.
    """
    vision = _tensors(sources, lambda name: module_part(name) == "vision tower")
    return _digest({name: hashlib.sha256(_shape_and_values(t, t)).digest() for name, t in vision})


def weights_fingerprint(files: Iterable[WeightFiles]) -> str:
    """Fingerprint trained weights, such as an adapter with its projector, by all of their values, as float32.

    Returns:
        `sha256:` and 32 hexadecimal digits; the same for .bin and .safetensors, and whatever prefixes the names have.
    """
    of_each: dict[str, bytes] = {}
    for opened in files:
        for key, tensor in opened.stream(opened.tensors):
            of_each[native_name(key)] = hashlib.sha256(_shape_and_values(tensor, tensor)).digest()
    return _digest(of_each)


def _tensors(sources: Iterable[WeightSource], is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the wanted parameters by name in the model; of several sources of one the last wins."""
    where: dict[str, tuple[WeightFiles, str]] = {}
    for source in sources:
        where.update({name: (source.files, key) for key, name in source.names.items() if is_wanted(name)})
    for files in dict.fromkeys(files for files, _ in where.values()):
        names = {key: name for name, (owner, key) in where.items() if owner is files}
        for key, tensor in files.stream(names):
            yield names[key], tensor


def _shape_and_values(tensor: torch.Tensor, values: torch.Tensor) -> bytes:
    return repr(tuple(tensor.shape)).encode() + values.to(torch.float32).contiguous().numpy().tobytes()


def _digest(of_each: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(of_each):
        digest.update(name.encode())
        digest.update(of_each[name])
    return "sha256:" + digest.hexdigest()[:32]
