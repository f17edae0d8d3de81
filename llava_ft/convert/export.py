"""`llava-ft export`: exporting a model or an adapter, proving the result, and the report."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.directory import identify, resolve_model_path
from llava_ft.checkpoint.full_model import FullModel, open_full_model
from llava_ft.checkpoint.names import CONFIG, is_vision, native_name
from llava_ft.checkpoint.overrides import collect_ignored
from llava_ft.checkpoint.weights import WeightFiles, read_json
from llava_ft.convert.export_adapter import export_adapter
from llava_ft.convert.export_hf import export_hf
from llava_ft.convert.export_llava import export_llava
from llava_ft.convert.hf_speaker import HfSpeaker
from llava_ft.convert.options import ExportOptions, common_options
from llava_ft.convert.proof import ConversionReport, check_target, proven_directory
from llava_ft.convert.verify import NativeSpeaker, Speaker, computing_dtype, prove_answers, relative_bound
from llava_ft.inference.load import LoadedModel, load_base_and_adapters, load_model

logger = logging.getLogger(__name__)


def run_export(request: argparse.Namespace) -> ConversionReport:
    """Carry out an export as the command line describes it.

    Raises:
        UserError: The request is wrong, or the format cannot hold the model.
        RunError: The result is not what it should be, or could not be written; nothing is left behind.
    """
    options = ExportOptions(**common_options(request), force=request.force, adapter_only=request.adapter_only)
    directory = identify(resolve_model_path(request.model_path))
    kind = f"export {request.format}" + " --adapter-only" * options.adapter_only
    report = ConversionReport(kind, str(directory.path), str(Path(request.save_path)))
    check_target(report, "--save-path")
    manifest = None if request.format == "gguf" else "lora" if options.adapter_only else "full"
    with collect_ignored() as report.ignored:
        full = open_full_model(directory, request.model_base, vision_tower=request.vision_tower, force=options.force)
        with proven_directory(report, full, "--save-path", manifest=manifest) as staging:
            if request.format == "gguf":
                from llava_ft.convert.export_gguf import export_gguf

                export_gguf(full, staging, options, report)
            elif options.adapter_only:
                export_adapter(full, staging, options, report, request.format)
            else:
                (export_hf if request.format == "hf" else export_llava)(full, staging, options, report)
            report.notes += full.source.notes
            if options.verify:
                _compare(request, full, staging, options, report)
            else:
                report.notes.append("the logits were not compared (--no-verify)")
    logger.info("Exported to %s.", report.target)
    report.log()
    return report


def _compare(
    request: argparse.Namespace, full: FullModel, staging: Path, options: ExportOptions, report: ConversionReport
) -> None:
    """Compare what the source and the result say."""
    is_whole = not options.adapter_only and request.format != "gguf"
    written = options.dtype or full.dtype
    dtype = computing_dtype(staging if is_whole else full.base.directory.path, written)

    def load_source() -> LoadedModel:
        opened = open_base_and_adapters(
            [(1.0, full.directory)], request.model_base, vision_tower=request.vision_tower, force=options.force
        )
        source = load_base_and_adapters(opened, dtype=dtype, device="cpu", adapter="beside")
        vocabulary: int = source.model.config.vocab_size
        num_rows = read_json(staging / CONFIG).get("vocab_size", vocabulary) if is_whole else vocabulary
        if num_rows < vocabulary:  # rows that are left out stand for no text
            settings: Any = source.model.generation_config
            settings.suppress_tokens = list(range(num_rows, vocabulary))
        return source

    def load_result() -> Speaker:
        if request.format == "gguf":
            from llava_ft.convert.export_gguf import load_gguf

            return NativeSpeaker(load_gguf(staging, full, dtype=dtype))
        if request.format == "hf":
            if options.adapter_only:
                return HfSpeaker.with_adapter(full, staging, dtype)
            return HfSpeaker.load(staging, dtype)
        tower = request.vision_tower or full.config.mm_vision_tower
        base = str(full.base.directory.path) if options.adapter_only else None
        if base is None and any(is_vision(native_name(name)) for name in WeightFiles.open(staging).tensors):
            tower = None
        loaded = load_model(str(staging), base, vision_tower=tower, dtype=dtype, device="cpu", adapter="beside")
        return NativeSpeaker(loaded)

    prove_answers(report, load_source, load_result, _bound(full, report, dtype, options))


def _bound(full: FullModel, report: ConversionReport, computed: torch.dtype, options: ExportOptions) -> float:
    """Largest difference of logits, as a share of the largest, that rounding explains.

    Weights that were neither changed nor converted are the same in source and result; then only the arithmetic rounds.
    """
    if options.adapter_only:
        was_rounded = options.dtype is not None
    else:
        is_exact = bool(report.frozen["bit_identical"])
        was_rounded = not is_exact or any(full.origin(name) != "frozen" for name in full.shapes)
    return relative_bound(computed, (options.dtype or full.dtype) if was_rounded else torch.float32)
