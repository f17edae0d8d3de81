"""The report that ends every merge, import and export: what each tensor is, and what shows that nothing else changed.

It is shown on screen and written as `conversion_report.json` beside the result.
"""

import logging
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch

from llava_ft.checkpoint.adapter import row_blocks
from llava_ft.checkpoint.full_model import FullModel, ModelTensor
from llava_ft.checkpoint.lineage import record_lineage
from llava_ft.checkpoint.load import fit_rows
from llava_ft.checkpoint.manifest import Manifest, installed_versions
from llava_ft.checkpoint.names import EMBEDDINGS, HEAD
from llava_ft.checkpoint.save import staged_directory, write_json
from llava_ft.errors import CheckpointError, RunError, UserError

logger = logging.getLogger(__name__)

CONVERSION_REPORT: Final = "conversion_report.json"

_DISK_ERRORS: Final = ("os error", "iostream error", "PytorchStreamWriter")
"""By what errors of the operating system are known that safetensors, tokenizers and torch report in their own words."""


@dataclass
class ConversionReport:
    """What a conversion did, and the proof of it."""

    kind: str  # what was done, such as "merge" or "export hf"
    source: str
    target: str
    sources: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    """Number of tensors and of bytes written, by the files they come from."""
    changed: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """For each tensor whose values differ from the base's: its `name`, `max_difference`, the largest absolute
    difference, and `relative`, that as a share of the largest absolute value before (None if that is zero)."""
    frozen: dict[str, Any] = field(default_factory=lambda: {"tensors": 0, "bit_identical": None})
    """`tensors`, how many were taken from the base, and `bit_identical`, whether all of them are in the result bit for
    bit; None if some were rounded to another type."""
    logits: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """For each fixed input its name (`input`), the largest difference of logits between source and result
    (`max_difference`), the largest logit (`scale`) and the largest difference allowed (`bound`)."""
    answers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """For each fixed input the greedy answers of `source` and `result`, as token ids, and whether they are `equal`."""
    ignored: list[str] = field(default_factory=list[str])  # what was wrong and passed over on request
    notes: list[str] = field(default_factory=list[str])  # what else a reader should know
    passed: bool = False
    versions: Mapping[str, str] = field(default_factory=installed_versions)  # of the program, Python and its packages

    def count(self, piece: ModelTensor) -> None:
        """Count a tensor that is written under its source."""
        counts = self.sources.setdefault(piece.source, {"tensors": 0, "bytes": 0})
        counts["tensors"] += 1
        counts["bytes"] += piece.value.nbytes
        if piece.origin == "frozen":
            self.frozen["tensors"] += 1

    def log(self) -> None:
        """Show the report."""
        for line in self.lines():
            logger.info("%s", line)

    def lines(self) -> list[str]:
        """Return the report as lines for the screen, the longest lists shortened."""
        lines = [
            f"{counts['tensors']} tensors, {counts['bytes'] / 2**20:,.1f} MiB from {source}"
            for source, counts in self.sources.items()
        ]
        if self.changed:
            largest = sorted(self.changed, key=lambda change: -(change["relative"] or 0))[:3]
            shown = "; ".join(f"{c['name']} by {c['max_difference']:.3g} ({c['relative'] or 0:.2%})" for c in largest)
            lines.append(f"different from the base's: {len(self.changed)}, most of all {shown}")
        if self.frozen["tensors"]:
            state = {True: "bit-identical to the base", None: "the base's, rounded once to another type"}
            lines.append(f"frozen: {self.frozen['tensors']}, {state[self.frozen['bit_identical']]}")
        lines += [
            f"{entry['input']}: max |difference of logits| {entry['max_difference']:.3g} "
            f"(bound {entry['bound']:.3g}, largest logit {entry['scale']:.3g})"
            for entry in self.logits
        ]
        lines += [
            f"{entry['input']}: the greedy answers of {len(entry['source'])} tokens "
            + ("are equal" if entry["equal"] else "part where two tokens are equally likely")
            for entry in self.answers
        ]
        return lines + [f"note: {note}" for note in self.notes] + [f"ignored: {problem}" for problem in self.ignored]


def check_target(report: ConversionReport, flag: str) -> None:
    """Refuse a place, named by a flag, where something else would be lost, before anything is read.

    Raises:
        CheckpointError: There is a file, or a directory that holds something else than an earlier result.
    """
    target, action = Path(report.target), report.kind.split()[0]
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file. Give a directory with {flag}.")
    if target.is_dir() and any(target.iterdir()) and not (target / CONVERSION_REPORT).is_file():
        raise CheckpointError(
            f"{target} holds files that no {action} has written ({CONVERSION_REPORT} is not among them), and they "
            f"would be replaced. Give another place with {flag}, or empty it first."
        )


@contextmanager
def proven_directory(
    report: ConversionReport,
    full: FullModel,
    flag: str,
    *,
    manifest: Literal["full", "lora"] | None,
    details: Mapping[str, Any] | None = None,
) -> Generator[Path]:
    """Give a directory to write a result into and to prove it there.

    It gets its name, with report, lineage and manifest in it, when the block ends; after an error nothing is left.
    `manifest` is what the result is for a reader of checkpoints, None for files that this program does not load;
    `details` is what else its lineage is to say.

    Raises:
        CheckpointError: The result would replace what it is made from.
        RunError: The disk is full or broken.
    """
    target = Path(report.target)
    sources = [directory.path for directory in full.base.given]
    for source in [*sources, full.base.directory.path, *(source.files.path for source in full.base.sources)]:
        if source.resolve().is_relative_to(target.resolve()):
            raise CheckpointError(f"{target} would replace {source}, which is read. Give another place with {flag}.")
    base = (str(full.base.directory.path), full.fingerprint)
    try:
        with staged_directory(target) as staging:
            yield staging
            report.passed = True
            write_json(staging / CONVERSION_REPORT, asdict(report))
            of_base = None if full.directory.kind == "llava" else base
            record_lineage(staging, report.kind, parents=sources, base=of_base, details=details)
            if manifest is not None:
                Manifest(manifest, *base, 0, full.config.conversation_template or "").write(staging)
    except (UserError, RunError):
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(mark in str(error) for mark in _DISK_ERRORS):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise RunError(
            f"{target} could not be written: {reason}. Nothing was kept; see that the disk is whole and has room."
        ) from error


def prove_tensors(
    report: ConversionReport,
    full: FullModel,
    written: Iterable[tuple[str, torch.Tensor]],
    expected: Iterable[str],
    *,
    num_rows: int | None = None,
) -> None:
    """Compare every tensor that was written with the files it was made from, and put the result into the report.

    Frozen and replaced tensors must be those of the files, bit for bit after at most one rounding. Changed ones must be
    within one rounding of W + s B A, which is computed here anew, from the files.

    Args:
        report: Gets `changed` and `frozen`.
        full: What was written.
        written: The result, by native name. A matrix may have more rows than the model, as some layouts want it.
        expected: Native names of the tensors that there have to be, in the report's order.
        num_rows: Rows of the vocabulary, if those behind them are left out.

    Raises:
        RunError: A tensor is missing, is of no parameter, or has other values.
    """
    names, seen = {name: place for place, name in enumerate(expected)}, set[str]()
    is_identical = True
    for name, tensor in written:
        seen.add(name)
        if name not in names:
            continue
        num_compared = full.shapes[name][0] if num_rows is None or name not in (EMBEDDINGS, HEAD) else num_rows
        if len(tensor) < num_compared:
            raise RunError(f"{name} was written with {len(tensor)} rows, not {num_compared}. Nothing was kept.")
        after = tensor[:num_compared]
        origin, before = full.origin(name), full.before(name)
        if origin == "changed":
            _check_changed(full, name, after)
        else:
            is_identical &= _check_unchanged(full, name, after) or origin != "frozen"
        if before is not None and origin in ("changed", "replaced"):
            largest, scale = 0.0, 0.0
            for rows in row_blocks(before.shape):
                old = before[rows].float()
                scale = max(scale, float(old.abs().max()))
                largest = max(largest, float((after[rows].float() - old).abs_().max()))
            change = {"name": name, "max_difference": largest, "relative": largest / scale if scale else None}
            report.changed.append(change)
    unknown = sorted(seen ^ names.keys())
    if unknown:
        state = "is missing in the result" if unknown[0] in names else "is in the result and of no parameter"
        raise RunError(f"{unknown[0]} and {len(unknown) - 1} other tensors do not fit: {unknown[0]} {state}.")
    report.changed.sort(key=lambda change: names[change["name"]])
    report.frozen["bit_identical"] = is_identical or None


def _check_unchanged(full: FullModel, name: str, after: torch.Tensor) -> bool:
    """Compare a tensor with the one in the files it was taken from; returns whether it still has their type."""
    source, on_disk = full.on_disk(name)
    expected = fit_rows(on_disk.to(after.dtype), full.shapes[name])[: len(after)]
    rows = full.rows.get(name)
    if rows is not None:
        expected = torch.cat([expected[: -rows.shape[0]], rows.to(after.dtype)])
    if not torch.equal(expected, after):
        raise RunError(
            f"{name} was written with other values than {source} holds. The disk may be damaged; nothing was kept."
        )
    return on_disk.dtype == after.dtype


def _check_changed(full: FullModel, name: str, after: torch.Tensor) -> None:
    """Check that a tensor is the base's with the adapters added, by arithmetic of its own, up to one rounding."""
    before = full.quantized_value(name, fit_rows(full.on_disk(name)[1], tuple(after.shape)))
    rounding = 0.51 * torch.finfo(after.dtype).eps
    smallest = torch.finfo(after.dtype).smallest_normal * torch.finfo(after.dtype).eps
    num_trained = full.rows[name].shape[0] if name in full.rows else 0
    for rows in row_blocks((after.shape[0] - num_trained, *after.shape[1:])):
        old = before[rows].float()
        wanted = old
        for share, adapter in full.adapters:
            if name in adapter.biases:
                wanted = wanted + share * adapter.biases[name][rows]
            if name in adapter.factors:
                a, b = adapter.factors[name]
                wanted = wanted + (share * adapter.scales[name]) * torch.einsum("or,ri->oi", b[rows].float(), a.float())
            if name in adapter.magnitudes:
                wanted = torch.nn.functional.normalize(wanted, dim=1) * adapter.magnitudes[name][rows, None].float()
        accumulated = 2e-6 * float(torch.maximum(old.abs().amax(), wanted.abs().amax()))
        error = (after[rows].float() - wanted).abs_()
        allowed = wanted.abs().mul_(rounding).add_(accumulated + smallest)
        if not bool((error <= allowed).all()):  # NaN is beyond every bound
            raise RunError(
                f"{name} was written with other values than the base's with the adapter added: they are off by up to "
                f"{float(error.max()):.3g}, where rounding explains {float(allowed.max()):.3g}. Nothing was kept."
            )
