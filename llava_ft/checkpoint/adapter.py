"""A LoRA adapter as arithmetic: for each weight of the base model, what the adapter makes of it.

Source: LoRA (arXiv:2106.09685), equation 3, W + (alpha / r) B A; rsLoRA (arXiv:2312.03732) divides by sqrt(r); DoRA
(arXiv:2402.09353), equation 5, gives each row of that sum, all weights into one output, a trained length. Everything is
computed in float32, a block of rows at a time, and rounded once.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import regex
import torch
from peft import LoraConfig

from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.fields import AdapterFields
from llava_ft.checkpoint.names import ADAPTER_CONFIG, EMBEDDINGS, HEAD, NEW_ROWS_SUFFIX, is_derived, plain_name
from llava_ft.checkpoint.overrides import Force
from llava_ft.checkpoint.restore import trained_files
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.errors import CheckpointError, some_of
from llava_ft.json_files import read_json
from llava_ft.models.parts import DECODER_LAYER

_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|magnitude_vector(?:\.weight)?)")
_VALUES_PER_BLOCK = 2**20
_SECONDS_OF_PATTERN = 1.0

_NEUTRAL_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of PEFT's `init_lora_weights` that leave the base's weights alone. Others (pissa, olora, corda, loftq, lora_ga
and the like) change the base at the start of training, so the files' matrices belong to weights that are nowhere."""

_OTHER_METHODS = (
    "alora_invocation_tokens", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Settings of PEFT with which the matrices mean something else than a low-rank change of a linear layer."""


@dataclass(frozen=True)
class LoraAdapter:
    """The LoRA matrices of a directory; mappings are by native name.

    Attributes:
        beside: The files that hold the matrices and what was trained beside them, under keys of `replaced`.
        replaced: For each of these files the native names, by key, of the values that replace the base's.
        use_rslora: Whether alpha is divided by the root of the rank.
        factors: A `(r, in)` and B `(out, r)`, as on disk, for each weight they change.
        alphas: `lora_alpha` of each such weight.
        scales: Factor of B A for each.
        magnitudes: With DoRA: the length of each row of the weight, `(out,)`.
        biases: With `lora_bias`: what is added to the bias of a layer, `(out,)` float32.
    """

    path: Path
    config: Mapping[str, Any]  # PEFT's settings
    beside: Sequence[WeightFiles]
    replaced: Sequence[Mapping[str, str]]
    use_rslora: bool
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict[str, tuple[torch.Tensor, torch.Tensor]]
    )
    alphas: dict[str, float] = field(default_factory=dict[str, float])
    scales: dict[str, float] = field(default_factory=dict[str, float])
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    biases: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @classmethod
    def read(cls, directory: ModelDirectory, *, force: Force = False) -> "LoraAdapter":
        """Read an adapter directory; `force` as for `trained_files`.

        Raises:
            CheckpointError: It is incomplete, damaged, or of a kind that cannot be merged.
        """
        config = read_json(directory.path / ADAPTER_CONFIG, AdapterFields)
        _refuse_other_kinds(config, directory.path)
        files = trained_files(directory, force=force)
        parts, name_in_file = _lora_parts(files[0])
        _check_complete(files[0], parts, bool(config.get("use_dora")))
        adapter = cls(directory.path, config, files, replacements(files), bool(config.get("use_rslora")))
        for module, found in parts.items():
            name, rank = f"{module}.weight", found["A.weight"].shape[0]
            adapter.factors[name] = found["A.weight"], found["B.weight"]
            if rank != (said := adapter.setting("r", "rank_pattern", name_in_file[module])):
                raise CheckpointError(
                    f"{directory.path} does not fit together: the matrices of {module} have the rank {rank}, and "
                    f"{ADAPTER_CONFIG} says r={said}. Copy both files again."
                )
            adapter.alphas[name] = adapter.setting("lora_alpha", "alpha_pattern", name_in_file[module])
            adapter.scales[name] = adapter.alphas[name] / (rank**0.5 if adapter.use_rslora else rank)
            if config.get("use_dora"):
                adapter.magnitudes[name] = found["magnitude_vector"]
            if "B.bias" in found:
                adapter.biases[f"{module}.bias"] = adapter.scales[name] * found["B.bias"].float()
        return adapter

    def setting(self, name: str, pattern_name: str, module: str) -> Any:
        """Return a setting of a module: that of the first pattern that fits its name in the file, as in PEFT."""
        patterns: Mapping[str, Any] = self.config.get(pattern_name) or {}
        fitting = (value for text, value in patterns.items() if _matches(rf"(.*\.)?({text})$", module, self.path))
        return next(fitting, self.config[name])

    @property
    def changed(self) -> set[str]:
        """Native names of the parameters that the adapter changes."""
        return {*self.factors, *self.biases}

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a model has every parameter that the adapter changes, in the right shape, and none left out.

        Raises:
            CheckpointError: It has not, or the adapter has no matrices for layers that it says it was trained on.
        """
        unknown = [name for name in self.factors if name not in shapes]
        if unknown:
            raise CheckpointError(
                f"The adapter {self.path} changes {unknown[0]} and {len(unknown) - 1} other weights that the base "
                "model does not have. It belongs to another base model."
            )
        missing = [name for name in self._trained_on(shapes) if name not in self.factors]
        if missing:
            raise CheckpointError(
                f"The adapter {self.path} has no matrices for {some_of(missing)}, which its {ADAPTER_CONFIG} "
                "(target_modules) says were trained: they would keep the base's values. Is its weight file complete?"
            )
        for name, (a, b) in self.factors.items():
            if (b.shape[0], a.shape[1]) != shapes[name]:
                raise CheckpointError(
                    f"The adapter {self.path} changes {name} as a {b.shape[0]} x {a.shape[1]} matrix, but in the base "
                    f"model it is {' x '.join(map(str, shapes[name]))}. It belongs to another base model."
                )
        without = [name for name in self.biases if name not in shapes]
        if without:
            raise CheckpointError(
                f"The adapter {self.path} was trained with lora_bias, which adds to the layers' biases, but "
                f"{without[0].removesuffix('.bias')} and {len(without) - 1} other layers of the base model have none "
                "to hold the sum. Train it without lora_bias."
            )

    def _trained_on(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Name the weights of the decoder's linear layers that the adapter's settings say it was trained on.

        A tower is left out: the original adds it after the adapters, so that settings that fit its layers mean nothing.
        """
        targets: str | list[str] = self.config.get("target_modules") or []
        excluded: str | list[str] = self.config.get("exclude_modules") or []
        layers: int | list[int] | None = self.config.get("layers_to_transform")
        numbers = {layers} if isinstance(layers, int) else set(layers or ())
        found: list[str] = []
        for name, shape in shapes.items():
            layer = re.match(DECODER_LAYER, name)
            if layer is None or len(shape) != 2 or not name.endswith(".weight"):
                continue
            module = name.removesuffix(".weight")
            is_chosen = targets == "all-linear" or self._lists(targets, module)
            if numbers and int(layer[0].split(".")[2]) not in numbers:
                continue
            if is_chosen and not self._lists(excluded, module):
                found.append(name)
        return found

    def _lists(self, modules: str | list[str], module: str) -> bool:
        """Whether a module is among those that a setting names, by PEFT's rules: an expression, or ends of names."""
        if isinstance(modules, str):
            return _matches(modules, module, self.path)
        return any(module == end or module.endswith(f".{end}") for end in modules)


def _matches(pattern: str, name: str, path: Path) -> bool:
    """Whether an expression from a file describes a whole name; one that takes long is refused."""
    try:
        return regex.fullmatch(pattern, name, timeout=_SECONDS_OF_PATTERN) is not None
    except (TimeoutError, regex.error) as error:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} in {path} holds an expression that cannot be used ({error or 'it takes too long'}): "
            f"{pattern[:80]!r}. Get the file from its origin again."
        ) from None


def merged(
    name: str, weight: torch.Tensor, adapters: Sequence[tuple[float, LoraAdapter]], dtype: torch.dtype
) -> torch.Tensor:
    """Put adapters into a parameter, in float32, and round once.

    Args:
        name: Its native name.
        weight: The base's value, `(out, in)`, or `(out,)` for a bias.
        adapters: Adapters that change it, with the weight of each; one with DoRA stands alone.
        dtype: Type of the result.

    Returns:
        The sum, in memory of its own; beside it only blocks of some megabytes are in memory.
    """
    if weight.dim() == 1:
        return (weight.float() + sum(share * adapter.biases[name] for share, adapter in adapters)).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    for rows in row_blocks(weight.shape):
        block = weight[rows].to(torch.float32, copy=True)
        for share, adapter in adapters:
            a, b = adapter.factors[name]
            block.add_(b[rows].float() @ a.float(), alpha=share * adapter.scales[name])
            if name in adapter.magnitudes:
                block.mul_((adapter.magnitudes[name][rows].float() / block.square().sum(dim=1).sqrt())[:, None])
        result[rows] = block
    return result


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Divide the rows of a tensor into blocks of about a million values."""
    values_per_row = max(1, torch.Size(shape[1:]).numel())
    step = max(1, _VALUES_PER_BLOCK // values_per_row)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _lora_parts(files: WeightFiles) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Read the LoRA tensors of each module, and how the files call the module."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    original: dict[str, str] = {}
    wanted: dict[str, re.Match[str]] = {}
    for key in files.tensors:
        if "lora_embedding_" in key:
            raise CheckpointError(
                f"{files.path} holds {key}: LoRA on the embeddings. Only linear layers are merged: an embedding is a "
                "table, whose matrices PEFT stores the other way round, and where the head is tied to it both would "
                "change. Train the rows of new tokens (mm_use_im_start_end) or the whole table (modules_to_save)."
            )
        match = _LORA_KEY.fullmatch(plain_name(key))
        if match is not None:
            wanted[key] = match
        elif ".lora_" in key:
            raise CheckpointError(f"{files.path} holds {key}, which is no LoRA matrix of a linear layer.")
    for key, tensor in files.read(wanted).items():
        module = wanted[key]["module"]
        parts.setdefault(module, {})[wanted[key]["part"].replace("vector.weight", "vector")] = tensor
        original[module] = re.sub(r"^(?:base_model\.model\.)+|\.lora_.*$", "", key)
    return parts, original


def _check_complete(files: WeightFiles, parts: Mapping[str, Mapping[str, torch.Tensor]], use_dora: bool) -> None:
    if not parts:
        raise CheckpointError(f"{files.path} holds no LoRA matrices.")
    lone = [module for module, found in parts.items() if not {"A.weight", "B.weight"} <= set(found)]
    if lone:
        raise CheckpointError(
            f"{files.path} is damaged: {len(lone)} of its modules have only one of the two LoRA matrices, such as "
            f"{lone[0]}.weight."
        )
    uneven = [module for module, found in parts.items() if found["A.weight"].shape[:1] != found["B.weight"].shape[1:]]
    if uneven:
        a, b = parts[uneven[0]]["A.weight"], parts[uneven[0]]["B.weight"]
        raise CheckpointError(
            f"{files.path} is damaged: the two LoRA matrices of {uneven[0]} do not fit each other: A is "
            f"{' x '.join(map(str, a.shape))} and B is {' x '.join(map(str, b.shape))}."
        )
    has_magnitude = [module for module, found in parts.items() if "magnitude_vector" in found]
    if len(has_magnitude) != (len(parts) if use_dora else 0):
        raise CheckpointError(
            f"{files.path} does not fit {ADAPTER_CONFIG} beside it: use_dora is {use_dora}, but "
            f"{len(has_magnitude)} of {len(parts)} modules have a lora_magnitude_vector. Copy both files again."
        )


def replacements(beside: Sequence[WeightFiles]) -> list[dict[str, str]]:
    """Return the native names of the whole tensors beside the LoRA matrices, by their key, for each file.

    Rows of added tokens are put in afterwards; the whole matrices beside them are for other programs.
    """
    names = [{key: plain_name(key) for key in files.tensors if ".lora_" not in key} for files in beside]
    rows = {name for of_file in names for name in of_file.values() if name.endswith(NEW_ROWS_SUFFIX)}
    apart = rows | {name.removesuffix(NEW_ROWS_SUFFIX) + ".weight" for name in rows}
    return [
        {key: name for key, name in of_file.items() if name not in apart and not is_derived(name)} for of_file in names
    ]


def rows_of_added_tokens(beside: Sequence[WeightFiles]) -> dict[str, torch.Tensor]:
    """Read the trained rows of added tokens, by the native name of the matrix whose last rows they are."""
    found: dict[str, torch.Tensor] = {}
    for files in beside:
        keys = {plain_name(key): key for key in files.tensors}
        for name in (EMBEDDINGS, HEAD):
            key = keys.get(name.removesuffix(".weight") + NEW_ROWS_SUFFIX)
            if key is not None:
                found[name] = files.read([key])[key]
    return found


def _refuse_other_kinds(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(
            f"{path} holds an adapter of the kind {kind}; only LoRA, rsLoRA and DoRA are supported. Merge it with the "
            "program that made it."
        )
    known = {*LoraConfig.__dataclass_fields__, "auto_map"}  # the latter names code, which is never run
    unknown = [key for key in config if key not in known]
    for setting in (*_OTHER_METHODS, *unknown):
        if config.get(setting):
            raise CheckpointError(
                f"{path} holds an adapter with {setting}={config[setting]!r}, with which its matrices are no plain "
                "change of linear layers; only LoRA, rsLoRA and DoRA are supported. Merge it with the program that "
                "made it."
            )
    if config.get("use_dora") and config.get("lora_bias"):
        raise CheckpointError(
            f"{path} holds an adapter with use_dora and lora_bias, whose bias PEFT scales with each row. It cannot be "
            "written as a linear layer of the base; train it with one of the two."
        )
    start = config.get("init_lora_weights", True)
    if start not in _NEUTRAL_INITIALISATIONS:
        raise CheckpointError(
            f"{path} holds an adapter with init_lora_weights={start!r}: training began by changing the base's weights, "
            "and its matrices belong to those, which are in no file. Convert it to plain LoRA where it was trained "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
