"""What a check says about each data set of a run: as one value, as JSON, as text and as a page."""

import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_ft.data.image_files import ImagePlace
from llava_ft.inspection.check_source import Example, SourceCheck
from llava_ft.inspection.findings import SEVERITIES, Finding, Severity
from llava_ft.inspection.pages import render_page
from llava_ft.inspection.repair import FixReport
from llava_ft.inspection.statistics import Epoch, Histogram, Statistics, Truncation
from llava_ft.terminal import visible

JSON_FORMAT: Final = 1

_STYLES: Final[dict[Severity, str]] = {"error": "red", "warning": "yellow", "note": "cyan"}
_BAR: Final = 40
_NUM_NAMED: Final = 5
"""Records of a finding that the text names."""

_WIDEST: Final = 120
"""Columns that text on a terminal takes at most."""
_UNLIMITED: Final = 100_000
"""Columns elsewhere: a line that programs read is not wrapped."""


@dataclass(frozen=True)
class DataSetReport:
    """What was found in one data set: record by record, in words, and in numbers."""

    name: str  # of its source
    use: str  # "training" or "validation"
    check: SourceCheck
    findings: list[Finding]  # the worst first
    statistics: Statistics


@dataclass(frozen=True)
class Report:
    """What was found in all data of a run."""

    data_sets: list[DataSetReport]  # one for each source, the training data first
    epoch: Epoch | None  # None without a usable record
    fix: FixReport | None = None  # None if it was not asked for
    refused: str = ""
    """Why a run would be refused although each source has usable records, "" if it would not."""

    @property
    def passed(self) -> bool:
        """Whether nothing was found that would stop or spoil a run."""
        return not self.counts["error"] and not self.refused

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by severity."""
        found = [finding.severity for data in self.data_sets for finding in data.findings]
        return {severity: found.count(severity) for severity in SEVERITIES}

    @property
    def verdict(self) -> str:
        """What follows from the findings, in one sentence."""
        found = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in self.counts.items())
        if self.refused:
            return f"Not ready: a run would be refused. {self.refused} Kinds found: {found}."
        if not self.passed:
            return f"Not ready: what is marked as error would stop or spoil a run. Kinds found: {found}."
        return f"Nothing would stop or spoil a run. Kinds found: {found}."

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON values. `docs/check_data.md` describes the keys."""
        return {
            "format": JSON_FORMAT,
            "passed": self.passed,
            "data_sets": [
                {
                    "name": data.name,
                    "use": data.use,
                    "statistics": data.statistics.to_dict(),
                    "findings": [finding.to_dict() for finding in data.findings],
                }
                for data in self.data_sets
            ],
            "epoch": asdict(self.epoch) if self.epoch else None,
            "fix": asdict(self.fix) if self.fix else None,
            "refused": self.refused or None,
        }


def as_text(report: Report, *, is_terminal: bool) -> str:
    """Write a report for a person to read, with a final newline; control characters are shown as escapes.

    On a terminal lines are wrapped, and severities coloured unless the environment forbids it. Elsewhere nothing is
    wrapped and there are no control codes.
    """
    written = io.StringIO()
    width = min(_WIDEST, shutil.get_terminal_size().columns) if is_terminal else _UNLIMITED
    console = Console(file=written, width=width, force_terminal=is_terminal, markup=False, highlight=False, emoji=False)

    def heading(text: str) -> None:
        console.print(Text(visible(text), style="bold", overflow="fold"))

    for data in report.data_sets:
        numbers, truncation = data.statistics, data.statistics.truncation
        heading(f"{data.name} ({data.use})")
        console.print()
        console.print(_grid(rows_of(numbers)))
        if data.findings:
            console.print()
            heading("Findings")
            console.print(_grid(_finding_rows(data.findings), right=1))
        if numbers.lengths is not None:
            console.print()
            heading("Tokens of a record, before truncation, with those of images")
            console.print(_grid([(lengths_line(numbers),)]))
            console.print(_grid(_histogram_rows(numbers.lengths.histogram, truncation.max_length), right=1))
        console.print()
        heading(f"Truncation at model_max_length = {truncation.max_length} (--truncation {truncation.policy})")
        console.print(_grid(truncation_rows(truncation)))
        console.print()
    if report.epoch is not None:
        heading("One epoch of the training data")
        console.print(_grid(epoch_rows(report.epoch)))
        console.print()
    if report.fix is not None:
        heading(f"Written: {report.fix.path}")
        console.print(_grid(fix_rows(report.fix)))
        console.print()
    console.print(Text(visible(report.verdict), overflow="fold"))
    return "".join(f"{line.rstrip()}\n" for line in written.getvalue().splitlines())


def _grid(rows: Iterable[Sequence[str | Text]], right: int | None = None) -> Table:
    """Set rows in columns, indented; column number `right` to the right. Long words are broken, never cut off."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for number, row in enumerate(rows):
        if number == 0:
            grid.add_column("")
            for column in range(len(row)):
                grid.add_column(justify="right" if column == right else "left", overflow="fold")
        grid.add_row("", *(cell if isinstance(cell, Text) else visible(cell).replace("\n", " ") for cell in row))
    return grid


def rows_of(numbers: Statistics) -> list[tuple[str, str]]:
    """Give the totals as names and values."""
    unusable = f", {numbers.unusable_images:,} of them unusable" if numbers.unusable_images else ""
    num_bytes = numbers.image_bytes
    size = f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"
    return [
        ("records", f"{numbers.records:,}, {numbers.usable:,} usable"),
        ("images", f"{numbers.images:,} in {numbers.image_files:,} files{unusable} ({size})"),
        ("tokens", f"{numbers.tokens:,}, {numbers.supervised:,} supervised ({numbers.supervised_share:.1%})"),
    ]


def lengths_line(numbers: Statistics) -> str:
    """Say how long records are."""
    lengths = numbers.lengths
    assert lengths is not None
    return (
        f"shortest {lengths.shortest:,}, median {lengths.median:,}, mean {lengths.mean:,.1f}, 99% up to "
        f"{lengths.p99:,}, longest {lengths.longest:,}"
    )


def truncation_rows(truncation: Truncation) -> list[tuple[str, str]]:
    """Give what truncation takes away as names and values."""
    rows = [("records cut off", f"{truncation.records_cut:,}")]
    if truncation.policy == "drop":
        rows.append(("records left out", f"{truncation.records_dropped:,}"))
    return [
        *rows,
        ("tokens lost", f"{truncation.tokens_lost:,}, {truncation.supervised_lost:,} of them supervised"),
        ("answers lost", f"{truncation.answers_lost:,}"),
        ("images lost", f"{truncation.images_lost:,}"),
    ]


def epoch_rows(epoch: Epoch) -> list[tuple[str, str]]:
    """Give what an epoch is made of as names and values."""
    packing = epoch.packing
    return [
        ("records", f"{epoch.records:,}"),
        ("tokens", f"{epoch.tokens:,}, {epoch.supervised:,} supervised"),
        (
            "packed rows",
            f"{packing.rows:,} of {packing.max_length} tokens, {packing.records_per_row:.2f} records in each",
        ),
        ("efficiency", f"{packing.efficiency:.1%} with --packing true"),
        ("", f"{packing.padded_efficiency:.1%} padded, in batches of {packing.batch_size} in random order"),
    ]


def fix_rows(fix: FixReport) -> list[tuple[str, str]]:
    """Give what was repaired and left out as names and values."""
    rows = [("records", f"{fix.written:,}")]
    for name, count in fix.repaired_counts.items():
        first = ", ".join(map(str, fix.repaired[name][:_NUM_NAMED]))
        rows.append(("repaired", f"{count:,} {name} (records {first}{', ...' if count > _NUM_NAMED else ''})"))
    return rows + [("left out", f"{count:,} {kind}") for kind, count in fix.left_out.items()]


def name_of(example: Example) -> str:
    """Name a record for a person."""
    if example.index < 0:
        return ""
    return f"{example.index} (id {example.sample_id!r})" if example.sample_id else str(example.index)


def _finding_rows(findings: list[Finding]) -> Iterator[tuple[str | Text, ...]]:
    for finding in findings:
        severity = Text(finding.severity, style=_STYLES[finding.severity])
        yield severity, f"{finding.num_records:,}", f"{finding.kind}: {finding.title}"
        named = finding.examples[:_NUM_NAMED]
        if finding.num_records and named and named[0].index >= 0:
            rest = finding.num_records - len(named)
            yield "", "", f"records {', '.join(map(name_of, named))}" + (f" and {rest:,} more" if rest else "")
        reason = next((each.reason for each in named if each.reason), "")
        if reason:
            yield "", "", f"first: {reason}"
        yield "", "", f"to do: {finding.advice}"


def bins_of(histogram: Histogram, max_length: int) -> tuple[list[tuple[str, int]], int]:
    """Name the bins of a histogram; give them with their counts, and the number of the one with the limit in it."""
    edges = histogram.edges
    names = [f"{start:,} - {end - 1:,}" for start, end in pairwise(edges)] + [f"{edges[-1]:,} and more"]
    limit = max((number for number, start in enumerate(edges) if start <= max_length), default=-1)
    return list(zip(names, histogram.counts, strict=True)), limit


def _histogram_rows(histogram: Histogram, max_length: int) -> Iterator[tuple[str, str, str]]:
    bins, limit = bins_of(histogram, max_length)
    most = max(histogram.counts)
    for number, (name, count) in enumerate(bins):
        bar = "#" * max(round(_BAR * count / most), int(count > 0))
        yield name, f"{count:,}", f"{bar}  < model_max_length".lstrip() if number == limit else bar


def report_page(report: Report, places: list[ImagePlace]) -> Iterator[str]:
    """Write a report as a page: the numbers, charts, and what is wrong, with pictures of the first records.

    `places` says where the images of each data set are.
    """

    def fates(data: DataSetReport) -> list[tuple[str, int]]:
        truncation = data.statistics.truncation
        rows = [("used whole", data.statistics.usable - truncation.records_cut), ("cut off", truncation.records_cut)]
        if truncation.records_dropped:
            rows.append(("too long, left out", truncation.records_dropped))
        return rows + [(kind, len(tally.indices)) for kind, tally in data.check.errors.items()]

    return render_page(
        "check.html",
        title="Check of the data",
        report=report,
        data_sets=list(zip(report.data_sets, places, strict=True)),
        rows_of=rows_of,
        lengths_line=lengths_line,
        bins_of=bins_of,
        fates=fates,
        truncation_rows=truncation_rows,
        epoch_rows=epoch_rows,
        fix_rows=fix_rows,
        name_of=name_of,
    )
