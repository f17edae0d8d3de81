"""`llava-ft export`: exporting a model or an adapter, proving the result, and the report."""

import argparse
import errno
import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llava_ft.checkpoint.directory import ModelDirectory, identify, resolve_model_path
from llava_ft.checkpoint.full_model import FullModel, open_full_model
from llava_ft.checkpoint.lineage import record_lineage
from llava_ft.checkpoint.manifest import Manifest
from llava_ft.checkpoint.names import CONFIG, is_vision, native_name
from llava_ft.checkpoint.overrides import collect_ignored
from llava_ft.checkpoint.save import parse_size, staged_directory
from llava_ft.checkpoint.weights import WeightFiles, read_json
from llava_ft.convert.export_adapter import export_adapter
from llava_ft.convert.export_hf import export_hf
from llava_ft.convert.export_llava import export_llava
from llava_ft.convert.gguf_model import load_gguf
from llava_ft.convert.hf_speaker import HfSpeaker
from llava_ft.convert.options import ExportOptions
from llava_ft.convert.proof import CONVERSION_REPORT, ConversionReport
from llava_ft.convert.verify import (
    RELATIVE_BOUNDS,
    NativeSpeaker,
    Recorded,
    Speaker,
    computing_dtype,
    fixed_questions,
    free_memory,
    prove,
)
from llava_ft.errors import CheckpointError, RunError, UserError
from llava_ft.inference.load import LoadedModel, load_model

logger = logging.getLogger(__name__)


def run_export(request: argparse.Namespace) -> ConversionReport:
    """Carry out an export as the command line describes it.

    Raises:
        UserError: The request is wrong, or the format cannot hold the model.
        RunError: The result is not what it should be, or could not be written; nothing is left behind.
    """
    options = _options(request)
    directory = identify(resolve_model_path(request.model_path))
    target = Path(request.save_path)
    _check_target(target, directory)
    with collect_ignored() as ignored:
        whole = open_full_model(directory, request.model_base, vision_tower=request.vision_tower, force=options.force)
        _check_not_inside(target, whole.base.directory.path)
        with _failures_of_the_disk(target), staged_directory(target) as staging:
            report = _export(request, whole, staging, options)
            report.target, report.ignored, report.passed = str(target), ignored, True
            report.write(staging)
            _write_origin(request, whole, staging)
    logger.info("Exported to %s.", target)
    for line in report.lines():
        logger.info("%s", line)
    return report


def _options(request: argparse.Namespace) -> ExportOptions:
    try:
        max_shard_bytes = parse_size(request.max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size: {error}") from None
    if max_shard_bytes < 1:
        raise UserError(f"--max-shard-size is {request.max_shard_size}; it must be more than 0, such as 5GB.")
    return ExportOptions(
        dtype=None if request.dtype == "auto" else getattr(torch, request.dtype),
        max_shard_bytes=max_shard_bytes,
        adapter_only=request.adapter_only,
        verify=not request.no_verify,
        force=request.force,
    )


def _check_target(target: Path, source: ModelDirectory) -> None:
    """Refuse a place where something else would be lost."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file. Give a directory with --save-path.")
    if target.is_dir() and any(target.iterdir()) and not (target / CONVERSION_REPORT).is_file():
        raise CheckpointError(
            f"{target} holds files that no export has written ({CONVERSION_REPORT} is not among them), and would be "
            "replaced. Give another place with --save-path."
        )
    _check_not_inside(target, source.path)


def _check_not_inside(target: Path, source: Path) -> None:
    written, read = target.resolve(), source.resolve()
    if written == read or written in read.parents:
        raise CheckpointError(f"{target} would replace {source}, which is read. Give another place with --save-path.")


@contextmanager
def _failures_of_the_disk(target: Path) -> Generator[None]:
    """Say in plain words that a file could not be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch's writer of .bin files has no error of its own.
        if isinstance(error, RunError) or (type(error) is RuntimeError and "PytorchStreamWriter" not in str(error)):
            raise
        reason = "the disk is full" if getattr(error, "errno", None) == errno.ENOSPC else str(error)
        raise RunError(
            f"Nothing was exported to {target}: {reason}. Free some space, or give another place with --save-path, and "
            "start again."
        ) from error


def _export(request: argparse.Namespace, whole: FullModel, staging: Path, options: ExportOptions) -> ConversionReport:
    """Write the format that was asked for, and compare what the source and the result say."""
    if request.format == "gguf":
        from llava_ft.convert.export_gguf import export_gguf

        report = export_gguf(whole, staging, options)
    elif options.adapter_only:
        report = export_adapter(whole, staging, options, request.format)
    else:
        report = (export_hf if request.format == "hf" else export_llava)(whole, staging, options)
    report.notes += whole.source.notes
    if not options.verify:
        report.notes.append("the logits were not compared (--no-verify)")
        return report
    written = options.dtype or whole.dtype
    is_whole = not options.adapter_only and request.format != "gguf"
    dtype = computing_dtype(staging if is_whole else whole.base.directory.path, written, free_memory())
    source = load_model(
        str(whole.directory.path),
        request.model_base,
        vision_tower=request.vision_tower,
        dtype=dtype,
        device="cpu",
        force=options.force,
        adapter="beside",
    )
    if is_whole:
        _keep_to_shared_tokens(source, staging)
    questions = fixed_questions(source.model.config)
    expected = Recorded(NativeSpeaker(source), questions)
    del source
    result = _result(request, whole, staging, dtype)
    prove(report, expected, result, questions, _bound(whole, report, dtype, options))
    return report


def _keep_to_shared_tokens(source: LoadedModel, staging: Path) -> None:
    """Let the source answer with tokens that the result has too: rows that are left out stand for no text."""
    num_rows = read_json(staging / CONFIG).get("vocab_size", source.model.config.vocab_size)
    if num_rows < source.model.config.vocab_size:
        settings: Any = source.model.generation_config
        settings.suppress_tokens = list(range(num_rows, source.model.config.vocab_size))


def _result(request: argparse.Namespace, whole: FullModel, staging: Path, dtype: torch.dtype) -> Speaker:
    """Load what was written."""
    if request.format == "gguf":
        return NativeSpeaker(load_gguf(staging, whole, dtype=dtype))
    if request.format == "hf":
        return HfSpeaker.with_adapter(whole, staging, dtype) if request.adapter_only else HfSpeaker.load(staging, dtype)
    tower = request.vision_tower or whole.config.mm_vision_tower
    base = None
    if request.adapter_only:
        base = str(whole.base.directory.path)
    elif any(is_vision(native_name(name)) for name in WeightFiles.open(staging).tensors):
        tower = None
    loaded = load_model(str(staging), base, vision_tower=tower, dtype=dtype, device="cpu", adapter="beside")
    return NativeSpeaker(loaded)


def _bound(whole: FullModel, report: ConversionReport, computed: torch.dtype, options: ExportOptions) -> float:
    """Largest difference of logits, as a share of the largest, that rounding explains.

    Weights that were neither changed nor converted are the same in source and result; then only the arithmetic rounds.
    """
    if options.adapter_only:
        was_rounded = options.dtype is not None
    else:
        is_exact = bool(report.frozen["bit_identical"])
        was_rounded = not is_exact or any(whole.origin(name) != "frozen" for name in whole.shapes)
    rounded_to = (options.dtype or whole.dtype) if was_rounded else torch.float32
    return max(RELATIVE_BOUNDS.get(dtype, RELATIVE_BOUNDS[torch.float32]) for dtype in (computed, rounded_to))


def _write_origin(request: argparse.Namespace, whole: FullModel, staging: Path) -> None:
    """Write what the result was made from, and the manifest."""
    base = (str(whole.base.directory.path), whole.fingerprint)
    is_whole = whole.directory.kind == "llava"
    action = f"export {request.format}" + " --adapter-only" * request.adapter_only
    record_lineage(staging, action, parents=[whole.directory.path], base=None if is_whole else base)
    if request.format != "gguf":
        kind = "lora" if request.adapter_only else "full"
        Manifest(kind, *base, 0, whole.config.conversation_template or "").write(staging)
