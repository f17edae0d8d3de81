"""What a file or directory of weights is, in words: what it holds, which base it needs, and what is missing.

Names and shapes are read, values are not. Whatever is damaged or unknown becomes a line of the result; only a path that
does not exist is refused.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from llava_ft.checkpoint.directory import ModelDirectory, read_config
from llava_ft.checkpoint.lineage import LINEAGE
from llava_ft.checkpoint.manifest import read_manifest, what_is_incomplete
from llava_ft.checkpoint.names import ADAPTER_CONFIG, CONFIG, MANIFEST, NON_LORA_BIN, PREPROCESSOR_CONFIG
from llava_ft.checkpoint.restore import lacks_projector
from llava_ft.checkpoint.weights import MODEL_FILES, read_index
from llava_ft.checkpoint.zero.files import find_step_directory, find_step_files
from llava_ft.errors import CheckpointError, UserError, some_of
from llava_ft.inspection.weight_facts import PartSummary, WeightFacts, facts_of, lora_modules, ranges, summarise
from llava_ft.inspection.weight_headers import FileHeader, TensorHeader, is_weight_file, read_header
from llava_ft.json_files import read_json
from llava_ft.models.builder import is_llava_config
from llava_ft.models.families import find_family

_LORA_PARTS: Final = {"LoRA A", "LoRA B", "DoRA magnitudes", "LoRA biases"}
_BESIDE_LAYERS: Final = {"projector", "image newline", "embeddings", "rows of added tokens", "head", "derived"}
_TOWER_PARTS: Final = {"vision tower", "CLIP text half", "derived", "other"}
_LATER_SHARD: Final = re.compile(r".+-\d+-of-(?!00001\b)\d+\.\w+")
_LAYER: Final = re.compile(r"^(?P<stack>model\.layers|.*encoder\.layers)\.(?P<number>\d+)\.(?P<leaf>.+)$")
_OTHERS: Final = re.compile(r"^global_step|\.index\.json$")
"""What tells of weights in a directory beside weight files."""

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class RequiredBase:
    """The base that weights belong to."""

    base: str | None  # its path or name, if the files say it
    fingerprint: str = ""  # of its language model; "" if no file says it
    is_here: bool = False  # whether `base` is a directory on this machine
    hidden_size: int | None = None  # that its language model must have
    num_layers: int | None = None  # that it must have at least
    problem: str = ""  # why the directory that is here does not fit


@dataclass
class Description:
    """What is known of a path."""

    path: Path
    kind: str = "nothing"
    """Short and stable: "lora", "projector", "llava", "language model", "vision tower", "trained beside an adapter",
    "shard", "deepspeed", "several", "tensors" or "nothing"."""
    what: str = ""  # the same as a sentence
    layout: str = ""  # "native" or "hf", as `config.json` or the keys say; "" where that says nothing
    needs: RequiredBase | None = None
    missing: list[str] = field(default_factory=list[str])  # what ought to be there and is not
    lost: list[str] = field(default_factory=list[str])  # what of that are files of weights
    damaged: list[str] = field(default_factory=list[str])  # what cannot be read
    notes: list[str] = field(default_factory=list[str])  # what else a user should know
    files: list[FileHeader] = field(default_factory=list[FileHeader])  # every weight file
    read: list[str] = field(default_factory=list[str])  # names of those that count; others have the same content
    inside: list["Description"] = field(default_factory=list["Description"])
    """Each file and directory inside, where they do not belong together."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing or damaged, here and in what is inside."""
        return not self.missing and not self.damaged and all(one.is_whole for one in self.inside)

    @cached_property
    def tensors(self) -> list[TensorHeader]:
        """The tensors of the files that count. They and what follows from them are fixed once `files` is filled in."""
        return [tensor for file in self.files if file.path.name in self.read for tensor in file.tensors]

    @cached_property
    def facts(self) -> WeightFacts:
        """Sizes that follow from the shapes."""
        return facts_of(self.tensors)

    @cached_property
    def parts(self) -> list[PartSummary]:
        """The tensors, summed up."""
        return summarise(self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Return everything for JSON, where `num_tensors`, `num_values` and `num_bytes` go by their short names."""

        def fields(of: PartSummary | TensorHeader) -> dict[str, Any]:
            return asdict(of, dict_factory=lambda items: {key.removeprefix("num_"): value for key, value in items})

        return {
            "path": str(self.path),
            "kind": self.kind,
            "what": self.what,
            "layout": self.layout or None,
            "facts": self.facts.to_json(),
            "needs": asdict(self.needs) if self.needs is not None else None,
            "whole": self.is_whole,
            "missing": self.missing,
            "damaged": self.damaged,
            "notes": self.notes,
            "files": [
                {
                    "file": file.path.name,
                    "bytes": file.num_bytes,
                    "tensors": len(file.tensors),
                    "read": file.path.name in self.read,
                    "problem": file.problem or None,
                }
                for file in self.files
            ],
            "parts": [fields(part) for part in self.parts],
            "tensors": [fields(tensor) for tensor in self.tensors],
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
    header = read_header(path)
    found = Description(path, files=[header], read=[path.name])
    found.kind, found.layout = _kind_of_tensors(header.tensors, path.name), found.facts.layout
    found.damaged += [header.problem] if header.problem else []
    found.notes += [f"It also holds {some_of(header.others)}, which is no tensor."] if header.others else []
    # What lies beside a file names its base, but says nothing of what the file ought to hold.
    config, adapter_config, _ = _read_settings(path.parent, found.notes)
    _find_base(found, path.parent, config, adapter_config)
    if found.kind != "shard":
        found.missing += _missing_tensors(found, config={}, adapter_config={})
    found.what = _sentence(found, {}, is_file=True)
    return found


def _describe_directory(path: Path, index: Path | None = None) -> Description:
    files, found = _select_files(path, index)
    if not (found.read or found.lost or found.damaged or (path / ADAPTER_CONFIG).is_file()):
        return _describe_each(path, files)
    found.files = [read_header(file) for file in files]
    found.damaged = [file.problem for file in found.files if file.problem] + found.damaged
    found.missing += found.lost
    config, adapter_config, layout = _read_settings(path, found.damaged)
    found.kind = "lora" if adapter_config else _kind_of_tensors(found.tensors)
    if found.kind == "language model" and is_llava_config(config):
        found.kind = "llava"  # whose projector is missing
    found.layout = "hf" if layout == "hf" else found.facts.layout
    _find_base(found, path, config, adapter_config)
    if found.tensors and not found.damaged and not found.lost:
        found.missing += _missing_tensors(found, config, adapter_config)
    found.missing += _missing_files(path, found, config)
    found.what = _sentence(found, config, is_file=False)
    found.notes += [
        f"{f.path.name} also holds {some_of(f.others)}, which is no tensor." for f in found.files if f.others
    ]
    steps = sorted((entry.name for entry in path.glob("checkpoint-*") if entry.is_dir()), key=lambda n: (len(n), n))
    if steps:
        found.notes.append(f"It also holds {len(steps)} checkpoints of the run: {some_of(steps)}.")
    if (path / LINEAGE).is_file():
        found.notes.append(f"`llava-ft inspect lineage {path}` says what it was made from.")
    if any(path.glob("global_step*")):
        found.notes.append("It also holds DeepSpeed's files, to resume from.")
    return found


def _describe_each(path: Path, files: Sequence[Path]) -> Description:
    """Describe a directory whose weight files do not belong together, or that holds none itself."""
    found = Description(path)
    if not files:
        with contextlib.suppress(CheckpointError):  # there are none of DeepSpeed's files, or not all of them
            step = find_step_files(find_step_directory(path))
            num_ranks, stage = len(step.optimizer) or len(step.model), "3" if step.is_divided else "below 3"
            found.kind = "deepspeed"
            found.what = (
                f"DeepSpeed's files of one step, of {num_ranks} ranks with a ZeRO stage {stage}, and no weights beside "
                f"them. `llava-ft consolidate {path}` gets the weights out of them."
            )
            return found
    found.inside = [_describe_file(file) for file in files]
    entries = sorted(path.iterdir())
    for one in entries:
        if one.is_dir() and not one.name.startswith("."):
            inside = [entry for entry in one.iterdir() if is_weight_file(entry) or _OTHERS.search(entry.name)]
            found.inside += [_describe_directory(one)] if inside else []
    if found.inside:
        found.kind = "several"
        found.what = f"{len(found.inside)} files and directories of weights that are described one by one."
    else:
        found.what = "No weights."
        names = some_of([entry.name for entry in entries], 8) or "nothing"
        found.missing.append(f"{path} holds no weight files. It holds {names}.")
    return found


def _select_files(path: Path, index: Path | None = None) -> tuple[list[Path], Description]:
    """Choose the weight files of a directory that count: of several with the same content those that are loaded.

    Returns:
        All weight files (with an index, those that it names), and a description with those that count in `read`, why
        others do not in `notes`, files that an index names and that are not there in `lost`, and what is wrong with an
        index in `damaged`.
    """
    found = Description(index or path)
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and is_weight_file(entry))
    model = index or next((path / name for name in MODEL_FILES if (path / name).is_file()), None)
    if index is None and (path / ADAPTER_CONFIG).is_file():
        adapter = ModelDirectory(path, "lora")
        found.read = [file.name for file in (adapter.adapter_file, adapter.non_lora_file) if file is not None]
    elif model is not None and model.suffix != ".json":
        found.read = [model.name]
    elif model is not None:
        try:
            shards = sorted(set(read_index(model).values()))
        except CheckpointError as error:
            shards: list[str] = []
            found.damaged.append(str(error))
        found.read = [name for name in shards if (path / name).is_file()]
        if lost := [name for name in shards if name not in found.read]:
            names = ", ".join(lost[:4]) + (", ..." if len(lost) > 4 else "")
            found.lost.append(
                f"{len(lost)} of {len(shards)} files that {model.name} names are not there: {names}. Copy or download "
                "them."
            )
    elif (path / CONFIG).is_file():
        projector = ModelDirectory(path, "projector").projector_file
        found.read = [projector.name] if projector is not None else [file.name for file in files if len(files) == 1]
    if index is not None:
        return [path / name for name in found.read], found
    same_stem = {Path(name).stem: name for name in found.read}
    for file in files:
        if file.name not in found.read:
            read = f"{same_stem[file.stem]} is" if file.stem in same_stem else "the model's or adapter's own files are"
            found.notes.append(f"{file.name} is not read: {read}.")
    return files, found


def _read_settings(path: Path, problems: list[str]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read `config.json`, in native fields, `adapter_config.json`, and the layout; what is wrong with them is noted."""
    config: dict[str, Any] = {}
    adapter_config: dict[str, Any] = {}
    layout = ""
    for name in (CONFIG, ADAPTER_CONFIG):
        try:
            if (path / name).is_file() and name == CONFIG:
                config, layout = read_config(path)
            elif (path / name).is_file():
                adapter_config = read_json(path / name)
        except UserError as error:
            problems.append(str(error))
    return config, adapter_config, layout


def _kind_of_tensors(tensors: Sequence[TensorHeader], file_name: str = "") -> str:
    """Name what tensors are; see `Description.kind`."""
    parts = {tensor.part for tensor in tensors}
    if not parts:
        return "nothing"
    if parts & _LORA_PARTS:
        return "lora"
    if _LATER_SHARD.fullmatch(file_name):
        return "shard"
    if "layers" in parts:
        return "llava" if "projector" in parts else "language model"
    if "projector" in parts and parts <= _BESIDE_LAYERS:
        is_of_peft = any(tensor.key.startswith("base_model.") for tensor in tensors)
        return "trained beside an adapter" if is_of_peft or "rows of added tokens" in parts else "projector"
    return "vision tower" if "vision tower" in parts and parts <= _TOWER_PARTS else "tensors"


def _sentence(found: Description, config: Mapping[str, Any], *, is_file: bool) -> str:
    """Say what something is."""
    kind, facts = found.kind, found.facts
    thing = {
        "lora": f"a {'DoRA' if facts.is_dora else 'LoRA'} adapter{f' of rank {facts.rank}' if facts.rank else ''}"
        + (f" on {', '.join(facts.targets)}" if facts.targets else ""),
        "projector": "a projector" + (" and nothing else" if is_file else " with its configuration"),
        "trained beside an adapter": "what was trained beside a LoRA adapter: the projector",
        "llava": "a LLaVA model",
        "language model": "a language model without vision",
        "vision tower": "a vision tower",
        "shard": "one of several files of a model; give the directory or the index to see the whole",
        "tensors": "tensors that are no model, adapter or projector of LLaVA",
        "nothing": "no weights that could be read",
    }[kind]
    if kind == "llava" and found.layout and not is_file:
        thing += " in transformers' own layout" if found.layout == "hf" else " in LLaVA's native layout"
    parts = [thing]
    if facts.projector and kind != "shard":
        widths = f"{facts.projector_in} -> {facts.hidden_size}" if facts.hidden_size else f"from {facts.projector_in}"
        parts.append(f"projector {facts.projector}, {widths}")
    if kind in ("llava", "language model", "lora") and facts.num_layers:
        sizes = [f"{facts.num_layers} layers"]
        sizes += [f"width {facts.hidden_size}"] if facts.hidden_size else []
        sizes += [f"vocabulary {facts.vocab_size}"] if facts.vocab_size else []
        parts.append(("for a " if kind == "lora" else "") + f"language model of {', '.join(sizes)}")
    if facts.tower_layers:
        parts.append(f"vision tower of {facts.tower_layers} layers, width {facts.tower_width}")
    elif kind == "llava" and config.get("mm_vision_tower"):
        parts.append(f"vision tower {config['mm_vision_tower']}, not in it")
    if facts.num_new_rows:
        parts.append(f"{facts.num_new_rows} rows of added tokens")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _find_base(found: Description, path: Path, config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> None:
    """Set which base weights need, and compare sizes with one that is here; fingerprints are left to who loads it."""
    if found.kind not in ("lora", "projector", "trained beside an adapter"):
        return
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        manifest = None
    named = adapter_config.get("base_model_name_or_path") or (manifest.base if manifest is not None else None)
    base = str(named or config.get("_name_or_path") or "") or None
    here = next((one for one in (Path(base), path / base) if one.is_dir()), None) if base else None
    ours, problem = found.facts, ""
    if here is not None:
        theirs = facts_of(t for name in _select_files(here)[1].read for t in read_header(here / name).tensors)
        if ours.hidden_size and theirs.hidden_size and ours.hidden_size != theirs.hidden_size:
            problem = f"{here} does not fit: it is {theirs.hidden_size} wide and not {ours.hidden_size}."
        elif ours.num_layers and theirs.num_layers and ours.num_layers > theirs.num_layers:
            last = ours.num_layers - 1
            problem = f"{here} does not fit: it has {theirs.num_layers} layers, and layer {last} is needed."
    fingerprint = manifest.base_fingerprint if manifest is not None else ""
    found.needs = RequiredBase(base, fingerprint, here is not None, ours.hidden_size, ours.num_layers, problem)
    found.damaged += [problem] if problem else []


def _missing_tensors(found: Description, config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> list[str]:
    """Say which tensors are missing, as far as those that are there and the configuration tell."""
    kind, facts, tensors = found.kind, found.facts, found.tensors
    parts = {tensor.part for tensor in tensors}
    missing: list[str] = []
    modules = lora_modules(tensors)
    for there, absent in (("A", "B"), ("B", "A")):
        if lone := [module for module, pair in modules.items() if there in pair and absent not in pair]:
            missing.append(
                f"LoRA {absent} is missing for {len(lone)} modules that have LoRA {there}, such as {lone[0]}."
            )
    if adapter_config.get("use_dora") or facts.is_dora:
        known = {t.name.partition(".lora_magnitude_vector")[0] for t in tensors if t.part == "DoRA magnitudes"}
        if lone := [module for module in modules if module not in known]:
            missing.append(f"The DoRA magnitude is missing for {len(lone)} modules, such as {lone[0]}.")
    if kind in ("llava", "language model", "vision tower"):
        missing += _missing_layers(tensors, None if kind == "vision tower" else config.get("num_hidden_layers"))
    if kind in ("llava", "language model"):
        needs_head = config and not config.get("tie_word_embeddings")
        needed = ("embeddings", "norm", "head") if needs_head else ("embeddings", "norm")
        missing += [f"There is no tensor of the part {part!r}." for part in needed if part not in parts]
        if is_llava_config(config) or find_family(config) is not None:
            missing += [
                f"{CONFIG} says {name}={config[name]}, but the tensors say {size}."
                for name in ("hidden_size", "intermediate_size", "vocab_size")
                if (size := getattr(facts, name)) is not None and config.get(name) not in (None, size)
            ]
    projector = config.get("mm_projector_type", "identity")
    is_told = facts.projector is not None or "projector" not in parts  # else it is of a kind that its names do not tell
    if kind in ("llava", "projector") and is_told and projector not in ("identity", facts.projector):
        there = "There is no projector, though" if not facts.projector else f"The projector is {facts.projector}, but"
        missing.append(f"{there} {CONFIG} says mm_projector_type={projector}.")
    if kind == "llava" and "unpad" in str(config.get("mm_patch_merge_type")) and "image newline" not in parts:
        missing.append(f"There is no image_newline, which mm_patch_merge_type={config['mm_patch_merge_type']} needs.")
    return missing


def _missing_layers(tensors: Sequence[TensorHeader], num_layers: int | None) -> list[str]:
    """Find layers that lack what their neighbours have, and numbers that are left out."""
    stacks: dict[str, dict[str, set[int]]] = {}
    for tensor in tensors:
        if tensor.part in ("layers", "vision tower") and (match := _LAYER.match(tensor.name)):
            stacks.setdefault(match["stack"], {}).setdefault(match["leaf"], set()).add(int(match["number"]))
    missing: list[str] = []
    for stack, leaves in stacks.items():
        everywhere = set(range(max(max(numbers) for numbers in leaves.values()) + 1))
        if stack == "model.layers" and num_layers:
            everywhere |= set(range(num_layers))
        gaps = {leaf: everywhere - numbers for leaf, numbers in leaves.items() if everywhere - numbers}
        whole = set[int].intersection(*gaps.values()) if len(gaps) == len(leaves) else set[int]()
        if whole:
            missing.append(f"Layers {ranges(whole)} of {stack} are missing.")
        for leaf, numbers in gaps.items():
            if numbers - whole and len(numbers - whole) * 2 <= len(everywhere):
                missing.append(f"{stack}.{ranges(numbers - whole)}.{leaf} is missing.")
    return missing


def _missing_files(path: Path, found: Description, config: Mapping[str, Any]) -> list[str]:
    """Say which files of a directory are missing: those without which this program refuses it or has to guess."""
    kind, is_model = found.kind, found.kind in ("llava", "language model")
    missing: list[str] = []
    if (path / MANIFEST).is_file() and (incomplete := what_is_incomplete(path)) is not None:
        missing.append(f"It is not complete: {incomplete}.")
    if (is_model or kind in ("vision tower", "projector")) and not (path / CONFIG).is_file():
        missing.append(f"There is no {CONFIG}. Copy it from where the weights come from.")
    if is_model and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        tokenizers = " nor ".join(_TOKENIZER_FILES)
        missing.append(f"There is no tokenizer: neither {tokenizers}. Copy it from the base model.")
    if kind in ("llava", "vision tower") and any(part.part == "vision tower" for part in found.parts):
        tower = config.get("mm_vision_tower")
        places = [path, *([Path(tower), path / tower] if isinstance(tower, str) else [])]
        if not any((place / PREPROCESSOR_CONFIG).is_file() for place in places):
            missing.append(
                f"There is no {PREPROCESSOR_CONFIG}, which says how images are prepared. Copy it from the vision tower."
            )
    if kind == "lora" and (path / ADAPTER_CONFIG).is_file():
        directory = ModelDirectory(path, "lora", dict(config))
        if directory.adapter_file is None:
            missing.append("There is adapter_config.json, but neither adapter_model.bin nor adapter_model.safetensors.")
        elif (keys := [tensor.key for tensor in found.tensors]) and (
            directory.non_lora_file is None and lacks_projector(directory, keys)
        ):
            missing.append(
                f"There is no projector beside the adapter ({NON_LORA_BIN}), though one was trained with it. Original "
                "LLaVA leaves it out of its intermediate checkpoints; `llava-ft consolidate` gets it out of "
                "DeepSpeed's files."
            )
    return missing
