"""The kind of a file or directory, what it is as a sentence, and which base it needs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from llava_ft.checkpoint.describe.facts import Facts, facts_of
from llava_ft.checkpoint.describe.files import TensorHeader, scan_file
from llava_ft.checkpoint.describe.select_files import select_weights
from llava_ft.checkpoint.manifest import read_manifest
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import is_llava_config

_SHARD: Final = re.compile(r".+-(\d+)-of-(\d+)\.\w+")
_LORA_PARTS: Final = ("LoRA A", "LoRA B", "DoRA magnitudes", "LoRA biases")
_LAYOUTS: Final = {"native": "LLaVA's native layout", "hf": "transformers' own layout"}


@dataclass(frozen=True)
class Needs:
    """The base that weights belong to.

    Attributes:
        base: Its path or name, as the files say it; None if they do not.
        fingerprint: Fingerprint of its language model; "" if no file says it.
        is_here: Whether that path is a directory on this machine.
        hidden_size: Width that its language model must have.
        num_layers: Layers that it must have at least.
        problem: Why the directory that is here does not fit; "" if it does or is not here.
    """

    base: str | None
    fingerprint: str = ""
    is_here: bool = False
    hidden_size: int | None = None
    num_layers: int | None = None
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return asdict(self)


def kind_of_tensors(tensors: Sequence[TensorHeader], file_name: str = "") -> str:
    """Name what tensors are; see `Description.kind`."""
    parts = {tensor.part for tensor in tensors}
    if not parts:
        return "nothing"
    if parts & set(_LORA_PARTS):
        return "lora"
    if _SHARD.fullmatch(file_name) and _SHARD.fullmatch(file_name)[2] != "00001":  # pyright: ignore[reportOptionalSubscript]
        return "shard"
    if "layers" in parts:
        return "llava" if "projector" in parts else "language model"
    if parts <= {"projector", "image newline", "embeddings", "rows of added tokens", "head", "derived"}:
        is_of_peft = any(tensor.key.startswith("base_model.") for tensor in tensors)
        if "projector" in parts:
            return "trained beside an adapter" if is_of_peft or "rows of added tokens" in parts else "projector"
    if "vision tower" in parts and parts <= {"vision tower", "CLIP text half", "derived", "other"}:
        return "vision tower"
    return "tensors"


def kind_of_directory(
    config: Mapping[str, Any], adapter_config: Mapping[str, Any], tensors: Sequence[TensorHeader]
) -> str:
    """Name what a directory is; see `Description.kind`."""
    if adapter_config:
        return "lora"
    kind = kind_of_tensors(tensors)
    if kind == "language model" and is_llava_config(config):
        return "llava"  # whose projector is missing
    return kind


def sentence(
    kind: str, facts: Facts, *, is_file: bool, layout: str = "", config: Mapping[str, Any] | None = None
) -> str:
    """Say what something is.

    Args:
        kind: Its kind.
        facts: Its facts.
        is_file: Whether it is a single file.
        layout: The layout of a whole model.
        config: Content of `config.json`.
    """
    thing = {
        "lora": f"a {'DoRA' if facts.is_dora else 'LoRA'} adapter{f' of rank {facts.rank}' if facts.rank else ''}"
        + (f" on {', '.join(facts.targets)}" if facts.targets else ""),
        "projector": "a projector" + (" and nothing else" if is_file else " with its configuration"),
        "trained beside an adapter": "what was trained beside a LoRA adapter: the projector",
        "llava": "a LLaVA model",
        "language model": "a language model without vision",
        "vision tower": "a CLIP vision tower",
        "shard": "one of several files of a model; give the directory or the index to see the whole",
        "tensors": "tensors that are no model, adapter or projector of LLaVA",
        "nothing": "no weights that could be read",
    }[kind]
    parts = [thing + (f" in {_LAYOUTS[layout]}" if layout and kind == "llava" else "")]
    if facts.projector and kind != "shard":
        tower = f"{facts.projector_in} -> {facts.hidden_size}" if facts.hidden_size else f"from {facts.projector_in}"
        parts.append(f"projector {facts.projector}, {tower}")
    if kind in ("llava", "language model", "lora") and facts.num_layers:
        parts.append(("for a " if kind == "lora" else "") + _language_model(facts))
    if facts.tower_layers:
        parts.append(f"vision tower of {facts.tower_layers} layers, width {facts.tower_width}")
    elif kind == "llava" and config and config.get("mm_vision_tower"):
        parts.append(f"vision tower {config['mm_vision_tower']}, not in it")
    if facts.num_new_rows:
        parts.append(f"{facts.num_new_rows} rows of added tokens")
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def needs_of(
    kind: str, facts: Facts, config: Mapping[str, Any], adapter_config: Mapping[str, Any], path: Path
) -> Needs | None:
    """Say which base weights need; None for what needs none.

    Args:
        kind: Their kind.
        facts: Their facts.
        config: Content of `config.json` beside them.
        adapter_config: Content of `adapter_config.json` beside them.
        path: Their directory.
    """
    if kind not in ("lora", "projector", "trained beside an adapter"):
        return None
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        manifest = None
    named = adapter_config.get("base_model_name_or_path") or (manifest.base if manifest is not None else None)
    base = str(named or config.get("_name_or_path") or "") or None
    here = next((one for one in (Path(base), path / base) if one.is_dir()), None) if base else None
    return Needs(
        base,
        manifest.base_fingerprint if manifest is not None else "",
        here is not None,
        facts.hidden_size,
        facts.num_layers,
        _why_it_does_not_fit(here, facts) if here is not None else "",
    )


def _language_model(facts: Facts) -> str:
    sizes = [f"{facts.num_layers} layers"]
    sizes += [f"width {facts.hidden_size}"] if facts.hidden_size else []
    sizes += [f"vocabulary {facts.vocab_size}"] if facts.vocab_size else []
    return "language model of " + ", ".join(sizes)


def _why_it_does_not_fit(base: Path, facts: Facts) -> str:
    """Compare an adapter's or projector's sizes with those of its base; fingerprints are left to those who load it."""
    tensors = [tensor for file in select_weights(base).read for tensor in scan_file(file).tensors]
    theirs = facts_of(tensors)
    if facts.hidden_size and theirs.hidden_size and facts.hidden_size != theirs.hidden_size:
        return f"{base} does not fit: it is {theirs.hidden_size} wide and not {facts.hidden_size}."
    if facts.num_layers and theirs.num_layers and facts.num_layers > theirs.num_layers:
        return f"{base} does not fit: it has {theirs.num_layers} layers, and layer {facts.num_layers - 1} is needed."
    return ""
