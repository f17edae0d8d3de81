"""What transformers' layout has no place for, kept beside it so that the way back gives the files it came from.

An exported directory holds a folder `native/` with the small files of its source as they were - configuration,
tokenizer - and `weights.json`: which weight file held which tensors in which order and type, and whether a vision tower
was among them. transformers does not look into folders.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.names import CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, is_derived, native_name
from llava_ft.checkpoint.save import write_json
from llava_ft.checkpoint.weights import WeightFiles, read_json
from llava_ft.data.tokenizer import save_tokenizer
from llava_ft.errors import CheckpointError

NATIVE_FOLDER: Final = "native"
TOKENIZER_FILES: Final = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
)  # fmt: skip
_WEIGHTS: Final = "weights.json"
_SMALL_FILES: Final = (CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, *TOKENIZER_FILES)


@dataclass(frozen=True)
class WeightRecord:
    """The weight files of a native model.

    Attributes:
        files: For each file the tensors in it, in their order, with their type on disk.
        num_rows: Rows of the vocabulary.
        tower: SHA-256 of the vision tower's tensors as they were exported, if the source's own files held none; None if
            they did.
        config: SHA-256 of what the exported `config.json` says.
    """

    files: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    num_rows: int = 0
    tower: str | None = None
    config: str = ""

    @property
    def has_tower(self) -> bool:
        """Whether the files held a vision tower."""
        return self.tower is None


class TensorDigest:
    """A SHA-256 over names, types, shapes and values of tensors, in the order of their names."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a tensor."""
        digest = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().data)
        self._digests[name] = digest.hexdigest()

    def hexdigest(self) -> str:
        """Return the digest of all of them."""
        return hashlib.sha256("".join(self._digests[name] for name in sorted(self._digests)).encode()).hexdigest()


def write_native_record(directory: Path, whole: FullModel, tower: TensorDigest | None) -> None:
    """Keep what a native model's files were like.

    Args:
        directory: The exported directory.
        whole: The model that was exported.
        tower: The tower's tensors, if they came from another directory than the model's.
    """
    source = whole.directory.path
    inherited = whole.base.directory.path / NATIVE_FOLDER
    folder = directory / NATIVE_FOLDER
    folder.mkdir()
    if whole.base.directory.layout == "hf":
        _copy(inherited, folder, TOKENIZER_FILES)
    elif whole.directory.kind == "llava":
        _copy(source, folder, (*_SMALL_FILES, *(path.name for path in source.glob("*.index.json"))))
        record = WeightRecord(
            _layout(whole.base.sources[0].files),
            whole.config.vocab_size - whole.num_new_rows,
            tower.hexdigest() if tower is not None else None,
            _config_digest(directory),
        )
        write_json(folder / _WEIGHTS, asdict(record))
    else:
        save_tokenizer(whole.tokenizer, folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def read_weight_record(directory: Path) -> WeightRecord | None:
    """Return what is known of the native files that an exported model came from; None if nothing is.

    Raises:
        CheckpointError: The record is damaged.
    """
    path = directory / NATIVE_FOLDER / _WEIGHTS
    if not path.is_file():
        return None
    content: dict[str, Any] = read_json(path)
    try:
        record = WeightRecord(
            {str(file): dict(names) for file, names in content["files"].items()},
            int(content["num_rows"]),
            content["tower"],
            str(content["config"]),
        )
        if any(Path(file).name != file for file in record.files):
            raise ValueError("a file is not in the directory")
        return record
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is damaged. Delete it to convert without it, or copy it again.") from None


def config_is_as_exported(directory: Path) -> bool:
    """Whether an exported model's `config.json` says what the export wrote."""
    record = read_weight_record(directory)
    return record is not None and record.config == _config_digest(directory)


def copy_native_files(directory: Path, target: Path, names: Iterable[str]) -> bool:
    """Copy small files of the source that an exported model came from; returns whether there were any."""
    return _copy(directory / NATIVE_FOLDER, target, names)


def _copy(source: Path, target: Path, names: Iterable[str]) -> bool:
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return bool(found)


def _layout(files: WeightFiles) -> dict[str, dict[str, str]]:
    layout: dict[str, dict[str, str]] = {}
    for key, info in files.tensors.items():
        if not is_derived(native_name(key)):
            layout.setdefault(info.file.name, {})[key] = str(info.dtype).removeprefix("torch.")
    return layout


def _config_digest(directory: Path) -> str:
    content = read_json(directory / CONFIG)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
