"""What the checks before training found, and what follows from it."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from llava_ft.errors import BadSampleError, UserError

logger = logging.getLogger(__name__)

BadSamplePolicy = Literal["error", "skip"]
"""What is done with records that cannot be used: refuse the run, or leave them out."""

BAD_SAMPLE_POLICIES: Final = ("error", "skip")
_NUM_SHOWN: Final = 8  # errors that a message repeats in full
_NUM_NAMED: Final = 100  # records left out that a log line names; the report names all of them


@dataclass(frozen=True)
class DataReport:
    """What the checks before training found in one source of records, or in several together."""

    path: str
    num_records: int
    num_usable: int
    errors: list[BadSampleError] = field(default_factory=list[BadSampleError])  # of the others, in their order
    num_truncated: int = 0  # usable records that are cut off at `model_max_length`
    num_too_long: int = 0  # records left out because they are longer than that
    num_lost_tokens: int = 0  # tokens that were cut off, and all those of records left out for their length
    longest: int = 0  # tokens of the longest record that is longer than `model_max_length`; 0 if there is none
    num_tokens: int = 0  # of the usable records after expansion and truncation
    num_supervised: int = 0  # how many of these have to be predicted
    num_images: int = 0  # of the usable records
    truncated_ids: list[str] = field(default_factory=list[str])  # a record without id by its position
    too_long_ids: list[str] = field(default_factory=list[str])
    num_taken: int | None = None  # samples that a mixture takes for an epoch; None outside a mixture
    num_held_out: int | None = None  # samples that a mixture holds out for validation; None outside a mixture
    fingerprint: str = ""  # changes when the source does; "" for several sources together
    image_folder: str | None = None  # of the source's images where it has one of its own
    sources: list["DataReport"] = field(default_factory=list["DataReport"])  # of single sources, if there are several

    @property
    def counts(self) -> dict[str, int]:
        """Unusable records by kind, most frequent first."""
        return dict(Counter(error.kind for error in self.errors).most_common())

    @property
    def ids_by_kind(self) -> dict[str, list[str]]:
        """The ids of the unusable records by kind; a record without id is named by its position."""
        found: dict[str, list[str]] = {kind: [] for kind in self.counts}
        for error in self.errors:
            found[error.kind].append(name_of(error.sample_id, error.index))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON values."""
        values = {name: value for name, value in vars(self).items() if name not in ("errors", "sources")}
        values |= {"counts": self.counts, "ids_by_kind": self.ids_by_kind}
        if self.sources:
            values["sources"] = [source.to_dict() for source in self.sources]
        return values

    def describe(self) -> str:
        """Say in a line what is usable and how large it is."""
        share = self.num_supervised / max(1, self.num_tokens)
        text = (
            f"{self.path}: {self.num_usable} of {self.num_records} records are usable, with "
            f"{self.num_images} images and {self.num_tokens} tokens, {share:.1%} of them supervised"
        )
        if self.num_truncated:
            text += f"; {self.num_truncated} records are cut off"
        if self.num_too_long:
            text += f"; {self.num_too_long} records are too long and left out"
        if self.num_lost_tokens:
            text += f", {self.num_lost_tokens} tokens are lost"
        if self.num_taken is not None:
            text += f"; {self.num_taken} samples make an epoch"
        if self.num_held_out:
            text += f" and {self.num_held_out} are held out"
        return text + "."

    def describe_errors(self) -> str:
        """Count the unusable records by kind: `image-missing: 2, bad-turn: 1`."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())

    def lines(self) -> list[str]:
        """Give the errors as text, with their source if there are several."""
        if not self.sources:
            return [str(error) for error in self.errors]
        return [f"{source.path}: {error}" for source in self.sources for error in source.errors]


def name_of(sample_id: str, index: int) -> str:
    """Name a record in a report: by its id, or its position where it has none."""
    return sample_id or f"#{index}"


def total(path: str, sources: Sequence[DataReport]) -> DataReport:
    """Put the reports of several sources together: numbers are added, lists joined."""
    counts = [each.name for each in fields(DataReport) if each.name.startswith("num_")]
    lists = ("errors", "truncated_ids", "too_long_ids")
    added = {name: sum(getattr(source, name) or 0 for source in sources) for name in counts}
    joined: dict[str, Any] = {name: [item for source in sources for item in getattr(source, name)] for name in lists}
    longest = max(source.longest for source in sources)
    return DataReport(path=path, longest=longest, sources=list(sources), **added, **joined)


def check_policies(report: DataReport, on_bad_sample: BadSamplePolicy, *, max_length: int, refuses_long: bool) -> None:
    """Refuse what was found, if the user wants that; `max_length` is the tokens of a record allowed, for messages.

    Raises:
        UserError: There are such records, or no record is left.
    """
    lines = report.lines()
    shown = "\n".join(f"  {line}" for line in lines[:_NUM_SHOWN])
    rest = f"\n  and {len(lines) - _NUM_SHOWN} more" if len(lines) > _NUM_SHOWN else ""
    if report.errors and on_bad_sample == "error":
        raise UserError(
            f"{_counted_errors(report)} ({report.describe_errors()}):\n{shown}{rest}\n"
            "Fix these records, or pass --on_bad_sample skip to train without them."
        )
    if report.num_too_long and refuses_long:
        raise UserError(
            f"{_counted_long(report, max_length)}: {_listed(report.too_long_ids, _NUM_SHOWN)}. Raise "
            "--model_max_length, or pass --truncation truncate to cut them off or --truncation drop to train without "
            "them."
        )
    if report.num_usable == 0:
        long = f"; {_counted_long(report, max_length)}" if report.num_too_long else ""
        raise UserError(
            f"{_counted_errors(report)}{long}, so none is left ({report.describe_errors()}):\n{shown}{rest}"
        )


def log_report(report: DataReport, *, max_length: int) -> None:
    """Say what is trained on, and name what is left out."""
    if report.errors:
        names = [repr(error.sample_id) if error.sample_id else str(error.index) for error in report.errors]
        counted, kinds = _counted_errors(report), report.describe_errors()
        logger.warning("%s and are left out (%s): %s", counted, kinds, _listed(names, _NUM_NAMED))
    if report.num_too_long:
        named = _listed(report.too_long_ids, _NUM_NAMED)
        logger.warning("%s and are left out: %s", _counted_long(report, max_length), named)
    for source in [*report.sources, report]:
        logger.info("%s", source.describe())


def _counted_errors(report: DataReport) -> str:
    return f"{len(report.errors)} of {report.num_records} records of {report.path} cannot be used"


def _counted_long(report: DataReport, max_length: int) -> str:
    return (
        f"{report.num_too_long} of {report.num_records} records of {report.path} are longer than model_max_length = "
        f"{max_length} (the longest has {report.longest} tokens)"
    )


def _listed(names: Iterable[str], most: int) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
