"""`llava-ft consolidate`: weights out of DeepSpeed's shards, on one CPU, when nothing else is left of a run.

What a run trained is read from the names of its tensors: LoRA matrices make a LoRA directory, a projector alone makes a
projector directory, anything else a whole model. The result is what the run itself would have written, to be merged,
used, or trained further; it appears under its name only when it is complete. Original LLaVA's LoRA checkpoints lack the
projector; their shards have it.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from llava_ft.checkpoint.directory import absolute_or_hub_name
from llava_ft.checkpoint.lineage import LINEAGE, record_lineage
from llava_ft.checkpoint.manifest import Manifest
from llava_ft.checkpoint.names import (
    CONFIG,
    EMBEDDINGS,
    NEW_ROWS_SUFFIX,
    PEFT_PREFIX,
    RUN_CONFIG,
    is_derived,
    native_name,
)
from llava_ft.checkpoint.run_settings import find_settings, settle_adapter_config, settle_model_config
from llava_ft.checkpoint.save import (
    ResultKind,
    staged_directory,
    write_json,
    write_result,
)
from llava_ft.checkpoint.zero.files import find_step_directory
from llava_ft.checkpoint.zero.shards import ZeroShards
from llava_ft.constants import ORIGINAL_DEFAULTS
from llava_ft.errors import CheckpointError, UserError
from llava_ft.json_files import read_json
from llava_ft.models.parts import PROJECTOR, part_of

logger = logging.getLogger(__name__)

RECORD = "consolidated.json"
"""What a consolidation was made from; only a directory that has it is ever replaced."""


@dataclass(frozen=True)
class Consolidation:
    """What was done."""

    kind: ResultKind
    output: Path
    step: int
    num_trained: int  # tensors; for a whole model all of them
    num_values: int  # of these tensors
    base: str  # "" if unknown
    is_usable: bool  # whether everything is there to merge or use the result
    notes: list[str] = field(default_factory=list[str])  # what was inferred, is missing or is less exact


def consolidate(
    checkpoint: Path,
    output: Path | None = None,
    *,
    tag: str | None = None,
    model_base: str | None = None,
    config_file: Path | None = None,
    lora_alpha: int | None = None,
    weights_format: Literal["bin", "safetensors"] | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    from_model_states: bool = False,
) -> Consolidation:
    """Write the weights that DeepSpeed's shards hold as a LoRA, projector or model directory.

    Args:
        checkpoint: A checkpoint, or the `global_stepN` in it.
        output: Where the result is written; beside the checkpoint when absent.
        tag: Which step, where there are several.
        model_base: The base model, where the run's files do not name it or it has moved.
        config_file: The configuration the run was started with, where the run left none.
        lora_alpha: Scale of the adapter times its rank, where no file says it.
        weights_format: When absent, `bin` for adapter and projector, `safetensors` for a whole model.
        dtype: Type of a whole model's weights.
        max_shard_bytes: Size of a whole model's shards.
        from_model_states: Take the trained weights from the model file; see `ZeroShards.open`.

    Raises:
        UserError: A file is missing, damaged or of another run, or the user has to say something.
    """
    step_directory = find_step_directory(checkpoint, tag)
    given = checkpoint.resolve()
    output = output or given.with_name(f"{given.name}-consolidated")
    if step_directory.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--output {output} holds the shards themselves and would be replaced. Give another place.")
    if output.is_file():
        raise UserError(f"--output {output} is a file. Give a directory.")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise UserError(
            f"{output} is there already and is no earlier consolidation. Give another place with --output, or remove "
            "it."
        )
    shards = ZeroShards.open(step_directory, from_model_states=from_model_states)
    kind, names = _what_was_trained(shards)
    tensors = shards.trained | shards.others
    shapes = {native_name(name): tensors[name].shape for name in names}

    settings = find_settings(checkpoint, step_directory, config_file)
    named = settings.adapter_config.get("base_model_name_or_path") or settings.flags.get("model_name_or_path")
    manifest = settings.manifest or Manifest(kind, template=str(settings.flags.get("version") or ""))
    base = absolute_or_hub_name(model_base) if model_base else str(named or manifest.base)
    base_config = read_json(Path(base) / CONFIG) if base and (Path(base) / CONFIG).is_file() else {}
    config: dict[str, Any] = {}
    # Beside an adapter LLaVA's own fields are enough; a whole model needs those of its language model too.
    if kind != "full" or base_config or settings.config:
        config = settle_model_config(settings, shapes, base_config)
    notes = [*shards.notes]
    adapter: dict[str, Any] = {}
    if kind == "lora":
        adapter, inferred = settle_adapter_config(settings, shapes, lora_alpha=lora_alpha, base=base)
        base = base or str(adapter.get("base_model_name_or_path") or "")
        notes += inferred
    if not config:
        advice = "the directory of its base with --model-base" if kind == "full" else "a LLaVA model as --model-base"
        notes.append(
            f"{CONFIG} is left out: nothing says how images are read (vision tower, layer, padding). To have it "
            f"written, give the run's configuration with --config {'and' if kind == 'full' else 'or'} {advice}."
        )
    elif not settings.config:
        shown = ("mm_vision_tower", "mm_hidden_size", *ORIGINAL_DEFAULTS)
        notes.append(
            f"{CONFIG}: from the run's configuration and base, projector from the tensors: "
            + ", ".join(f"{key} {config.get(key)}" for key in shown)
        )

    num_values = sum(torch.Size(shape).numel() for shape in shapes.values())
    result = Consolidation(kind, output, shards.step, len(names), num_values, base, bool(config), notes)
    record = {
        "shards": str(step_directory.resolve()),
        "zero_stage": shards.stage,
        "ranks": shards.num_ranks,
        "deepspeed": shards.version,
        "step": result.step,
        "kind": kind,
        "tensors": result.num_trained,
        "values": result.num_values,
        "notes": notes,
    }
    with staged_directory(output) as staging:
        frozen: list[str] = []
        if kind == "lora":
            rows = [name for name in shapes if name.endswith(NEW_ROWS_SUFFIX)]
            matrices = {name.removesuffix(NEW_ROWS_SUFFIX) + ".weight" for name in rows}
            frozen = [name for name in shards.others if native_name(name) in matrices]
        prefix = PEFT_PREFIX if kind == "lora" else ""
        write_result(
            staging,
            kind,
            {
                native_name(n): (tensors[n].shape, dtype if tensors[n].dtype.is_floating_point else tensors[n].dtype)
                for n in names
            },
            ((prefix + native_name(name), value) for name, value in shards.stream([*names, *frozen])),
            weights_format=weights_format or "auto",
            adapter_config=adapter,
            max_shard_bytes=max_shard_bytes,
        )
        if kind == "full" and config:
            config |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
        settings.copy_files(staging, tokenizer_from=Path(base) if kind == "full" and base_config else None)
        if config:
            write_json(staging / CONFIG, config)
        write_json(staging / RECORD, record)
        run_config = staging / RUN_CONFIG
        fingerprint = manifest.base_fingerprint if manifest.base == base else ""
        # The checkpoint is the parent: what it was made from goes on to the result with its own record.
        record_lineage(
            staging,
            "consolidate",
            parents=[step_directory.parent if (step_directory.parent / LINEAGE).is_file() else checkpoint],
            base=(base, fingerprint) if base else None,
            run_config=run_config.read_text(encoding="utf-8") if run_config.is_file() else "",
            details=record,
        )
        Manifest(kind, base, fingerprint, shards.step, manifest.template).write(staging)
    return result


def next_commands(result: Consolidation) -> list[str]:
    """Say what can be done with a result, as commands; nothing for a model without its configuration."""
    run_config = result.output / RUN_CONFIG
    train = f"deepspeed train.py --config {run_config if run_config.is_file() else 'CONFIG.yaml'} --output_dir NEW"
    if result.kind == "full":
        ask = f"llava-ft generate --model-path {result.output} --image-file IMAGE --query QUESTION"
        return [ask, f"{train} --model_name_or_path {result.output}"] * result.is_usable
    # An adapter names its base; a projector does not.
    base = f" --model-base {result.base or 'BASE'}" if result.kind == "projector" or not result.base else ""
    merge = f"llava-ft merge --model-path {result.output}{base} --save-model-path {result.output}-merged"
    if result.kind == "lora":
        return [merge] * result.is_usable + [f"{train} --lora_weight_path {result.output}"]
    (projector,) = result.output.glob("mm_projector.*")
    return [merge] * result.is_usable + [f"{train} --pretrain_mm_mlp_adapter {projector}"]


def _what_was_trained(shards: ZeroShards) -> tuple[ResultKind, list[str]]:
    """Tell the kind of run, and which tensors make its result.

    Under stage 0 nothing says which parameters were trained; for LoRA and projector runs their names do, and the number
    of parameters that the optimizer had is compared.
    """
    trained = list(shards.trained)
    every = [*trained, *shards.others]
    # What every run trains that keeps the language model frozen.
    small = [name for name in every if part_of(name) in {*PROJECTOR, "LoRA", "new token rows"}]
    if any(part_of(name) == "LoRA" for name in every):
        if not trained and shards.num_optimized not in (0, len(small)):
            raise CheckpointError(
                f"{shards.directory} is of ZeRO stage 0, whose files do not say what was trained. By their names "
                f"{len(small)} parameters are LoRA matrices or belong to the projector, but the optimizer had "
                f"{shards.num_optimized}. Resume the run instead, and let it write its checkpoint."
            )
        return "lora", trained or small
    if trained:
        # Pretraining with added tokens trains the input embeddings beside the projector.
        if small and all(name in small or native_name(name) == EMBEDDINGS for name in trained):
            return "projector", trained
    elif shards.num_optimized and len(small) == shards.num_optimized:
        return "projector", small
    return "full", [name for name in every if not is_derived(native_name(name))]
