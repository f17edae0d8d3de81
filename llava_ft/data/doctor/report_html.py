"""A report as a page: the numbers, charts, and what is wrong, with pictures of the worst records."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from llava_ft.data.doctor.findings import Finding
from llava_ft.data.doctor.report import DataSetReport, FixReport, Report
from llava_ft.data.doctor.report_text import epoch_rows, name_of, rows_of, truncation_rows, verdict
from llava_ft.data.doctor.statistics import Histogram, Statistics
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.inspection.html import PAGE_END, bar_chart, page_start, table, text
from llava_ft.data.inspection.page import show_image

_NUM_SHOWN: Final = 10
"""Records of a finding that are listed."""
_NUM_WITH_PICTURES: Final = 4
"""Records of a finding whose images are shown."""
_PICTURES_OF_A_RECORD: Final = 2


def report_page(report: Report, places: list[ImagePlace]) -> Iterator[str]:
    """Write a report as a page, piece by piece.

    Args:
        report: The report.
        places: Where the images of each data set are.
    """
    yield page_start("Check of the data")
    yield f'<p class="{"dim" if report.passed else "error"}">{text(verdict(report))}</p>\n'
    for data, place in zip(report.data_sets, places, strict=True):
        yield from _data_set(data, place)
    if report.epoch is not None:
        yield f"<h2>One epoch of the training data</h2>\n{table(epoch_rows(report.epoch))}"
    if report.fix is not None:
        yield _fix(report.fix)
    yield PAGE_END


def _data_set(data: DataSetReport, place: ImagePlace) -> Iterator[str]:
    numbers = data.statistics
    yield f"<h2>{text(data.name)} ({text(data.use)})</h2>\n{table(rows_of(numbers))}"
    if numbers.lengths is not None:
        yield "<h3>Tokens of a record, before truncation, with those of images</h3>\n"
        yield length_chart(numbers.lengths.histogram, numbers.truncation.max_length)
        lengths = numbers.lengths
        yield (
            f'<p class="dim">shortest {lengths.shortest:,}, median {lengths.median:,}, mean {lengths.mean:,.1f}, '
            f"99% up to {lengths.p99:,}, longest {lengths.longest:,}</p>\n"
        )
    yield "<h3>What becomes of the records</h3>\n"
    yield _fate_chart(data)
    yield "<h3>What the tokens are</h3>\n"
    yield _token_chart(numbers)
    yield f"<h3>Truncation at model_max_length = {numbers.truncation.max_length}</h3>\n"
    yield table(truncation_rows(numbers.truncation))
    yield f"<h3>Findings</h3>\n{'' if data.findings else '<p>None.</p>'}"
    for finding in data.findings:
        yield "".join(_finding(finding, data, place))


def length_chart(histogram: Histogram, max_length: int) -> str:
    """Draw the histogram of lengths, with a line at the limit."""
    edges = histogram.edges
    labels = [f"{start:,} - {end - 1:,}" for start, end in pairwise(edges)]
    labels.append(f"{edges[-1]:,} and more")
    last_below = max((bin for bin, start in enumerate(edges) if start <= max_length), default=0)
    return bar_chart(labels, histogram.counts, limit=(last_below, f"model_max_length {max_length:,}"))


def _fate_chart(data: DataSetReport) -> str:
    truncation = data.statistics.truncation
    rows = [("used whole", data.statistics.usable - truncation.records_cut), ("cut off", truncation.records_cut)]
    if truncation.records_dropped:
        rows.append(("too long, left out", truncation.records_dropped))
    rows += [(kind, len(tally.indices)) for kind, tally in data.check.errors.items()]
    return bar_chart([name for name, _ in rows], [count for _, count in rows])


def _token_chart(numbers: Statistics) -> str:
    truncation = numbers.truncation
    rows = [
        ("supervised", numbers.supervised),
        ("context", numbers.tokens - numbers.supervised),
        ("lost", truncation.tokens_lost),
    ]
    return bar_chart([name for name, _ in rows], [count for _, count in rows])


def _finding(finding: Finding, data: DataSetReport, place: ImagePlace) -> Iterator[str]:
    yield (
        f'<article><p><strong class="{finding.severity}">{finding.severity}</strong> '
        f"<strong>{text(finding.kind)}</strong>: {text(finding.title)} ({finding.num_records:,})<br>"
        f'<span class="dim">{text(finding.advice)}</span></p>'
    )
    yield "<table>"
    for example in finding.examples[:_NUM_SHOWN]:
        yield f"<tr><td>{text(name_of(example))}</td><td>{text(example.reason)}</td></tr>"
    yield "</table>"
    for example in finding.examples[:_NUM_WITH_PICTURES]:
        if example.index >= 0:
            numbers = data.check.images.of_record(example.index)
            for number in numbers[:_PICTURES_OF_A_RECORD]:
                yield show_image(data.check.images.names[number], place)
    yield "</article>\n"


def _fix(fix: FixReport) -> str:
    rows = [("written to", fix.path), ("records", f"{fix.written:,}")]
    rows += [(f"repaired: {name}", f"{count:,}") for name, count in fix.repaired_counts.items()]
    rows += [(f"left out: {kind}", f"{count:,}") for kind, count in fix.left_out.items()]
    return f"<h2>Repaired copy</h2>\n{table(rows)}"
