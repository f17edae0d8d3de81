"""Exports of the recorded models to GGUF, and their files read with the gguf package."""

import json
import shutil
from pathlib import Path

import gguf
import torch
from torch import Tensor

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.full_model import FullModel, open_full_model
from llava_ft.convert.export_gguf import export_gguf, find_files
from llava_ft.convert.gguf_file import GgufContent
from llava_ft.convert.proof import ConversionReport
from tests.conftest import RECORDINGS

LLAVA = "ckpt/llava15-tiny"
ANYRES = "ckpt/llava16-tiny-anyres"


def whole(path: str, base: str | None = None) -> FullModel:
    return open_full_model(identify(Path(path)), base)


def export(path: str, target: Path, dtype: torch.dtype | None = torch.float32, base: str | None = None):
    """Export a model; returns the report and the content of both files."""
    target.mkdir(exist_ok=True)
    report = ConversionReport("export gguf", path, str(target))
    export_gguf(whole(path, base), target, report, dtype)
    language, vision = find_files(target)
    assert vision is not None
    return report, GgufContent(language), GgufContent(vision)


def changed_copy(source: str, target: Path, **fields: object) -> str:
    """Copy a model with other fields in its configuration."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | fields
    config["mm_vision_tower"] = str(RECORDINGS / "ckpt" / "clip-tiny")
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def values(file: Path) -> dict[str, tuple[str, Tensor]]:
    """Read a file with the gguf package alone: type and float32 values of each tensor, rows as they lie there."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (tensor.tensor_type.name, torch.from_numpy(floats.copy()).reshape(shape))
    return found
