"""`llava-ft export`: exporting a model or an adapter, proving the result, and the report."""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from llava_ft.checkpoint.base_and_adapters import open_base_and_adapters
from llava_ft.checkpoint.directory import identify, resolve_model_path
from llava_ft.checkpoint.full_model import FullModel, open_full_model
from llava_ft.checkpoint.names import CONFIG, native_name
from llava_ft.checkpoint.overrides import collect_ignored
from llava_ft.checkpoint.save import shard_bytes
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.export_adapter import export_adapter
from llava_ft.convert.export_hf import export_hf
from llava_ft.convert.export_llava import export_llava
from llava_ft.convert.hf_speaker import HfSpeaker
from llava_ft.convert.proof import ConversionReport, check_target, proven_directory
from llava_ft.convert.verify import NativeSpeaker, Speaker, computing_dtype, prove_answers, relative_bound
from llava_ft.errors import UserError
from llava_ft.inference.load import LoadedModel, load_base_and_adapters, load_model
from llava_ft.json_files import read_json
from llava_ft.models.parts import any_in

logger = logging.getLogger(__name__)


def run_export(request: argparse.Namespace) -> ConversionReport:
    """Carry out an export as the command line describes it.

    Raises:
        UserError: The request is wrong, or the format cannot hold the model.
        RunError: The result is not what it should be, or could not be written; nothing is left behind.
    """
    dtype = None if request.dtype == "auto" else getattr(torch, request.dtype)
    max_shard_bytes = shard_bytes(request.max_shard_size)
    if request.adapter_only and request.format == "gguf":
        raise UserError(
            "--adapter-only has no GGUF form here: a GGUF file holds the whole model. Leave the flag out, or export "
            "the adapter with --format hf --adapter-only and convert it with llama.cpp's convert_lora_to_gguf.py."
        )
    directory = identify(resolve_model_path(request.model_path))
    kind = f"export {request.format}" + " --adapter-only" * request.adapter_only
    report = ConversionReport(kind, str(directory.path), str(Path(request.save_path)))
    check_target(report, "--save-path")
    manifest = None if request.format == "gguf" else "lora" if request.adapter_only else "full"
    with collect_ignored() as report.ignored:
        full = open_full_model(directory, request.model_base, vision_tower=request.vision_tower, force=request.force)
        with proven_directory(report, full, "--save-path", manifest=manifest) as staging:
            if request.format == "gguf":
                from llava_ft.convert.export_gguf import export_gguf

                export_gguf(full, staging, report, dtype)
            elif request.adapter_only:
                export_adapter(full, staging, report, request.format, dtype)
            else:
                export = export_hf if request.format == "hf" else export_llava
                export(full, staging, report, dtype, max_shard_bytes)
            report.notes += full.base.notes
            if request.no_verify:
                report.notes.append("the logits were not compared (--no-verify)")
            else:
                _compare(request, full, staging, dtype, report)
    logger.info("Exported to %s.", report.target)
    report.log()
    return report


def _compare(
    request: argparse.Namespace, full: FullModel, staging: Path, wanted: torch.dtype | None, report: ConversionReport
) -> None:
    """Compare what the source and the result, written in the type that is `wanted`, say."""
    is_whole = not request.adapter_only and request.format != "gguf"
    written = wanted or full.dtype
    dtype = computing_dtype(staging if is_whole else full.base.directory.path, written)

    def load_source() -> LoadedModel:
        opened = open_base_and_adapters(
            [(1.0, full.directory)], request.model_base, vision_tower=request.vision_tower, force=request.force
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
            if request.adapter_only:
                return HfSpeaker.with_adapter(full, staging, dtype)
            return HfSpeaker.load(staging, dtype)
        tower = request.vision_tower or full.config.mm_vision_tower
        base = str(full.base.directory.path) if request.adapter_only else None
        if base is None and any_in("vision tower", map(native_name, WeightFiles.open(staging).tensors)):
            tower = None
        loaded = load_model(str(staging), base, vision_tower=tower, dtype=dtype, device="cpu", adapter="beside")
        return NativeSpeaker(loaded)

    # Weights that were neither changed nor converted are the same on both sides; then only the arithmetic rounds.
    if request.adapter_only:
        was_rounded = wanted is not None
    else:
        is_frozen = all(full.origin(name) == "frozen" for name in full.shapes)
        was_rounded = not (report.frozen["bit_identical"] and is_frozen)
    bound = relative_bound(dtype, written if was_rounded else torch.float32)
    prove_answers(report, load_source, load_result, bound)
