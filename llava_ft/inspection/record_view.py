"""What the model will see of each record, for `llava-ft inspect data`: text, page and JSON."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Final, TextIO

from transformers import PreTrainedTokenizerBase

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.records import parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.data_path import DataSources
from llava_ft.errors import BadSampleError, UserError
from llava_ft.inspection.pages import render_page, write_page
from llava_ft.terminal import has_color, visible

_RECORDS_ON_A_PAGE: Final = 100  # of a source, if nothing says how many
_IMAGES_OF_A_RECORD: Final = 8  # that a page shows

_TARGET_COLOR: Final = ("\x1b[32m", "\x1b[0m")  # green
_CUT_COLOR: Final = ("\x1b[9;31m", "\x1b[0m")  # struck through and red
_TARGET_MARKS: Final = ("[[", "]]")  # around supervised text, where there is no colour
_CUT_MARKS: Final = ("{-", "-}")  # around text that is cut off


@dataclass
class RecordView:
    """One record as the model will see it; `docs/reference/masks.md` describes the keys of the JSON output."""

    source: str
    index: int  # in its source, from 0
    id: str = ""
    # Before expansion and truncation: one `IMAGE_TOKEN_INDEX` for each image. Empty if unusable.
    input_ids: list[int] = field(default_factory=list[int])
    labels: list[int] = field(default_factory=list[int])
    num_images: int = 0
    # None if there are images and no vision tower is known, or their sizes matter and they cannot be opened.
    num_image_tokens: int | None = 0
    num_kept: int = 0  # of `input_ids`, what `model_max_length` leaves; all where that is not known
    images: list[str] = field(default_factory=list[str])
    error: str | None = None

    @property
    def num_supervised(self) -> int:
        """Tokens that are supervised."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def title(self) -> str:
        """The record's position and, where it has one, its id."""
        return f"Record {self.index}" + (f" (id {visible(self.id)!r})" if self.id else "")

    def describe(self) -> str:
        """Give the numbers of the record in a line."""
        num_text_tokens = len(self.input_ids) - self.num_images
        numbers = f"{num_text_tokens} text tokens ({self.num_supervised} supervised), {self.num_images} images"
        if self.num_images and self.num_image_tokens is not None:
            numbers += f" ({self.num_image_tokens} tokens)"
        num_cut = len(self.input_ids) - self.num_kept
        if num_cut:
            num_images = self.input_ids[self.num_kept :].count(IMAGE_TOKEN_INDEX)
            numbers += f"; model_max_length cuts off {num_cut - num_images} text tokens and {num_images} images"
        return numbers


@dataclass
class InspectionSummary:
    """What was seen so far. Tokens are those of usable records before truncation, with those of images where known."""

    num_records: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])  # those that cannot be used, by kind
    num_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0
    num_cut: int = 0

    @property
    def num_usable(self) -> int:
        """Records that a run would train on."""
        return self.num_records - self.counts.total()

    def add(self, view: RecordView) -> None:
        """Count a record."""
        self.num_records += 1
        if view.error is not None:
            self.counts[view.error.partition(":")[0]] += 1
            return
        self.num_tokens += len(view.input_ids) - view.num_images + (view.num_image_tokens or 0)
        self.num_supervised += view.num_supervised
        self.num_images += view.num_images
        self.num_cut += view.num_kept < len(view.input_ids)

    def lines(self) -> list[str]:
        """Give the numbers as text."""
        share = self.num_supervised / max(1, self.num_tokens)
        lines = [
            f"{self.num_records} records, {self.num_usable} usable",
            f"{self.num_tokens} tokens, {self.num_supervised} supervised ({share:.1%})",
            f"{self.num_images} images",
        ]
        if self.num_cut:
            lines.append(f"{self.num_cut} cut off at model_max_length")
        return lines + [f"{count} unusable: {kind}" for kind, count in self.counts.most_common()]


@dataclass(frozen=True)
class Selection:
    """Which records of each source are shown: at most `limit`, at these positions, with these ids; empty means all."""

    limit: int | None = None
    indices: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()


ALL_RECORDS: Final = Selection()


def run_inspect_data(
    data_path: str,
    plan: DataPlan,
    output: TextIO,
    *,
    as_json: bool = False,
    html: Path | None = None,
    selection: Selection = ALL_RECORDS,
) -> bool:
    """Write records of a run's data as text, as JSON lines or as a page; say whether every one of them can be used.

    Raises:
        UserError: The data or a record that was asked for is not there, or the page cannot be written.
    """
    data = DataSources.open(data_path, plan.preparation.directory)
    if html is not None and selection == ALL_RECORDS:
        selection = Selection(limit=_RECORDS_ON_A_PAGE)
    summary = InspectionSummary()
    tokenizer = plan.tokenize.tokenizer
    views = (
        (view, plan.place_of(source))
        for source, prefix in zip(data.sources, data.prompt_prefixes, strict=True)
        for view in view_records(source, plan, summary, selection, prompt_prefix=prefix)
    )
    if html is not None:
        page = render_page(
            "records.html",
            title=f"Records of {data.path}",
            views=views,
            summary=summary,  # complete when all views have been taken, which is before the page shows it
            decode_parts=lambda view: decode_parts(view, tokenizer),
            max_images=_IMAGES_OF_A_RECORD,
        )
        write_page(html, page)
        output.write(f"{html} shows {summary.num_records} of {sum(map(len, data.sources))} records.\n")
    elif as_json:
        for view, _ in views:
            output.write(json.dumps(vars(view), ensure_ascii=False) + "\n")
    else:
        color, source = has_color(output), None
        for view, _ in views:
            if view.source != source and data.mixture is not None:
                source = view.source
                output.write(f"Source {visible(source)}\n\n")
            output.write(render_record(view, tokenizer, color=color) + "\n\n")
    if not as_json:
        output.writelines(f"{line}\n" for line in summary.lines())
    return summary.num_usable == summary.num_records


def view_records(
    source: RecordSource,
    plan: DataPlan,
    summary: InspectionSummary,
    selection: Selection = ALL_RECORDS,
    *,
    prompt_prefix: str = "",
) -> Iterator[RecordView]:
    """Show selected records of a source as the model will see them, in order; `summary` counts what is seen.

    Raises:
        UserError: There is no record at one of the positions.
    """
    for index in selection.indices:
        if not 0 <= index < len(source):
            raise UserError(
                f"There is no record {index} in {source.name}, which has {len(source)}. Allowed is 0 to "
                f"{len(source) - 1}."
            )
    ranges = [(index, index + 1) for index in selection.indices] or [(0, len(source))]
    numbered = (pair for start, end in ranges for pair in enumerate(source.read(start, end), start))
    num_shown = 0
    for index, record in numbered:
        if num_shown == selection.limit:
            return
        view = RecordView(source.name, index)
        try:
            sample = parse_record(record, index, prompt_prefix)
            if selection.ids and sample.id not in selection.ids:
                continue
            tokens, image_tokens, view.num_kept = plan.judge(sample, source)
            view.id, view.images, view.num_images = sample.id, list(sample.images), len(sample.images)
            view.input_ids, view.labels = tokens.input_ids, tokens.labels
            view.num_image_tokens = None if image_tokens is None else sum(image_tokens)
        except BadSampleError as error:
            if selection.ids and error.sample_id not in selection.ids:
                continue
            view.id, view.error = error.sample_id, f"{error.kind}: {error.reason}"
        num_shown += 1
        summary.add(view)
        yield view


def render_record(view: RecordView, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """Write one record for a person to read: its numbers, and the prompt with the supervised text marked.

    In colour supervised text is green and what is cut off struck through; else they stand in `[[ ]]` and `{- -}`. There
    is no final newline, and control characters in the data are shown as escapes.
    """
    if view.error is not None:
        return f"{view.title} cannot be used: {visible(view.error)}"
    target, cut = (_TARGET_COLOR, _CUT_COLOR) if color else (_TARGET_MARKS, _CUT_MARKS)
    text = ""
    for part, is_target, is_cut in decode_parts(view, tokenizer):
        before, after = cut if is_cut else target if is_target else ("", "")
        text += f"{before}{visible(part)}{after}"
    return f"{view.title}: {view.describe()}\n{text}"


def decode_parts(view: RecordView, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool, bool]]:
    """Give the text of a usable record stretch by stretch, `<image>` for an image.

    With each goes whether it is supervised, and whether it is cut off. A tokenizer may drop a blank where a text
    begins, so each stretch is what it adds to the text before it.
    """
    kinds = (
        (token == IMAGE_TOKEN_INDEX, label != IGNORE_INDEX, position >= view.num_kept)
        for position, (token, label) in enumerate(zip(view.input_ids, view.labels, strict=True))
    )
    so_far: list[int] = []
    shown = ""
    for (is_image, is_target, is_cut), group in groupby(
        zip(kinds, view.input_ids, strict=True), key=lambda pair: pair[0]
    ):
        ids = [token for _, token in group]
        if is_image:
            yield IMAGE_TOKEN * len(ids), False, is_cut
            so_far, shown = [], ""
            continue
        so_far += ids
        text = tokenizer.decode(so_far, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        yield text[len(shown) :], is_target, is_cut
        shown = text
