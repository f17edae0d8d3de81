"""What `lineage.json` says of a run: what it started from, what it was trained on, and where it was resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava_ft.args import ParsedArgs, to_yaml
from llava_ft.checkpoint.lineage import describe_parent, lasting_path, read_lineage, record_lineage
from llava_ft.checkpoint.start import Start
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.report import DataReport
from llava_ft.data.sources.mixture import MixtureEntry, open_mixture
from llava_ft.data.sources.open import is_mixture
from llava_ft.training.start_from import describe_start


@dataclass
class RunLineage:
    """The lineage of what a run writes.

    Attributes:
        base: Path and fingerprint of the base model.
        parents: What the weights came from besides it; see `describe_parent`.
        data: What is trained on.
        run_config: The resolved configuration, as YAML.
        details: What the run started from, its vision tower, its resumptions and what --force passed over.
    """

    base: tuple[str, str]
    parents: Sequence[Mapping[str, Any]] = ()
    data: Sequence[Mapping[str, Any]] = ()
    run_config: str = ""
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    def write(self, directory: Path, step: int) -> None:
        """Write `lineage.json`, before the manifest that lists it."""
        record_lineage(
            directory,
            "train",
            parents=self.parents,
            base=self.base,
            data=self.data,
            run_config=self.run_config,
            details={"step": step} | self.details,
        )


def lineage_of_run(
    args: ParsedArgs,
    base: tuple[str, str],
    datasets: BuiltDatasets,
    *,
    start: Start | None,
    checkpoint: Path | None,
    ignored: Sequence[str] = (),
) -> RunLineage:
    """Put together the lineage of a run. A resumed run keeps the parents it had.

    Args:
        args: The request, as the user made it.
        base: Path and fingerprint of the base model, the merged one with `adapter_mode=merge_first`.
        datasets: What is trained on.
        start: What the run starts from besides its base.
        checkpoint: What it is resumed from.
        ignored: What --force passed over.
    """
    earlier = read_lineage(checkpoint) if checkpoint is not None else None
    details: dict[str, Any] = {"start": None if start is None else describe_start(start)}
    if args.model.vision_tower:
        details["vision_tower"] = lasting_path(args.model.vision_tower)
    if ignored:
        details["ignored"] = list(ignored)
    parents = _parents(args, start)
    if checkpoint is not None:
        before: list[Any] = list(earlier.details.get("resumptions", [])) if earlier is not None else []
        here = {"from": str(checkpoint.resolve()), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        details["resumptions"] = [*before, here]
    if earlier is not None:
        parents = list(earlier.parents)
        details["start"] = earlier.details.get("start", details["start"])
    return RunLineage(base, parents, describe_data(args, datasets), to_yaml(args), details)


def describe_data(args: ParsedArgs, datasets: BuiltDatasets) -> list[dict[str, Any]]:
    """Describe each source: path, fingerprint, counts, images, and its part in a mixture."""
    assert args.data.data_path is not None
    described = _describe_report(args, args.data.data_path, datasets.report, "train")
    if datasets.validation_report is not None:
        assert args.data.validation_data_path is not None
        described += _describe_report(args, args.data.validation_data_path, datasets.validation_report, "validation")
    return described


def _parents(args: ParsedArgs, start: Start | None) -> list[dict[str, Any]]:
    """Describe what the weights come from besides the base; a merged adapter is the parent of its merged base."""
    parents: list[dict[str, Any]] = []
    if start is not None and not start.is_whole and start.mode != "merge_first":
        role = "adapter left out" if start.has_adapter and start.mode == "new" else "trained on"
        parents.append(describe_parent(start.path) | {"role": role})
    if args.model.pretrain_mm_mlp_adapter:
        parents.append(describe_parent(Path(args.model.pretrain_mm_mlp_adapter)) | {"role": "projector"})
    return parents


def _describe_report(args: ParsedArgs, path: str, report: DataReport, use: str) -> list[dict[str, Any]]:
    mixture = open_mixture(path) if is_mixture(path) else None
    entries: Sequence[MixtureEntry | None] = (None,) if mixture is None else mixture.entries
    sources = [report] if mixture is None else report.sources
    described: list[dict[str, Any]] = []
    for entry, source in zip(entries, sources, strict=True):
        of_source: dict[str, Any] = {
            "path": _place(path if entry is None else entry.path, None if mixture is None else mixture.path.parent),
            "fingerprint": source.fingerprint,
            "num_records": source.num_records,
            "num_usable": source.num_usable,
            "use": use,
            "image_folder": _folder(source.image_folder or args.data.image_folder),
        }
        if entry is not None and mixture is not None:
            of_source["mixture"] = str(mixture.path.resolve())
            of_source |= {
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


def _folder(folder: str | None) -> str | None:
    return None if folder is None else lasting_path(folder)
