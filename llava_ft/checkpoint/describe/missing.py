"""What ought to be in a file or directory and is not."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llava_ft.checkpoint.describe.facts import facts_of, lora_modules
from llava_ft.checkpoint.describe.files import TensorHeader
from llava_ft.checkpoint.describe.parts import ranges
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.manifest import what_is_incomplete
from llava_ft.checkpoint.names import CONFIG, MANIFEST, NON_LORA_BIN, PREPROCESSOR_CONFIG
from llava_ft.checkpoint.restore import lacks_projector
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import UserError
from llava_ft.models.builder import is_llava_config

_LAYER: Final = re.compile(r"^(?P<stack>model\.layers|.*encoder\.layers)\.(?P<number>\d+)\.(?P<leaf>.+)$")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model")


def missing_in_tensors(
    kind: str, tensors: Sequence[TensorHeader], *, config: Mapping[str, Any], adapter_config: Mapping[str, Any]
) -> list[str]:
    """Say which tensors are missing, as far as those that are there and the configuration tell.

    Args:
        kind: See `Description.kind`.
        tensors: All tensors.
        config: Content of `config.json`, in native fields; empty if there is none.
        adapter_config: Content of `adapter_config.json`; empty if there is none.
    """
    parts = {tensor.part for tensor in tensors}
    missing = _incomplete_lora(tensors, bool(adapter_config.get("use_dora")) or "DoRA magnitudes" in parts)
    if kind in ("llava", "language model"):
        missing += _incomplete_layers(tensors, config.get("num_hidden_layers"))
        tied = bool(config.get("tie_word_embeddings"))
        needed = ["embeddings", "norm", *([] if tied or not config else ["head"])]
        missing += [f"There is no tensor of the part {part!r}." for part in needed if part not in parts]
        missing += _other_shapes(tensors, config)
    elif kind == "vision tower":
        missing += _incomplete_layers(tensors, None)
    if kind in ("llava", "projector") and config.get("mm_projector_type", "identity") != "identity":
        missing += _incomplete_projector(tensors, str(config["mm_projector_type"]))
    if kind == "llava" and "unpad" in str(config.get("mm_patch_merge_type")) and "image newline" not in parts:
        missing.append(f"There is no image_newline, which mm_patch_merge_type={config['mm_patch_merge_type']} needs.")
    return missing


def missing_in_directory(
    path: Path, kind: str, tensors: Sequence[TensorHeader], config: Mapping[str, Any]
) -> list[str]:
    """Say which files of a directory are missing: those without which this program refuses it or has to guess."""
    missing: list[str] = []
    if (path / MANIFEST).is_file() and (reason := what_is_incomplete(path)) is not None:
        missing.append(f"It is not complete: {reason}.")
    if kind in ("llava", "language model", "vision tower", "projector") and not (path / CONFIG).is_file():
        missing.append(f"There is no {CONFIG}. Copy it from where the weights come from.")
    if kind in ("llava", "language model") and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        missing.append(f"There is no tokenizer: neither {' nor '.join(_TOKENIZER_FILES)}. Copy it from the base model.")
    has_tower = any(tensor.part == "vision tower" for tensor in tensors)
    if has_tower and kind in ("llava", "vision tower") and not _has_image_settings(path, config):
        missing.append(
            f"There is no {PREPROCESSOR_CONFIG}, which says how images are prepared. Copy it from the vision tower."
        )
    if kind == "lora":
        missing += _missing_beside_adapter(path, tensors)
    return missing


def _missing_beside_adapter(path: Path, tensors: Sequence[TensorHeader]) -> list[str]:
    try:
        directory = identify(path)
        if directory.adapter_file is None:
            return ["There is adapter_config.json, but neither adapter_model.bin nor adapter_model.safetensors."]
        is_alone = bool(tensors) and directory.non_lora_file is None
        if is_alone and lacks_projector(directory, WeightFiles.open(directory.adapter_file)):
            return [
                f"There is no projector beside the adapter ({NON_LORA_BIN}), though one was trained with it. Original "
                "LLaVA leaves it out of its intermediate checkpoints; `llava-ft consolidate` gets it out of "
                "DeepSpeed's files."
            ]
    except UserError:  # said where the files are described
        return []
    return []


def _has_image_settings(path: Path, config: Mapping[str, Any]) -> bool:
    tower = config.get("mm_vision_tower")
    places = [path, *([Path(tower), path / tower] if isinstance(tower, str) else [])]
    return any((place / PREPROCESSOR_CONFIG).is_file() for place in places)


def _incomplete_lora(tensors: Sequence[TensorHeader], has_magnitudes: bool) -> list[str]:
    modules = lora_modules(tensors)
    missing: list[str] = []
    for there, absent in (("A", "B"), ("B", "A")):
        lone = [module for module, pair in modules.items() if there in pair and absent not in pair]
        if lone:
            missing.append(
                f"LoRA {absent} is missing for {len(lone)} modules that have LoRA {there}, such as {lone[0]}."
            )
    if has_magnitudes:
        known = {t.name.partition(".lora_magnitude_vector")[0] for t in tensors if t.part == "DoRA magnitudes"}
        lone = [module for module in modules if module not in known]
        if lone:
            missing.append(f"The DoRA magnitude is missing for {len(lone)} modules, such as {lone[0]}.")
    return missing


def _incomplete_layers(tensors: Sequence[TensorHeader], num_layers: int | None) -> list[str]:
    """Find layers that lack what their neighbours have, and numbers that are left out."""
    stacks: dict[str, dict[str, set[int]]] = {}
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        if match is not None and tensor.part in ("layers", "vision tower"):
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


def _incomplete_projector(tensors: Sequence[TensorHeader], projector_type: str) -> list[str]:
    found = facts_of(tensors).projector
    if found is None:
        return [f"There is no projector, though {CONFIG} says mm_projector_type={projector_type}."]
    if found != projector_type:
        return [f"The projector is {found}, but {CONFIG} says mm_projector_type={projector_type}."]
    return []


def _other_shapes(tensors: Sequence[TensorHeader], config: Mapping[str, Any]) -> list[str]:
    facts, is_llama = facts_of(tensors), is_llava_config(config) or config.get("model_type") == "llama"
    pairs = (
        ("hidden_size", facts.hidden_size),
        ("intermediate_size", facts.intermediate_size),
        ("vocab_size", facts.vocab_size),
    )
    return [
        f"{CONFIG} says {name}={config[name]}, but the tensors say {found}."
        for name, found in pairs
        if is_llama and found is not None and config.get(name) not in (None, found)
    ]
