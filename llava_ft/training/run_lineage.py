"""What `lineage.json` says of a run: what it started from, what it was trained on, and where it was resumed."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llava_ft.args import ParsedArgs, to_yaml
from llava_ft.checkpoint.directory import absolute_or_hub_name
from llava_ft.checkpoint.lineage import describe_parent, read_lineage, record_lineage
from llava_ft.checkpoint.start import Start
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.report import DataReport
from llava_ft.data.sources.mixture import MixtureEntry, open_mixture
from llava_ft.data.sources.open import is_mixture
from llava_ft.training.start_from import describe_start


def lineage_writer(
    args: ParsedArgs,
    base: tuple[str, str],
    datasets: BuiltDatasets,
    *,
    start: Start | None,
    checkpoint: Path | None,
    ignored: Sequence[str] = (),
) -> Callable[[Path, int], None]:
    """Put together the lineage of a run. A resumed run keeps the parents it had.

    Args:
        args: The request, as the user made it.
        base: Path and fingerprint of the base model, the merged one with `adapter_mode=merge_first`.
        datasets: What is trained on.
        start: What the run starts from besides its base.
        checkpoint: What it is resumed from.
        ignored: What --force passed over.

    Returns:
        Writes `lineage.json` into a directory, given how many steps were done; to be called before the manifest, which
        lists it, is written.
    """
    earlier = read_lineage(checkpoint) if checkpoint is not None else None
    details: dict[str, Any] = {"start": None if start is None else describe_start(start)}
    if args.model.vision_tower:
        details["vision_tower"] = absolute_or_hub_name(args.model.vision_tower)
    if ignored:
        details["ignored"] = list(ignored)
    parents: list[Mapping[str, Any]] = []
    # With `merge_first` the adapter is no parent of the run: it is that of the merged base.
    if start is not None and not start.is_whole and start.mode != "merge_first":
        role = "adapter left out" if start.has_adapter and start.mode == "new" else "trained on"
        parents.append(describe_parent(start.path) | {"role": role})
    if args.model.pretrain_mm_mlp_adapter:
        parents.append(describe_parent(Path(args.model.pretrain_mm_mlp_adapter)) | {"role": "projector"})
    if checkpoint is not None:
        before: list[Any] = list(earlier.details.get("resumptions", [])) if earlier is not None else []
        here = {"from": str(checkpoint.resolve()), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        details["resumptions"] = [*before, here]
    if earlier is not None:
        parents = list(earlier.parents)
        details["start"] = earlier.details.get("start", details["start"])
    data = _describe_data(args, args.data.data_path, datasets.report, "train")
    data += _describe_data(args, args.data.validation_data_path, datasets.validation_report, "validation")
    run_config = to_yaml(args)

    def write(directory: Path, step: int) -> None:
        record_lineage(
            directory,
            "train",
            parents=parents,
            base=base,
            data=data,
            run_config=run_config,
            details={"step": step} | details,
        )

    return write


def _describe_data(args: ParsedArgs, path: str | None, report: DataReport | None, use: str) -> list[dict[str, Any]]:
    """Describe each source: path, fingerprint, counts, images, and its part in a mixture."""
    if path is None or report is None:
        return []
    mixture = open_mixture(path) if is_mixture(path) else None
    entries: Sequence[MixtureEntry | None] = (None,) if mixture is None else mixture.entries
    sources = [report] if mixture is None else report.sources
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
