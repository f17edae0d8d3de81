"""A report for the terminal."""

import textwrap
from collections.abc import Iterator
from typing import Final

from llava_ft.data.doctor.findings import Finding, Severity
from llava_ft.data.doctor.records import Remark
from llava_ft.data.doctor.report import DataSetReport, FixReport, Report
from llava_ft.data.doctor.statistics import Epoch, Lengths, Statistics, Truncation
from llava_ft.data.inspection.terminal import visible

_COLORS: Final[dict[Severity, str]] = {"error": "\x1b[31m", "warning": "\x1b[33m", "note": "\x1b[36m"}
_PLAIN: Final = "\x1b[0m"
_WIDTH: Final = 100
_BAR: Final = 40
_NUM_NAMED: Final = 5


def as_text(report: Report, *, color: bool) -> str:
    """Write a report for a person to read.

    Args:
        report: The report.
        color: Whether severities are coloured.

    Returns:
        Text without a final newline. Control characters in the data are shown as escapes.
    """
    lines: list[str] = []
    for data in report.data_sets:
        lines += [*_data_set(data, color), ""]
    if report.epoch is not None:
        lines += ["One epoch of the training data", *_table(epoch_rows(report.epoch)), ""]
    if report.fix is not None:
        lines += [*_fix(report.fix), ""]
    lines.append(verdict(report))
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Say in one sentence what follows from the findings."""
    counts = report.counts
    found = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items())
    if report.refused:
        return f"Not ready: a run would be refused. {visible(report.refused)} Kinds found: {found}."
    if not report.passed:
        return f"Not ready: what is marked as error would stop or spoil a run. Kinds found: {found}."
    return f"Nothing would stop or spoil a run. Kinds found: {found}."


def _data_set(data: DataSetReport, color: bool) -> Iterator[str]:
    numbers = data.statistics
    yield f"{visible(data.name)} ({data.use})"
    yield ""
    yield from _table(rows_of(numbers))
    if data.findings:
        yield ""
        yield "Findings"
        for finding in data.findings:
            yield from _finding(finding, color)
    if numbers.lengths is not None:
        yield ""
        yield "Tokens of a record, before truncation, with those of images"
        yield from _lengths(numbers.lengths, numbers.truncation.max_length)
    yield ""
    yield f"Truncation at model_max_length = {numbers.truncation.max_length} (--truncation {numbers.truncation.policy})"
    yield from _table(truncation_rows(numbers.truncation))


def rows_of(numbers: Statistics) -> list[tuple[str, str]]:
    """Give the totals as names and values."""
    unusable = f", {numbers.unusable_images:,} of them unusable" if numbers.unusable_images else ""
    return [
        ("records", f"{numbers.records:,}, {numbers.usable:,} usable"),
        ("images", f"{numbers.images:,} in {numbers.image_files:,} files{unusable} ({_size(numbers.image_bytes)})"),
        ("tokens", f"{numbers.tokens:,}, {numbers.supervised:,} supervised ({numbers.supervised_share:.1%})"),
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


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


def name_of(remark: Remark) -> str:
    """Name a record for a person."""
    if remark.index < 0:
        return ""
    return f"{remark.index} (id {remark.sample_id!r})" if remark.sample_id else str(remark.index)


def _finding(finding: Finding, color: bool) -> Iterator[str]:
    before, after = (_COLORS[finding.severity], _PLAIN) if color else ("", "")
    yield f"  {before}{finding.severity:<8}{after}{finding.num_records:>9,}  {finding.kind}: {finding.title}"
    indent = " " * 21
    named = finding.examples[:_NUM_NAMED]
    if finding.num_records and named and named[0].index >= 0:
        rest = finding.num_records - len(named)
        names = ", ".join(visible(name_of(each)) for each in named)
        yield from _wrapped(f"records {names}" + (f" and {rest:,} more" if rest else ""), indent)
    reason = next((each.reason for each in named if each.reason), "")
    if reason:
        yield from _wrapped(f"first: {visible(reason)}", indent)
    yield from _wrapped(f"to do: {finding.advice}", indent)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text.replace("\n", " "), _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False
    )


def _lengths(lengths: Lengths, max_length: int) -> Iterator[str]:
    yield (
        f"  shortest {lengths.shortest:,}, median {lengths.median:,}, mean {lengths.mean:,.1f}, 99% up to "
        f"{lengths.p99:,}, longest {lengths.longest:,}"
    )
    bins = lengths.histogram
    most = max(bins.counts)
    for position, (start, count) in enumerate(zip(bins.edges, bins.counts, strict=True)):
        is_last = position == len(bins.edges) - 1
        end = "     more" if is_last else f" - {bins.edges[position + 1] - 1:>6,}"
        bar = "#" * max(round(_BAR * count / most), int(count > 0))
        is_limit = start <= max_length and (is_last or max_length < bins.edges[position + 1])
        mark = "  < model_max_length" if is_limit else ""
        yield f"  {start:>7,}{end} {count:>9,}  {bar}{mark}".rstrip()


def _fix(fix: FixReport) -> Iterator[str]:
    yield f"Written: {visible(fix.path)}"
    rows = [("records", f"{fix.written:,}")]
    for name, count in fix.repaired_counts.items():
        first = ", ".join(map(str, fix.repaired[name][:_NUM_NAMED]))
        rows.append(("repaired", f"{count:,} {name} (records {first}{', ...' if count > _NUM_NAMED else ''})"))
    rows += [("left out", f"{count:,} {kind}") for kind, count in fix.left_out.items()]
    yield from _table(rows)


def _table(rows: list[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"  {name:<{width}}  {value}"
