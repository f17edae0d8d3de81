"""Merging an adapter into its base, and proving that nothing else changed.

The result is a whole LLaVA model. It is made on the CPU, tensor by tensor: each weight is read, the adapter's part is
added in float32, and the sum is rounded once and written at once; memory holds the adapter, and the largest tensor a
few times. Before the result gets its name it is proven: every tensor is compared with the files it comes from, and
logits and answers on fixed inputs with those of the adapter beside the base. See docs/merge.md.

What was trained on quantised weights is merged into the base's own, never into quantised ones: the sum would be rounded
to 4 or 8 bits once more. On request it is merged into what the quantised weights are worth, the weights it was trained
on.
"""

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.directory import ModelDirectory
from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.lineage import record_lineage
from llava_ft.checkpoint.manifest import Manifest
from llava_ft.checkpoint.names import CONFIG, MANIFEST, RUN_CONFIG
from llava_ft.checkpoint.overrides import Force, collect_ignored
from llava_ft.checkpoint.save import ShardWriter, config_fields, staged_directory, write_json
from llava_ft.checkpoint.shard_files import ShardFiles, check_space, layout_bytes
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.proof import CONVERSION_REPORT, ConversionReport, prove_tensors
from llava_ft.data.image_processor import copy_image_settings
from llava_ft.data.tokenizer import save_tokenizer
from llava_ft.errors import CheckpointError, RunError, UserError
from llava_ft.tuning.quant import Quantization

_GENERATION_CONFIG = "generation_config.json"
_DISK_ERRORS = ("os error", "iostream error", "PytorchStreamWriter")
"""By what errors of the operating system are known that safetensors, tokenizers and torch report in their own words."""


@dataclass(frozen=True)
class MergeOptions:
    """How a merged model is written.

    Attributes:
        dtype: Type of the weights; that of the base's files when absent.
        max_shard_bytes: Size of a shard in bytes.
        weights_format: Kind of files.
        save_vision_tower: Whether the tower is written although the base does not hold it.
        force: What is passed over, such as a base other than the one the adapter was trained on.
        quantization: Merge into the values that the base's linear layers have after being quantised like this; into
            the base's own when absent.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5 * 10**9
    weights_format: Literal["bin", "safetensors"] = "safetensors"
    save_vision_tower: bool = False
    force: Force = False
    quantization: Quantization | None = None


def merge(
    directory: ModelDirectory,
    model_base: str | None,
    save_path: Path,
    options: MergeOptions,
    *,
    vision_tower: str | None = None,
    verify: Callable[[Path, ConversionReport], None] | None = None,
) -> ConversionReport:
    """Merge what was trained into its base and write a whole model; see `merge_all`."""
    return merge_all([(1.0, directory)], model_base, save_path, options, vision_tower=vision_tower, verify=verify)


def merge_all(
    shares: Sequence[tuple[float, ModelDirectory]],
    model_base: str | None,
    save_path: Path,
    options: MergeOptions,
    *,
    vision_tower: str | None = None,
    verify: Callable[[Path, ConversionReport], None] | None = None,
) -> ConversionReport:
    """Merge what was trained into its base and write a whole model.

    Args:
        shares: A projector directory, or LoRA directories; and the weight of each.
        model_base: The base; when absent, the one that the adapters name.
        save_path: Where the model is written; it must not exist or be an earlier result.
        options: How it is written.
        vision_tower: The vision tower, if it is not where the model says.
        verify: Called with the written directory and the report before the directory gets its name; raises if
            something is wrong.

    Returns:
        The report, which was also written into the directory.

    Raises:
        UserError: Something is missing, damaged or does not fit.
        RunError: The result is not what it should be; nothing is left behind.
    """
    for _, directory in shares:
        if directory.kind not in ("lora", "projector"):
            raise CheckpointError(f"{directory.path} holds a {directory.kind}; there is nothing in it to merge.")
    _check_target(save_path)
    with collect_ignored() as ignored:
        trained = open_base_and_adapters(shares, model_base, vision_tower=vision_tower, force=options.force)
        whole = FullModel(trained, options.quantization)
        _check_sources(save_path, whole)
        report = ConversionReport("merge", _named(shares), str(save_path), notes=list(trained.notes))
        with _failures_of_disks(save_path), staged_directory(save_path) as staging:
            _write_merged(staging, whole, report, options)
            prove_tensors(report, whole, WeightFiles.open(staging), with_tower=options.save_vision_tower)
            if verify is not None:
                verify(staging, report)
            report.ignored, report.passed = ignored, True
            report.write(staging)
            base = (str(whole.base.directory.path), whole.fingerprint)
            record_lineage(
                staging,
                "merge",
                parents=[directory.path for _, directory in shares],
                base=base,
                details={"weights": [share for share, _ in shares]},
            )
            Manifest("full", *base, 0, whole.config.conversation_template or "").write(staging)
    return report


@contextmanager
def _failures_of_disks(save_path: Path) -> Generator[None]:
    """Tell what an operating system or a library says of a full or broken disk as a failed run."""
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        is_of_disk = isinstance(error, OSError) or any(mark in str(error) for mark in _DISK_ERRORS)
        if not is_of_disk:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise RunError(
            f"{save_path} could not be written: {reason}. Nothing was kept; see that the disk is whole and has room."
        ) from error


def _named(shares: Sequence[tuple[float, ModelDirectory]]) -> str:
    """Name what is merged, with the weights if they matter."""
    if len(shares) == 1 and shares[0][0] == 1.0:
        return str(shares[0][1].path)
    return " + ".join(f"{share:g} x {directory.path}" for share, directory in shares)


def _check_target(save_path: Path) -> None:
    if save_path.exists() and not save_path.is_dir():
        raise CheckpointError(f"{save_path} is a file. Give a directory for the merged model.")
    is_earlier = (save_path / CONVERSION_REPORT).is_file() or (
        (save_path / MANIFEST).is_file() and not (save_path / RUN_CONFIG).is_file()
    )
    if save_path.is_dir() and any(save_path.iterdir()) and not is_earlier:
        raise CheckpointError(
            f"{save_path} holds files that no merge has written, and they would be replaced. Give another place, or "
            "empty it first."
        )


def _check_sources(save_path: Path, whole: FullModel) -> None:
    """Refuse to replace what is merged."""
    sources = [directory.path for directory in whole.source.directories]
    sources += [source.files.path for source in whole.base.sources]
    inside = [source for source in sources if source.resolve().is_relative_to(save_path.resolve())]
    if inside:
        raise CheckpointError(
            f"--save-model-path {save_path} holds {inside[0]}, which is merged and would be replaced. Give another "
            "place."
        )


def _write_merged(staging: Path, whole: FullModel, report: ConversionReport, options: MergeOptions) -> None:
    layout = whole.layout(options.dtype, with_tower=options.save_vision_tower)
    check_space(staging, layout_bytes(layout))
    writer = (
        ShardFiles(staging, layout, max_shard_bytes=options.max_shard_bytes)
        if options.weights_format == "safetensors"
        else ShardWriter(staging, max_shard_bytes=options.max_shard_bytes, weights_format="bin")
    )
    for piece in whole.stream(options.dtype, with_tower=options.save_vision_tower):
        report.count(piece)
        writer.add(piece.name, piece.value)
    writer.finish()
    write_json(staging / CONFIG, config_fields(whole.config, options.dtype or whole.dtype))
    save_tokenizer(whole.tokenizer, staging)
    base = whole.base
    if base.vision_directory is not None:
        copy_image_settings(base.vision_directory, staging)
    if (base.directory.path / _GENERATION_CONFIG).is_file():
        shutil.copyfile(base.directory.path / _GENERATION_CONFIG, staging / _GENERATION_CONFIG)
