"""A short name for the weights of a language model, the same whatever the file format, sharding or path."""

import hashlib
from collections.abc import Iterable

import torch

from llava_ft.checkpoint.load import WeightSource
from llava_ft.checkpoint.names import is_language_model
from llava_ft.checkpoint.weights import WeightFiles

_VALUES_PER_TENSOR = 64


def language_model_fingerprint(sources: Iterable[WeightSource]) -> str:
    """Fingerprint the language model that an adapter is trained on.

    For each tensor its name, shape and 64 values spread evenly over it, as float32, go into a SHA-256. That touches a
    few pages of each file, so a 13B model takes a second, and finds a model that was fine-tuned, which changes all of
    its matrices. It is no protection against a forger.

    Returns:
        `sha256:` and 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    where: dict[str, tuple[WeightFiles, str]] = {}
    for source in sources:
        where.update({name: (source.files, key) for key, name in source.names.items() if is_language_model(name)})
    samples: dict[str, bytes] = {}
    for files in dict.fromkeys(files for files, _ in where.values()):
        names = {key: name for name, (owner, key) in where.items() if owner is files}
        for key, tensor in files.stream(names):
            flat = tensor.reshape(-1)
            stride = max(1, flat.numel() // _VALUES_PER_TENSOR)
            values = flat[::stride][:_VALUES_PER_TENSOR].to(torch.float32)
            samples[names[key]] = repr(tuple(tensor.shape)).encode() + values.numpy().tobytes()
    for name in sorted(samples):
        digest.update(name.encode())
        digest.update(samples[name])
    return "sha256:" + digest.hexdigest()[:32]
