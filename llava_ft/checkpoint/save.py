"""Writing what a run has trained, so that nothing is missing and nothing half-written is ever taken for complete.

A LoRA directory holds two weight files: `adapter_model.bin` with the LoRA weights and `non_lora_trainables.bin` with
everything else that was trained. A projector directory holds `mm_projector.bin`, a full one the whole model. Files are
written into a staging directory and then moved; the manifest comes last.
"""

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] - a bare PathLike

from llava_ft.checkpoint.manifest import sync_file
from llava_ft.checkpoint.names import (
    ADAPTER_BIN,
    ADAPTER_CONFIG,
    ADAPTER_SAFETENSORS,
    EMBEDDINGS,
    HEAD,
    NEW_ROWS_SUFFIX,
    NON_LORA_BIN,
    NON_LORA_SAFETENSORS,
    PEFT_PREFIX,
    PROJECTOR_BIN,
    PROJECTOR_SAFETENSORS,
    adapter_name,
    is_language_model,
    native_name,
)
from llava_ft.errors import UserError
from llava_ft.models.config import LlavaLlamaConfig

WeightsFormat = Literal["bin", "safetensors", "both"]

_PEFT_0_10_KEYS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
))  # fmt: skip
"""What `adapter_config.json` held in PEFT 0.10, which refuses any other key."""


def write_lora(
    directory: Path,
    trained: Mapping[str, torch.Tensor],
    lora_config: LoraConfig,
    weights_format: WeightsFormat,
    *,
    whole_matrices: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter and everything else of `trained`, which holds tensors by their names in the PEFT model.

    `whole_matrices` are embeddings and head with the rows of added tokens in place, by native name. Original LLaVA
    needs them whole; this program reads the float32 rows that `trained` holds.
    """
    adapter: dict[str, torch.Tensor] = {}
    beside: dict[str, torch.Tensor] = {}
    for name, tensor in trained.items():
        is_bias = name.endswith("bias") and is_language_model(native_name(name))
        (adapter if "lora_" in name or is_bias else beside)[adapter_name(name)] = tensor
    beside |= {PEFT_PREFIX + name: tensor for name, tensor in (whole_matrices or {}).items()}
    write_tensors(directory, adapter, weights_format, ADAPTER_BIN, ADAPTER_SAFETENSORS)
    write_tensors(directory, beside, weights_format, NON_LORA_BIN, NON_LORA_SAFETENSORS)
    write_json(directory / ADAPTER_CONFIG, adapter_config_fields(lora_config))


def write_projector(directory: Path, trained: Mapping[str, torch.Tensor], weights_format: WeightsFormat) -> None:
    """Write a pretrained projector, and the embedding rows of added tokens under the name the original looks for."""
    renamed = {
        EMBEDDINGS if name == EMBEDDINGS.removesuffix(".weight") + NEW_ROWS_SUFFIX else name: tensor
        for name, tensor in trained.items()
    }
    write_tensors(directory, renamed, weights_format, PROJECTOR_BIN, PROJECTOR_SAFETENSORS)


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


def write_tensors(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    weights_format: WeightsFormat,
    bin_name: str,
    safetensors_name: str,
) -> None:
    """Write tensors into one file of each kind asked for."""
    if weights_format in ("bin", "both"):
        save_tensors(tensors, directory / bin_name)
    if weights_format in ("safetensors", "both"):
        save_tensors(tensors, directory / safetensors_name)


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
    """Writes a whole model as shards with an index, holding no more than one shard in memory.

    Args:
        directory: Where to.
        max_shard_bytes: A single larger tensor gets a shard of its own.
        weights_format: `safetensors` (`model-*.safetensors`) or `bin` (`pytorch_model-*.bin`).
    """

    def __init__(self, directory: Path, *, max_shard_bytes: int, weights_format: Literal["bin", "safetensors"]):
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._stem, self._suffix = ("pytorch_model", ".bin") if weights_format == "bin" else ("model", ".safetensors")
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor, writing a shard if it is full."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._write_shard()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is left and the index; a model of one shard gets the plain file name."""
        if self._pending:
            self._write_shard()
        if len(self._shards) == 1:
            os.replace(self._unnumbered(0), self._directory / f"{self._stem}{self._suffix}")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            shard = f"{self._stem}-{index + 1:05d}-of-{len(self._shards):05d}{self._suffix}"
            os.replace(self._unnumbered(index), self._directory / shard)
            weight_map.update(dict.fromkeys(names, shard))
        content = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._directory / f"{self._stem}{self._suffix}.index.json", content)

    def _unnumbered(self, index: int) -> Path:
        return self._directory / f".{self._stem}-{index + 1:05d}{self._suffix}"

    def _write_shard(self) -> None:
        path = self._unnumbered(len(self._shards))
        save_tensors(self._pending, path)
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def config_fields(config: LlavaLlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
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
    """Force a staged directory to disk and give it its name, replacing an older directory of that name."""
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


def move_files(source: Path, target: Path) -> None:
    """Move the files of a directory into another, replacing older ones of the same names."""
    target.mkdir(parents=True, exist_ok=True)
    sync_tree(source)
    for path in source.iterdir():
        os.replace(path, target / path.name)
    sync_file(target)


def vocabulary_matrices(native: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return embeddings and head, of a model's parameters by native name, with the rows of added tokens put in.

    A matrix whose added rows were not trained apart is left out.
    """
    whole: dict[str, torch.Tensor] = {}
    for name in (EMBEDDINGS, HEAD):
        rows = native.get(name.removesuffix(".weight") + NEW_ROWS_SUFFIX)
        if rows is not None:
            matrix = native[name].detach().clone()
            matrix[-rows.shape[0] :] = rows.to(matrix.dtype)
            whole[name] = matrix
    return whole
