"""Which weight files of a directory count: those that this program would read, where several hold the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from llava_ft.checkpoint.describe.files import is_weight_file
from llava_ft.checkpoint.names import (
    ADAPTER_ALL_BIN,
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    ADAPTER_SAFETENSORS,
    CONFIG,
    NON_LORA_BIN,
    NON_LORA_SAFETENSORS,
    PROJECTOR_BIN,
    PROJECTOR_SAFETENSORS,
)
from llava_ft.checkpoint.weights import read_json
from llava_ft.errors import CheckpointError

_WHOLE_MODELS: Final = ("model.safetensors", "pytorch_model.bin")


@dataclass
class Selection:
    """The weight files of a directory.

    Attributes:
        files: All of them.
        read: Those that count.
        beside: Why others do not.
        missing: Files that an index names and that are not there.
        problems: What is wrong with an index.
        belongs_together: Whether the files that count are those of one model, adapter or projector.
    """

    files: list[Path] = field(default_factory=list[Path])
    read: list[Path] = field(default_factory=list[Path])
    beside: dict[Path, str] = field(default_factory=dict[Path, str])
    missing: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    belongs_together: bool = True


def select_weights(path: Path, index: Path | None = None) -> Selection:
    """Choose the files of a directory that count.

    Args:
        path: The directory.
        index: An index file in it, whose files alone count.
    """
    found = Selection(sorted(entry for entry in path.iterdir() if entry.is_file() and is_weight_file(entry)))
    if index is not None:
        found.read = _shards(index, found)
        found.files = list(found.read)
        return found
    if (path / ADAPTER_CONFIG).is_file():
        _take_first(found, path, (ADAPTER_BIN, ADAPTER_SAFETENSORS, ADAPTER_ALL_BIN))
        _take_first(found, path, (NON_LORA_BIN, NON_LORA_SAFETENSORS))
    else:
        _take_model(found, path)
        if not found.read and not found.missing and (path / CONFIG).is_file():
            _take_first(found, path, (PROJECTOR_BIN, PROJECTOR_SAFETENSORS))
        if (path / CONFIG).is_file() and len(found.files) == 1:
            found.read = list(found.files)
    has_any = bool(found.read or found.missing or found.problems)
    found.belongs_together = has_any or (path / ADAPTER_CONFIG).is_file()
    for file in found.files:
        if file not in found.read:
            found.beside.setdefault(file, "the model's or adapter's own files are")
    return found


def _take_first(found: Selection, path: Path, names: tuple[str, ...]) -> None:
    present = [path / name for name in names if (path / name).is_file()]
    found.read += present[:1]
    for file in present[1:]:
        found.beside[file] = f"{present[0].name} is"


def _take_model(found: Selection, path: Path) -> None:
    """Take the files of a whole model: of several kinds the first, an index before a single file."""
    for name in _WHOLE_MODELS:
        index = path / f"{name}.index.json"
        if index.is_file():
            found.read = _shards(index, found)
            return
        if (path / name).is_file():
            found.read = [path / name]
            return


def _shards(index: Path, found: Selection) -> list[Path]:
    try:
        names = read_json(index).get("weight_map")
    except CheckpointError as error:
        found.problems.append(str(error))
        return []
    if not isinstance(names, dict) or not names:
        found.problems.append(f"{index} has no 'weight_map'. The index is damaged.")
        return []
    shards = sorted({str(name) for name in names.values()})  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType, reportUnknownMemberType]
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        found.problems.append(f"{index} names the shard {outside[0]!r}, which is not in its own directory.")
    inside = [index.parent / name for name in shards if Path(name).name == name]
    lost = [file.name for file in inside if not file.is_file()]
    if lost:
        found.missing.append(
            f"{len(lost)} of {len(shards)} files that {index.name} names are not there: {', '.join(lost[:4])}"
            + (", ..." if len(lost) > 4 else "")
            + ". Copy or download them."
        )
    return [file for file in inside if file.is_file()]
