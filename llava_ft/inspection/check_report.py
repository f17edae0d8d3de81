"""The report of `llava-ft check-data` as text and as a page; `docs/how-to/check-data.md` describes its JSON keys."""

import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llava_ft.data.preparation.samples import DataPlan
from llava_ft.inspection.check_source import SourceCheck
from llava_ft.inspection.findings import SEVERITIES
from llava_ft.inspection.pages import render_page
from llava_ft.terminal import visible

_STYLES: Final = {"error": "red", "warning": "yellow", "note": "cyan"}
_BAR: Final = 40
_NUM_NAMED: Final = 5  # records of a finding that the text names
_WIDEST: Final = 120  # columns of text on a terminal at most
_UNLIMITED: Final = 100_000  # columns elsewhere: a line that programs read is not wrapped

Json = dict[str, Any]


def as_text(report: Json, *, is_terminal: bool) -> str:
    """Write a report for a person to read; on a terminal with lines wrapped and severities coloured.

    Control characters in the data are shown as escapes.
    """
    written = io.StringIO()
    width = min(_WIDEST, shutil.get_terminal_size().columns) if is_terminal else _UNLIMITED
    console = Console(file=written, width=width, force_terminal=is_terminal, markup=False, highlight=False, emoji=False)

    def section(title: str, *tables: Table) -> None:
        for part in (Text(visible(title), style="bold", overflow="fold"), *tables, ""):
            console.print(part)

    for data in report["data_sets"]:
        numbers, findings, truncation = data["statistics"], data["findings"], data["statistics"]["truncation"]
        section(f"{data['name']} ({data['use']})")
        console.print(_grid(rows_of(numbers)))
        console.print()
        if findings:
            section("Findings", _grid(_finding_rows(findings), right=1))
        if numbers["lengths"] is not None:
            histogram = _grid(_histogram_rows(numbers["lengths"]["histogram"], truncation["max_length"]), right=1)
            line = _grid([(lengths_line(numbers["lengths"]),)])
            section("Tokens of a record, before truncation, with those of images", line, histogram)
        title = f"Truncation at model_max_length = {truncation['max_length']} (--truncation {truncation['policy']})"
        section(title, _grid(truncation_rows(truncation)))
    if report["epoch"] is not None:
        section("One epoch of the training data", _grid(epoch_rows(report["epoch"])))
    if report["fix"] is not None:
        section(f"Written: {report['fix']['path']}", _grid(fix_rows(report["fix"])))
    console.print(Text(visible(verdict(report)), overflow="fold"))
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


def verdict(report: Json) -> str:
    """Say what follows from the findings, in one sentence."""
    severities = [finding["severity"] for data in report["data_sets"] for finding in data["findings"]]
    counts = {name: severities.count(name) for name in SEVERITIES}
    found = ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for name, count in counts.items())
    if report["refused"]:
        return f"Not ready: a run would be refused. {report['refused']} Kinds found: {found}."
    if not report["passed"]:
        return f"Not ready: what is marked as error would stop or spoil a run. Kinds found: {found}."
    return f"Nothing would stop or spoil a run. Kinds found: {found}."


# Each of these gives a part of the report as names and values, for the text and the page.


def rows_of(numbers: Json) -> list[tuple[str, str]]:
    """Give the totals of a data set."""
    unusable = f", {numbers['unusable_images']:,} of them unusable" if numbers["unusable_images"] else ""
    num_bytes, share = numbers["image_bytes"], numbers["supervised"] / max(1, numbers["tokens"])
    size = f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"
    return [
        ("records", f"{numbers['records']:,}, {numbers['usable']:,} usable"),
        ("images", f"{numbers['images']:,} in {numbers['image_files']:,} files{unusable} ({size})"),
        ("tokens", f"{numbers['tokens']:,}, {numbers['supervised']:,} supervised ({share:.1%})"),
    ]


def lengths_line(lengths: Json) -> str:
    """Say how long records are."""
    return (
        f"shortest {lengths['shortest']:,}, median {lengths['median']:,}, mean {lengths['mean']:,.1f}, 99% up to "
        f"{lengths['p99']:,}, longest {lengths['longest']:,}"
    )


def truncation_rows(truncation: Json) -> list[tuple[str, str]]:
    """Give what truncation takes away."""
    dropped = [("records left out", f"{truncation['records_dropped']:,}")] * (truncation["policy"] == "drop")
    return [
        ("records cut off", f"{truncation['records_cut']:,}"),
        *dropped,
        ("tokens lost", f"{truncation['tokens_lost']:,}, {truncation['supervised_lost']:,} of them supervised"),
        ("answers lost", f"{truncation['answers_lost']:,}"),
        ("images lost", f"{truncation['images_lost']:,}"),
    ]


def epoch_rows(epoch: Json) -> list[tuple[str, str]]:
    """Give what an epoch is made of."""
    packing = epoch["packing"]
    packed = f"{packing['rows']:,} of {packing['max_length']} tokens, {packing['records_per_row']:.2f} records in each"
    return [
        ("records", f"{epoch['records']:,}"),
        ("tokens", f"{epoch['tokens']:,}, {epoch['supervised']:,} supervised"),
        ("packed rows", packed),
        ("efficiency", f"{packing['efficiency']:.1%} with --packing true"),
        ("", f"{packing['padded_efficiency']:.1%} padded, in batches of {packing['batch_size']} in random order"),
    ]


def fix_rows(fix: Json) -> list[tuple[str, str]]:
    """Give what was repaired and left out."""
    rows = [("records", f"{fix['written']:,}")]
    for name, count in fix["repaired_counts"].items():
        first = ", ".join(map(str, fix["repaired"][name][:_NUM_NAMED]))
        rows.append(("repaired", f"{count:,} {name} (records {first}{', ...' if count > _NUM_NAMED else ''})"))
    return rows + [("left out", f"{count:,} {kind}") for kind, count in fix["left_out"].items()]


def name_of(example: Json) -> str:
    """Name a record for a person."""
    if example["record"] < 0:
        return ""
    return f"{example['record']} (id {example['id']!r})" if example["id"] else str(example["record"])


def _finding_rows(findings: list[Json]) -> Iterator[tuple[str | Text, ...]]:
    for finding in findings:
        severity = Text(finding["severity"], style=_STYLES[finding["severity"]])
        yield severity, f"{finding['num_records']:,}", f"{finding['kind']}: {finding['title']}"
        named = finding["examples"][:_NUM_NAMED]
        if named[0]["record"] >= 0:
            rest = finding["num_records"] - len(named)
            yield "", "", f"records {', '.join(map(name_of, named))}" + (f" and {rest:,} more" if rest else "")
        reason = next((each["reason"] for each in named if each["reason"]), "")
        if reason:
            yield "", "", f"first: {reason}"
        yield "", "", f"to do: {finding['advice']}"


def bins_of(histogram: Json, max_length: int) -> tuple[list[tuple[str, int]], int]:
    """Name the bins of a histogram; give them with their counts, and the number of the one with the limit in it."""
    edges = histogram["edges"]
    names = [f"{start:,} - {end - 1:,}" for start, end in pairwise(edges)] + [f"{edges[-1]:,} and more"]
    limit = max((number for number, start in enumerate(edges) if start <= max_length), default=-1)
    return list(zip(names, histogram["counts"], strict=True)), limit


def _histogram_rows(histogram: Json, max_length: int) -> Iterator[tuple[str, str, str]]:
    bins, limit = bins_of(histogram, max_length)
    most = max(histogram["counts"])
    for number, (name, count) in enumerate(bins):
        bar = "#" * max(round(_BAR * count / most), int(count > 0))
        yield name, f"{count:,}", f"{bar}  < model_max_length".lstrip() if number == limit else bar


def report_page(report: Json, checks: list[SourceCheck], plan: DataPlan) -> Iterator[str]:
    """Write a report on checks as a page: numbers, charts, and what is wrong, with pictures of the first records."""

    def fates(numbers: Json, check: SourceCheck) -> list[tuple[str, int]]:
        cut, dropped = numbers["truncation"]["records_cut"], numbers["truncation"]["records_dropped"]
        rows = [("used whole", numbers["usable"] - cut), ("cut off", cut)]
        rows += [("too long, left out", dropped)] if dropped else []
        return rows + [(kind, len(tally.indices)) for kind, tally in check.errors.items()]

    return render_page(
        "check.html",
        title="Check of the data",
        report=report,
        verdict=verdict(report),
        data_sets=list(zip(report["data_sets"], checks, strict=True)),
        place_of=plan.place_of,
        rows_of=rows_of,
        lengths_line=lengths_line,
        bins_of=bins_of,
        fates=fates,
        truncation_rows=truncation_rows,
        epoch_rows=epoch_rows,
        fix_rows=fix_rows,
        name_of=name_of,
    )
