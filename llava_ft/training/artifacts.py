"""What a run leaves on disk besides optimizer state: the same set of files at every save.

| method | weights |
| --- | --- |
| lora | `adapter_model.bin`, `non_lora_trainables.bin`, `adapter_config.json` |
| projector | `mm_projector.bin` |
| full | `model.safetensors`, or shards with an index |

Beside them: `config.json`, the tokenizer, `preprocessor_config.json`, `run_config.yaml` (can be fed back through
`--config`), `trainable_parameters.json`, `lineage.json` and, last, `llava_ft.json` (see `checkpoint/manifest.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.directory import absolute_or_hub_name
from llava_ft.checkpoint.lineage import describe_parent, git_commit, read_lineage, record_lineage
from llava_ft.checkpoint.manifest import Manifest
from llava_ft.checkpoint.names import CONFIG, NEW_ROWS_SUFFIX, RUN_CONFIG, TRAINABLE_TABLE
from llava_ft.checkpoint.restore import whole_shape
from llava_ft.checkpoint.save import (
    WeightsFormat,
    adapter_config_fields,
    config_fields,
    result_kind,
    write_json,
    write_result,
)
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.image_processor import copy_image_settings
from llava_ft.data.report import DataReport
from llava_ft.data.sources.data_path import is_mixture
from llava_ft.data.tokenizer import save_tokenizer
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.parts import module_part
from llava_ft.training.fragments import whole_dtype, whole_value
from llava_ft.training.start_from import describe_start
from llava_ft.tuning.plan import TuningPlan

if TYPE_CHECKING:
    from llava_ft.checkpoint.start import Start


@dataclass
class RunArtifacts:
    """What every save of a run writes."""

    plan: TuningPlan  # what is trained
    config: LlavaModelConfig
    tokenizer: PreTrainedTokenizerFast
    vision_directory: Path | None  # where `preprocessor_config.json` is copied from; None for a text-only model
    run_config: str  # the resolved configuration of the run, as YAML
    base: str  # path of the base model
    base_fingerprint: str  # see `language_model_fingerprint`
    template: str  # name of the conversation template
    weights_format: WeightsFormat
    compute_dtype: torch.dtype  # of the weights of a finished full run; its checkpoints keep the master weights
    lineage: Mapping[str, Any]  # parents, data and details, as `record_lineage` takes them
    save_vision_tower: bool = False  # whether a whole model has its vision tower although that was not trained
    table: list[dict[str, Any]] = field(default_factory=list)  # what is trained, for `trainable_parameters.json`

    def write(self, directory: Path | None, model: nn.Module, *, is_final: bool) -> None:
        """Write weights, configuration and everything needed to use them, but not yet the manifest.

        Where several ranks share the model all of them call this together, because each holds a part of the values.
        Only what is written is put together, one parameter at a time.

        Args:
            directory: Where to; None on a rank that does not write.
            model: The run's model; the PEFT model for LoRA.
            is_final: Whether this is the result of the run and not a checkpoint to resume from.
        """
        kind, parameters = result_kind(self.plan), self._written(model)
        cast_to = self.compute_dtype if kind == "full" and is_final else None
        lora_config = getattr(model, "peft_config", {}).get("default")
        write_result(
            directory,
            kind,
            {name: (whole_shape(p), cast_to or whole_dtype(p)) for name, p in parameters.items()},
            ((name, whole_value(p)) for name, p in parameters.items()),
            weights_format=self.weights_format,
            adapter_config=None if lora_config is None else adapter_config_fields(lora_config),
        )
        if directory is None:
            return
        dtype = torch.float32 if kind == "full" and not is_final else self.compute_dtype
        write_json(directory / CONFIG, config_fields(self.config, dtype))
        save_tokenizer(self.tokenizer, directory)
        if self.vision_directory is not None:
            copy_image_settings(self.vision_directory, directory)
        (directory / RUN_CONFIG).write_text(self.run_config, encoding="utf-8")
        write_json(directory / TRAINABLE_TABLE, self.table)

    def write_manifest(self, directory: Path, step: int) -> None:
        """Write `lineage.json` and then `llava_ft.json`, after which the directory counts as complete."""
        lineage = {**self.lineage, "details": {"step": step} | self.lineage["details"]}
        base = (self.base, self.base_fingerprint)
        record_lineage(directory, "train", base=base, run_config=self.run_config, **lineage)
        commit = git_commit(Path.cwd())
        Manifest(result_kind(self.plan), self.base, self.base_fingerprint, step, self.template, commit).write(directory)

    def _written(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Choose what is written: what is trained, or the whole model with its tower if that is wanted or trained."""
        parameters = dict(model.named_parameters())
        wanted = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if self.plan.has_lora:
            rows = [name.removesuffix(NEW_ROWS_SUFFIX) for name in wanted if name.endswith(NEW_ROWS_SUFFIX)]
            wanted |= {f"{matrix}.weight" for matrix in rows}
        elif result_kind(self.plan) == "full":
            wanted |= {name for name in parameters if self.save_vision_tower or module_part(name) != "vision tower"}
        return {name: parameter for name, parameter in parameters.items() if name in wanted}


def lineage_of_run(
    args: ParsedArgs,
    datasets: BuiltDatasets,
    *,
    start: "Start | None",
    checkpoint: Path | None,
    ignored: Sequence[str] = (),
) -> dict[str, Any]:
    """Say what a run comes from, as `record_lineage` takes it. A resumed run keeps the parents it had.

    Args:
        args: The request, as the user made it.
        datasets: What is trained on.
        start: What the run starts from besides its base.
        checkpoint: What it is resumed from.
        ignored: What --force passed over.
    """
    earlier = read_lineage(checkpoint) if checkpoint is not None else None
    earlier_details: dict[str, Any] = (earlier or {}).get("details", {})
    start_now = None if start is None else describe_start(start)
    details: dict[str, Any] = {"start": earlier_details.get("start", start_now)}
    if args.model.vision_tower:
        details["vision_tower"] = absolute_or_hub_name(args.model.vision_tower)
    if ignored:
        details["ignored"] = list(ignored)
    if checkpoint is not None:
        here = {"from": str(checkpoint.resolve()), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        details["resumptions"] = [*earlier_details.get("resumptions", ()), here]
    parents: list[Mapping[str, Any]] = []
    if earlier is not None:
        parents = earlier.get("parents", [])
    else:
        # With `merge_first` the adapter is no parent of the run: it is that of the merged base.
        if start is not None and not start.is_whole and start.mode != "merge_first":
            role = "adapter left out" if start.has_adapter and start.mode == "new" else "trained on"
            parents.append(describe_parent(start.path) | {"role": role})
        if args.model.pretrain_mm_mlp_adapter:
            parents.append(describe_parent(Path(args.model.pretrain_mm_mlp_adapter)) | {"role": "projector"})
    data = _describe_data(args, args.data.data_path, datasets.report, "train")
    data += _describe_data(args, args.data.validation_data_path, datasets.validation_report, "validation")
    return {"parents": parents, "data": data, "details": details}


def _describe_data(args: ParsedArgs, path: str | None, report: DataReport | None, use: str) -> list[dict[str, Any]]:
    """Describe each source: path, fingerprint, counts, images, and its part in a mixture."""
    if path is None or report is None:
        return []
    mixture, entries, sources = None, (None,), [report]
    if is_mixture(path):
        from llava_ft.data.sources.mixture import open_mixture

        mixture = open_mixture(path)
        entries, sources = mixture.entries, report.sources
    described: list[dict[str, Any]] = []
    for entry, source in zip(entries, sources, strict=True):
        folder = source.image_folder or args.data.image_folder
        of_source: dict[str, Any] = {
            "path": _place(path if entry is None else entry.path, None if mixture is None else mixture.path.parent),
            "fingerprint": source.fingerprint,
            "num_records": source.num_records,
            "num_usable": source.num_usable,
            "use": use,
            "image_folder": None if folder is None else absolute_or_hub_name(folder),
        }
        if entry is not None and mixture is not None:
            of_source |= {
                "mixture": str(mixture.path.resolve()),
                "weight": entry.weight,
                "count": entry.count,
                "repeat": entry.repeat,
                "num_taken": source.num_taken,
                "num_held_out": source.num_held_out,
            }
        described.append(of_source)
    return described


def _place(path: str, relative_to: Path | None) -> str:
    """Return an absolute path, also of a pattern such as `shards/{000..012}.tar`; a name on the hub stays as it is."""
    candidates = [Path(path)] if relative_to is None else [relative_to / path, Path(path)]
    for candidate in candidates:
        if candidate.exists() or (candidate.parent != Path() and candidate.parent.is_dir()):
            return str(candidate.absolute())
    return path
