"""Writing what a run has trained, so that nothing is missing and nothing half-written is ever taken for complete.

A LoRA directory holds two weight files: `adapter_model.bin` with the LoRA weights and `non_lora_trainables.bin` with
everything else that was trained. A projector directory holds `mm_projector.bin`, a full one the whole model. Files are
written into a staging directory and then moved; the manifest comes last.
"""

import json
import math
import os
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] - a bare PathLike

from llava_ft.checkpoint.manifest import sync_file
from llava_ft.checkpoint.names import (
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    EMBEDDINGS,
    NEW_ROWS_SUFFIX,
    NON_LORA_BIN,
    PROJECTOR_BIN,
    adapter_name,
)  # fmt: skip
from llava_ft.checkpoint.weights import SAFETENSORS_DTYPES
from llava_ft.errors import UserError
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.parts import LANGUAGE_MODEL, module_part, part_of
from llava_ft.tuning.plan import TuningPlan

ResultKind = Literal["lora", "projector", "full"]
"""What a run's directory holds: an adapter with what was trained beside it, a projector, or a whole model."""
WEIGHT_FILES: Final[Mapping[ResultKind, Sequence[str]]] = {
    "lora": ("adapter_config.json", "adapter_model*", "non_lora_trainables.*"),
    "projector": ("mm_projector.*",),
    "full": ("model.safetensors*", "model-*.safetensors", "pytorch_model*.bin*"),
}
"""Patterns of the files by which the kind of a directory is known."""
WeightsFormat = Literal["auto", "bin", "safetensors", "both"]
"""Kind of the files: pickles, safetensors, or each. `auto` is .bin, as in the original, but for whole models."""
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of each tensor of a model."""

_PEFT_0_10_KEYS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
))  # fmt: skip
"""What `adapter_config.json` held in PEFT 0.10, which refuses any other key."""


def result_kind(plan: TuningPlan) -> ResultKind:
    """Say which files hold what a run trains.

    A projector's file has room for token rows beside it. So where neither the language model nor token rows are
    trained (`freeze_backbone`), the whole model is written: the rows of added tokens are in its matrices alone.
    """
    return "lora" if plan.has_lora else "projector" if plan.new_rows else "full"


def write_result(
    directory: Path | None,
    kind: ResultKind,
    layout: Layout,
    values: Iterable[tuple[str, torch.Tensor]],
    *,
    weights_format: WeightsFormat = "auto",
    adapter_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the weights of a run.

    Args:
        directory: Where to; None on a rank that takes part in putting values together and does not write.
        kind: What the directory is to hold.
        layout: Shapes and types that a whole model is written with.
        values: Names in the model, the PEFT model for LoRA, and whole values. For LoRA a frozen matrix whose rows of
            added tokens were trained is among them: original LLaVA needs it whole, with these rows in it.
        weights_format: Kind of files.
        adapter_config: Content of `adapter_config.json`.
        max_shard_bytes: Size of a whole model's shards.
    """
    formats: Mapping[WeightsFormat, tuple[Literal["bin", "safetensors"], ...]] = {
        "auto": ("safetensors",) if kind == "full" else ("bin",),
        "bin": ("bin",),
        "safetensors": ("safetensors",),
        "both": ("safetensors", "bin"),
    }
    if kind == "full":
        writers = [
            ShardWriter(directory, layout, max_shard_bytes=max_shard_bytes, weights_format=file_format)
            for file_format in formats[weights_format]
            if directory is not None
        ]
        for name, value in values:
            for writer in writers:
                writer.add(name, value.cpu().to(layout[name][1]))
        for writer in writers:
            writer.finish()
        return
    tensors = {name: value.cpu() for name, value in values if directory is not None}
    if directory is None:
        return
    for file, content in (_adapter_files(tensors) if kind == "lora" else _projector_file(tensors)).items():
        for file_format in formats[weights_format]:
            save_tensors(content, (directory / file).with_suffix(f".{file_format}"))
    if kind == "lora":
        write_json(directory / ADAPTER_CONFIG, adapter_config)


def _adapter_files(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    adapter: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    matrices: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        rows = tensors.get(name.removesuffix(".weight") + NEW_ROWS_SUFFIX)
        if rows is not None:
            matrices[name] = torch.cat([tensor[: -rows.shape[0]], rows.to(tensor.dtype)])
        else:
            (adapter if is_in_adapter(name) else beside)[adapter_name(name)] = tensor
    return {ADAPTER_BIN: adapter, NON_LORA_BIN: beside | matrices}


def is_in_adapter(name: str) -> bool:
    """Whether a trained parameter is in the adapter's file; everything else is in that of what was trained beside."""
    return part_of(name) == "LoRA" or (name.endswith("bias") and module_part(name) in LANGUAGE_MODEL)


def _projector_file(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Put the embedding rows of added tokens beside the projector under the name the original looks for."""
    rows = EMBEDDINGS.removesuffix(".weight") + NEW_ROWS_SUFFIX
    return {PROJECTOR_BIN: {EMBEDDINGS if name == rows else name: tensor for name, tensor in tensors.items()}}


def adapter_config_fields(lora_config: LoraConfig) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Keys that PEFT got after 0.10 are left out while they have their default, so that the versions original LLaVA is
    installed with can read the file.
    """
    fields = cast("dict[str, Any]", lora_config.to_dict())
    defaults = cast("dict[str, Any]", LoraConfig(task_type="CAUSAL_LM").to_dict())
    kept = {key: value for key, value in fields.items() if key in _PEFT_0_10_KEYS or value != defaults.get(key)}
    kept["inference_mode"] = True
    return {k: sorted(cast("set[str]", v)) if isinstance(v, set) else v for k, v in sorted(kept.items())}


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a file of tensors, a .safetensors file or else a pickle, that others may read as the umask says.

    The safetensors library makes its files readable by their owner alone, and a server under another user then cannot
    load them.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix != ".safetensors":
        torch.save(held, path)
        return
    path.touch()
    mode = path.stat().st_mode
    save_file(held, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class ShardWriter:
    """Writes a whole model as shards with an index; a model of one shard gets the plain file name.

    A `.safetensors` file begins with a table of contents. Names, shapes and types are known beforehand, so the table is
    written at once and each tensor put into its place: none is held in memory, and the files are, byte for byte, those
    of the safetensors library. A `.bin` shard is held until it is complete.

    Args:
        directory: Where to.
        layout: The tensors that will come, in whatever order.
        max_shard_bytes: A single larger tensor gets a shard of its own.
        weights_format: `safetensors` (`model-*.safetensors`) or `bin` (`pytorch_model-*.bin`).
    """

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        *,
        max_shard_bytes: int,
        weights_format: Literal["bin", "safetensors"] = "safetensors",
    ):
        stem, suffix = ("pytorch_model", ".bin") if weights_format == "bin" else ("model", ".safetensors")
        self._layout = layout
        self._index = directory / f"{stem}{suffix}.index.json"
        shards: list[list[str]] = [[]]
        size = 0
        for name in layout:
            num_bytes = layout_bytes(layout, [name])
            if shards[-1] and size + num_bytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += num_bytes
        self._file_of: dict[str, Path] = {}
        self._missing: dict[Path, set[str]] = {}
        self._held: dict[Path, dict[str, torch.Tensor]] = {}  # of .bin shards
        self._headers: dict[Path, bytes] = {}  # of .safetensors shards that are still to be begun
        self._offsets: dict[str, int] = {}
        for number, names in enumerate(shards, 1):
            file = directory / f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
            if len(shards) == 1:
                file = directory / f"{stem}{suffix}"
            self._file_of |= dict.fromkeys(names, file)
            self._missing[file] = set(names)
            if weights_format == "safetensors":
                self._headers[file], offsets = _safetensors_header(layout, names)
                self._offsets |= offsets

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its place."""
        assert (tuple(tensor.shape), tensor.dtype) == self._layout[name], name
        file = self._file_of[name]
        self._missing[file].remove(name)
        if file.suffix == ".bin":
            self._held.setdefault(file, {})[name] = tensor
            if not self._missing[file]:
                # PyTorch writes the name of a file into it; it is to be the same however many shards there are.
                unnumbered = file.with_name(f".pytorch_model-{list(self._missing).index(file) + 1:05d}.bin")
                save_tensors(self._held.pop(file), unnumbered)
                os.replace(unnumbered, file)
            return
        if (header := self._headers.pop(file, None)) is not None:
            file.write_bytes(header)
        with file.open("r+b") as opened:
            opened.seek(self._offsets[name])
            opened.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Write the index."""
        missing = sorted(name for names in self._missing.values() for name in names)
        assert not missing, missing[:3]
        if len(self._missing) > 1:
            weight_map = {name: self._file_of[name].name for name in sorted(self._layout)}
            write_json(self._index, {"metadata": {"total_size": layout_bytes(self._layout)}, "weight_map": weight_map})


def _safetensors_header(layout: Layout, names: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """Return the table of contents of a file, and where in the file each tensor begins."""
    types = {dtype: (place, key) for place, (key, dtype) in enumerate(SAFETENSORS_DTYPES.items())}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda name: (types[layout[name][1]][0], name)):
        shape, dtype = layout[name]
        offsets[name], end = end, end + layout_bytes(layout, [name])
        table[name] = {"dtype": types[dtype][1], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values are aligned to 8 bytes
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def layout_bytes(layout: Layout, names: Iterable[str] | None = None) -> int:
    """Size in bytes of all tensors of a layout, or of some."""
    return sum(math.prod(layout[name][0]) * layout[name][1].itemsize for name in (layout if names is None else names))


def check_space(directory: Path, num_bytes: int) -> None:
    """Refuse to write more bytes into a staging directory than the disk has room for, before any weight is read.

    Raises:
        UserError: There is less room.
    """
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise UserError(
            f"The model takes {num_bytes / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free in {directory.parent}. "
            "Free some space, or give another place for the result."
        )


def config_fields(config: LlavaModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the content of `config.json`: what differs from the defaults, and every field that LLaVA reads.

    Loaders take `dtype`, that of the weights, as their own default.
    """
    every = config.to_dict()
    fields = config.to_diff_dict()
    read_by_llava = [key for key in every if key.startswith(("mm_", "image_", "tokenizer_"))]
    for key in (*read_by_llava, "rope_theta", "rope_scaling", "tie_word_embeddings", "conversation_template"):
        if key in every and not (key == "image_grid_pinpoints" and every[key] is None):
            fields[key] = every[key]
    fields["architectures"] = list(config.architectures or [])
    fields["model_type"] = config.model_type
    fields["dtype"] = fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    return dict(sorted(fields.items()))


def shard_bytes(text: str) -> int:
    """Return the number of bytes that `--max-shard-size` gives, such as `5GB` (10^9) or `512MiB` (2^20).

    Raises:
        UserError: It is no size above 0.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}
    number = text.strip().rstrip("KMGiBkmgb ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"--max-shard-size: {text!r} is no size; write for example 5GB or 512MiB.") from None
    if size < 1:
        raise UserError(f"--max-shard-size is {text}; it must be more than 0, such as 5GB.")
    return size


@contextmanager
def staged_directory(final: Path) -> Generator[Path]:
    """Write a directory that appears under its name only when it is complete.

    Yields:
        A staging directory beside `final`. When the block ends without an error its files are forced to disk and it is
        renamed; an older directory of that name is replaced. After an error it is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.parent / f".{final.name}.incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        publish_directory(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def publish_directory(staging: Path, final: Path) -> None:
    """Force a staged directory to disk and give it its name, replacing an older directory of that name.

    A kill between the two renames leaves the older one as `.NAME.outdated`; `remove_staging` puts it back.
    """
    sync_tree(staging)
    outdated = final.parent / f".{final.name}.outdated"
    if final.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(final, outdated)
    os.replace(staging, final)
    shutil.rmtree(outdated, ignore_errors=True)
    sync_file(final.parent)


def sync_tree(directory: Path) -> None:
    """Wait until all files of a directory are on disk."""
    for path in [*directory.rglob("*"), directory]:
        sync_file(path)


def move_files(source: Path, target: Path, *, first: str) -> None:
    """Move the files of a directory into another, one of them first, replacing older ones of the same names."""
    target.mkdir(parents=True, exist_ok=True)
    sync_tree(source)
    for path in sorted(source.iterdir(), key=lambda path: path.name != first):
        os.replace(path, target / path.name)
    sync_file(target)
