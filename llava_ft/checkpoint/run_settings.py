"""What is known of a run besides its weights, when its checkpoint may have lost everything but DeepSpeed's files.

Settings are looked for in the checkpoint, then in what belongs to the same run: its output directory and its other
checkpoints. What is not found follows, as far as it can, from the names and shapes of the trained tensors.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from peft import LoraConfig

from llava_ft.checkpoint.manifest import Manifest, read_manifest
from llava_ft.checkpoint.names import (
    ADAPTER_CONFIG,
    CONFIG,
    EMBEDDINGS,
    MANIFEST,
    PREPROCESSOR_CONFIG,
    PROJECTOR_PREFIX,
    RUN_CONFIG,
    TRAINABLE_TABLE,
)
from llava_ft.checkpoint.resume import checkpoints_by_step
from llava_ft.checkpoint.save import adapter_config_fields
from llava_ft.constants import ORIGINAL_DEFAULTS
from llava_ft.errors import CheckpointError, UserError
from llava_ft.json_files import read_json
from llava_ft.models.builder import is_llava_config
from llava_ft.models.families import find_family, known_families
from llava_ft.models.parts import DECODER_LAYER

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_OTHER_FILES = (PREPROCESSOR_CONFIG, RUN_CONFIG, TRAINABLE_TABLE, "generation_config.json")

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of trained tensors by native name."""


@dataclass(frozen=True)
class RunSettings:
    """What was found; a file that is not there gives an empty mapping."""

    places: tuple[Path, ...]  # directories of the run, the checkpoint first
    flags_file: Path | None  # that of the user, or the run's `run_config.yaml`
    flags: Mapping[str, Any]
    adapter_file: Path | None
    adapter_config: Mapping[str, Any]
    config: Mapping[str, Any]
    manifest: Manifest | None

    def copy_files(self, target: Path, *, tokenizer_from: Path | None = None) -> None:
        """Copy tokenizer, image settings and records of the run, each from the first place that has it.

        If the run left no tokenizer, it is taken from `tokenizer_from`.
        """
        extra = (tokenizer_from,) if tokenizer_from is not None else ()
        home = _first((*self.places, *extra), _TOKENIZER_FILES[0])
        found = [] if home is None else [home.parent / name for name in _TOKENIZER_FILES]
        for file in (*found, *(_first(self.places, name) for name in _OTHER_FILES)):
            if file is not None and file.is_file():
                shutil.copyfile(file, target / file.name)


def find_settings(checkpoint: Path, step_directory: Path, config_file: Path | None) -> RunSettings:
    """Look for what a run left behind, from what the user named: a checkpoint, or the `global_stepN` in it.

    A `config_file` of the user's comes before the one that the run left.

    Raises:
        UserError: A file is damaged.
    """
    places: tuple[Path, ...] = ()
    for place in (checkpoint.resolve(), *([checkpoint.resolve().parent] if checkpoint == step_directory else [])):
        # If its name says that it is a checkpoint, so is what else its run wrote, the newest first.
        siblings = checkpoints_by_step(place.parent)
        others = (place.parent, *(path for path in siblings if path != place)) if place in siblings else ()
        places += (place, *others)
    adapter, config, manifest = (_first(places, name) for name in (ADAPTER_CONFIG, CONFIG, MANIFEST))
    flags_file = config_file or _first(places, RUN_CONFIG)
    flags: dict[Any, Any] = {}
    if flags_file is not None:
        try:
            content = yaml.safe_load(flags_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"The configuration {flags_file} cannot be read: {error}. Give the run's YAML file."
            ) from None
        if not isinstance(content, dict):
            raise UserError(
                f"{flags_file} is no configuration: it holds no `key: value` lines. Give the run's YAML file."
            )
        flags = cast("dict[Any, Any]", content)
    return RunSettings(
        places=places,
        flags_file=flags_file,
        flags={  # values written as text, such as "False", are converted
            str(key).replace("-", "_"): yaml.safe_load(value) if isinstance(value, str) and value else value
            for key, value in flags.items()
        },
        adapter_file=adapter,
        adapter_config=read_json(adapter) if adapter is not None else {},
        config=read_json(config) if config is not None else {},
        manifest=read_manifest(manifest.parent) if manifest is not None else None,
    )


def settle_adapter_config(
    settings: RunSettings, shapes: Shapes, *, lora_alpha: int | None, base: str
) -> tuple[dict[str, Any], list[str]]:
    """Return the content of `adapter_config.json`: as it was found, or inferred.

    `lora_alpha` is what the user gave; `base` is "" if unknown. The second value says what was inferred.

    Raises:
        UserError: `lora_alpha` is known nowhere, or what was found contradicts the tensors.
    """
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    listed = ", ".join(map(str, sorted(ranks)))
    if settings.adapter_config:
        fields = dict(settings.adapter_config)
        patterns: dict[str, int] = fields.get("rank_pattern") or {}
        if not ranks <= {fields.get("r"), *patterns.values()}:
            raise CheckpointError(
                f"{settings.adapter_file} describes an adapter of rank {fields.get('r')}, but the one in the shards "
                f"has {listed}. It is of another run; move it away, and give --lora-alpha or --config instead."
            )
        if lora_alpha is not None and lora_alpha != fields.get("lora_alpha"):
            raise UserError(
                f"--lora-alpha is {lora_alpha}, but {settings.adapter_file} says {fields.get('lora_alpha')}. Leave the "
                "flag out, or move the file away if it is of another run."
            )
        return fields | ({"base_model_name_or_path": base} if base else {}), []
    if len(ranks) != 1:
        raise CheckpointError(
            f"The adapter's matrices have the ranks {listed}; without {ADAPTER_CONFIG} it is unknown which has which "
            "scale. Put the file beside the shards."
        )
    (rank,) = ranks
    flags = settings.flags
    if (told := flags.get("lora_r")) is not None and int(told) != rank:
        raise UserError(
            f"lora_r is {told} in the configuration ({settings.flags_file}), but the adapter's rank is {rank}. It is "
            "the configuration of another run; give this one's with --config."
        )
    alpha = lora_alpha if lora_alpha is not None else flags.get("lora_alpha")
    if alpha is None:
        raise UserError(
            f"lora_alpha, the scale of the adapter, is not in the shards, and no {ADAPTER_CONFIG} or {RUN_CONFIG} is "
            f"left that says it. The adapter's rank is {rank}. Give what the run used with --lora-alpha N, or a "
            "configuration that names it with --config FILE.yaml."
        )
    modules = sorted({name.split(".lora_A.")[0] for name in shapes if ".lora_A." in name})
    matches = [match for name in modules if (match := _LAYER.fullmatch(name))]
    leaves = sorted({match[2] for match in matches})
    target_modules: str | list[str] = modules
    if len(matches) == len(modules) == len({match[1] for match in matches}) * len(leaves):
        # Every layer of the decoder has the same ones: one regular expression says it.
        target_modules = DECODER_LAYER + "(?:" + "|".join(map(re.escape, leaves)) + ")"
    trains_bias = any(name.endswith(".bias") and name.startswith("model.layers.") for name in shapes)
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha),
        lora_dropout=float(flags.get("lora_dropout") or 0.0),
        bias=flags.get("lora_bias") or ("all" if trains_bias else "none"),
        target_modules=target_modules,
        use_dora=any("lora_magnitude_vector" in name for name in shapes),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base or None,
    )
    told = "--lora-alpha" if lora_alpha is not None else settings.flags_file
    return adapter_config_fields(config), [
        f"{ADAPTER_CONFIG}: r {rank} and {len(modules)} target modules from the tensors, lora_alpha {alpha} from {told}"
    ]


def settle_model_config(settings: RunSettings, shapes: Shapes, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `config.json`; empty if too little is known. `base_config` is empty if unknown."""
    if settings.config:
        return dict(settings.config)
    if settings.flags_file is None and not is_llava_config(base_config):
        return {}
    # Without a base nothing names the language model; files of that kind are of the original's LLaMA.
    family = find_family(base_config) or known_families()[0]
    fields = {**base_config, "model_type": family.llava_types[0], "architectures": [family.model_class.__name__]}
    for key, default in ORIGINAL_DEFAULTS.items():
        flag = settings.flags.get(key)
        fields[key] = flag if flag is not None else base_config.get(key, default)
    for key in ("image_grid_pinpoints", "s2_scales"):
        if settings.flags.get(key) is not None:
            fields[key] = settings.flags[key]
    fields["s2"] = bool(fields.get("s2") or settings.flags.get("s2_scales"))
    fields["mm_vision_tower"] = settings.flags.get("vision_tower") or base_config.get("mm_vision_tower")
    fields["use_mm_proj"] = fields["mm_vision_tower"] is not None
    if EMBEDDINGS in shapes:
        fields["vocab_size"] = shapes[EMBEDDINGS][0]
    names = [name for name in shapes if name.startswith(PROJECTOR_PREFIX) and not name.endswith("bias")]
    # Of another kind of projector the flags have to tell the name.
    if names and all(re.fullmatch(r"(?:\d+\.)?weight", name.removeprefix(PROJECTOR_PREFIX)) for name in names):
        is_linear = names == [f"{PROJECTOR_PREFIX}weight"]
        fields["mm_projector_type"] = "linear" if is_linear else f"mlp{len(names)}x_gelu"
        fields["mm_hidden_size"] = shapes[names[0]][1]
    return fields


def _first(places: Iterable[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)
