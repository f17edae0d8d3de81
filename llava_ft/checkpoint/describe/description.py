"""What a file or directory of weights is, in words: what it holds, which base it needs, and what is missing.

Names and shapes are read, values are not. Whatever is damaged or unknown becomes a line of the result; only a path that
does not exist is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_ft.checkpoint.describe.facts import Facts, facts_of
from llava_ft.checkpoint.describe.files import FileScan, TensorHeader, is_weight_file, scan_file
from llava_ft.checkpoint.describe.missing import missing_in_directory, missing_in_tensors
from llava_ft.checkpoint.describe.parts import PartSummary, summarise
from llava_ft.checkpoint.describe.select_files import Selection, select_weights
from llava_ft.checkpoint.describe.words import Needs, kind_of_directory, kind_of_tensors, needs_of, sentence
from llava_ft.checkpoint.directory import read_config
from llava_ft.checkpoint.lineage import LINEAGE
from llava_ft.checkpoint.names import ADAPTER_CONFIG, CONFIG
from llava_ft.checkpoint.weights import read_json
from llava_ft.checkpoint.zero.files import find_step_directory, find_step_files
from llava_ft.errors import CheckpointError, UserError, some_of


@dataclass
class Description:
    """What is known of a path.

    Attributes:
        path: The path.
        kind: What it holds, short and stable: "lora", "projector", "llava", "language model", "vision tower",
            "trained beside an adapter", "shard", "deepspeed", "several", "tensors" or "nothing".
        what: The same as a sentence.
        layout: "native" or "hf", as `config.json` or the keys say; "" where that says nothing.
        facts: Sizes that follow from the shapes.
        needs: The base it belongs to, if it needs one.
        missing: What ought to be there and is not.
        lost: What of that are files of weights.
        damaged: What cannot be read.
        notes: What else a user should know.
        files: Every weight file.
        read: Names of the files that count, where there are several with the same content.
        parts: Their tensors, summed up.
        inside: Each file and directory inside, where they do not belong together.
    """

    path: Path
    kind: str
    what: str = ""
    layout: str = ""
    facts: Facts = field(default_factory=Facts)
    needs: Needs | None = None
    missing: list[str] = field(default_factory=list[str])
    lost: list[str] = field(default_factory=list[str])
    damaged: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    files: list[FileScan] = field(default_factory=list[FileScan])
    read: list[str] = field(default_factory=list[str])
    parts: list[PartSummary] = field(default_factory=list[PartSummary])
    inside: list["Description"] = field(default_factory=list["Description"])

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing or damaged, here and in what is inside."""
        return not self.missing and not self.damaged and all(one.is_whole for one in self.inside)

    @property
    def tensors(self) -> list[TensorHeader]:
        """The tensors of the files that count."""
        return [tensor for scan in self.files if scan.path.name in self.read for tensor in scan.tensors]

    def to_json(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "what": self.what,
            "layout": self.layout or None,
            "facts": self.facts.to_json(),
            "needs": self.needs.to_json() if self.needs is not None else None,
            "whole": self.is_whole,
            "missing": self.missing,
            "damaged": self.damaged,
            "notes": self.notes,
            "files": [
                {
                    "file": scan.path.name,
                    "bytes": scan.num_bytes,
                    "tensors": len(scan.tensors),
                    "read": scan.path.name in self.read,
                    "problem": scan.problem or None,
                }
                for scan in self.files
            ],
            "parts": [part.to_json() for part in self.parts],
            "tensors": [
                {
                    "key": tensor.key,
                    "name": tensor.name,
                    "part": tensor.part,
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype,
                    "bytes": tensor.num_bytes,
                    "file": tensor.file,
                }
                for tensor in self.tensors
            ],
            "inside": [one.to_json() for one in self.inside],
        }


def describe(path: Path) -> Description:
    """Describe a weight file, an index file or a directory.

    Raises:
        CheckpointError: It does not exist, or is a file of another kind.
    """
    if path.is_dir():
        return _describe_directory(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Give a weight file, an index file or a directory.")
    if path.name.endswith(".index.json"):
        return _describe_directory(path.parent, index=path)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} is a GGUF file of llama.cpp; .bin and .safetensors files are described.")
    return _describe_file(path)


def _describe_file(path: Path) -> Description:
    scan = scan_file(path)
    kind = kind_of_tensors(scan.tensors, path.name)
    facts = facts_of(scan.tensors)
    found = Description(path, kind, files=[scan], read=[path.name], parts=summarise(scan.tensors), facts=facts)
    found.layout = facts.layout
    found.damaged += [scan.problem] if scan.problem else []
    if scan.others:
        found.notes.append(f"It also holds {some_of(scan.others)}, which is no tensor.")
    config, adapter_config = _settings(path.parent, found, is_beside=True)
    _set_needs(found, config, adapter_config, path.parent)
    if kind != "shard":
        found.missing += missing_in_tensors(kind, scan.tensors, config={}, adapter_config={})
    found.what = sentence(kind, facts, is_file=True)
    return found


def _describe_directory(path: Path, index: Path | None = None) -> Description:
    selection = select_weights(path, index)
    if not selection.belongs_together:
        return _describe_each(path, selection.files)
    scans = [scan_file(file) for file in selection.files]
    found = Description(index or path, "nothing", files=scans, read=[file.name for file in selection.read])
    found.damaged += [scan.problem for scan in scans if scan.problem]
    found.damaged += selection.problems
    found.lost += selection.missing
    found.missing += selection.missing
    config, adapter_config = _settings(path, found)
    tensors = found.tensors
    found.facts, found.parts = facts_of(tensors), summarise(tensors)
    found.kind = kind_of_directory(config, adapter_config, tensors)
    found.layout = "hf" if _is_hf(path, config) else found.facts.layout
    _set_needs(found, config, adapter_config, path)
    if tensors and not found.damaged and not selection.missing:
        found.missing += missing_in_tensors(found.kind, tensors, config=config, adapter_config=adapter_config)
    found.missing += missing_in_directory(path, found.kind, tensors, config)
    found.notes += _notes(path, selection, scans)
    found.what = sentence(found.kind, found.facts, is_file=False, layout=found.layout, config=config)
    return found


def _describe_each(path: Path, files: Sequence[Path]) -> Description:
    """Describe a directory whose weight files do not belong together, or that holds none itself."""
    if not files and (step := _describe_step(path)) is not None:
        return step
    directories = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    inside = [_describe_file(file) for file in files]
    inside += [_describe_directory(entry) for entry in directories if _may_hold_weights(entry)]
    found = Description(path, "several" if inside else "nothing", inside=inside)
    if inside:
        found.what = f"{len(inside)} files and directories of weights that are described one by one."
    else:
        names = sorted(entry.name for entry in path.iterdir())
        found.what = "No weights."
        found.missing.append(f"{path} holds no weight files. It holds {some_of(names, 8) or 'nothing'}.")
    return found


def _describe_step(path: Path) -> Description | None:
    """Describe a directory that holds DeepSpeed's files and no weights beside them."""
    try:
        files = find_step_files(find_step_directory(path))
    except CheckpointError:
        return None
    num_ranks, stage = len(files.optimizer) or len(files.model), "3" if files.is_divided else "below 3"
    found = Description(path, "deepspeed")
    found.what = (
        f"DeepSpeed's files of one step, of {num_ranks} ranks with a ZeRO stage {stage}, and no weights beside them. "
        f"`llava-ft consolidate {path}` gets the weights out of them."
    )
    return found


def _may_hold_weights(path: Path) -> bool:
    return any(
        is_weight_file(entry) or entry.name.startswith("global_step") or entry.name.endswith(".index.json")
        for entry in path.iterdir()
    )


def _set_needs(
    found: Description, config: Mapping[str, Any], adapter_config: Mapping[str, Any], directory: Path
) -> None:
    found.needs = needs_of(found.kind, found.facts, config, adapter_config, directory)
    if found.needs is not None and found.needs.problem:
        found.damaged.append(found.needs.problem)


def _settings(path: Path, found: Description, *, is_beside: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read `config.json`, in native fields, and `adapter_config.json`; what is wrong with them is noted."""
    config: dict[str, Any] = {}
    adapter_config: dict[str, Any] = {}
    try:
        if (path / CONFIG).is_file():
            config, _ = read_config(path)
    except UserError as error:
        (found.notes if is_beside else found.damaged).append(str(error))
    try:
        if (path / ADAPTER_CONFIG).is_file():
            adapter_config = read_json(path / ADAPTER_CONFIG)
    except CheckpointError as error:
        (found.notes if is_beside else found.damaged).append(str(error))
    return config, adapter_config


def _is_hf(path: Path, config: Mapping[str, Any]) -> bool:
    if not config:
        return False
    try:
        return read_config(path)[1] == "hf"
    except UserError:
        return False


def _notes(path: Path, selection: Selection, scans: Sequence[FileScan]) -> list[str]:
    notes = [f"{file.name} is not read: {reason}." for file, reason in selection.beside.items()]
    notes += [
        f"{scan.path.name} also holds {some_of(scan.others)}, which is no tensor." for scan in scans if scan.others
    ]
    steps = sorted((entry.name for entry in path.glob("checkpoint-*") if entry.is_dir()), key=lambda n: (len(n), n))
    if steps:
        notes.append(f"It also holds {len(steps)} checkpoints of the run: {some_of(steps)}.")
    if (path / LINEAGE).is_file():
        notes.append(f"`llava-ft inspect lineage {path}` says what it was made from.")
    if any(path.glob("global_step*")):
        notes.append("It also holds DeepSpeed's files, to resume from.")
    return notes
