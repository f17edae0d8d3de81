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
from llava_ft.data.image_files import ImagePlace, is_relative
from llava_ft.data.preparation.image_facts import look_at_image
from llava_ft.data.records import Sample, parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.mixture import with_prompt_prefix
from llava_ft.data.sources.selection import DataSources
from llava_ft.errors import BadSampleError, ImageError, UserError
from llava_ft.geometry import SizeWH
from llava_ft.inspection.data_plan import DataPlan
from llava_ft.inspection.pages import render_page, write_page
from llava_ft.terminal import has_color, visible

RECORDS_ON_A_PAGE: Final = 100
"""Records that a page shows if nothing says how many."""

IMAGES_OF_A_RECORD: Final = 8
"""Images of a record that a page shows."""

_TARGET_COLOR: Final = ("\x1b[32m", "\x1b[0m")  # green
_CUT_COLOR: Final = ("\x1b[9;31m", "\x1b[0m")  # struck through and red
_TARGET_MARKS: Final = ("[[", "]]")  # around supervised text, where there is no colour
_CUT_MARKS: Final = ("{-", "-}")  # around text that is cut off


@dataclass
class RecordView:
    """One record as the model will see it; the keys of the JSON output in `docs/masks.md`.

    Attributes:
        source: Name of its source.
        index: Position of the record in its source, counted from 0.
        id: The record's own id, "" when it has none.
        input_ids: Before expansion and truncation: one `IMAGE_TOKEN_INDEX` per image. Empty if unusable.
        labels: As long as `input_ids`; `IGNORE_INDEX` where nothing is supervised.
        num_images: Images of the record; 0 if unusable.
        num_image_tokens: Positions that all images together take. None if there are images and no vision
            tower is known, or their sizes matter and they cannot be opened.
        num_kept: How many of `input_ids` `model_max_length` leaves; all where that is not known.
        images: The images as the record names them; those whose content is in the source as `embedded:...`.
        error: Why the record cannot be used, else None.
    """

    source: str
    index: int
    id: str = ""
    input_ids: list[int] = field(default_factory=list[int])
    labels: list[int] = field(default_factory=list[int])
    num_images: int = 0
    num_image_tokens: int | None = 0
    num_kept: int = 0
    images: list[str] = field(default_factory=list[str])
    error: str | None = None

    @property
    def num_supervised(self) -> int:
        """Tokens that are supervised."""
        return sum(label != IGNORE_INDEX for label in self.labels)

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

    def of(self, source: RecordSource) -> Iterator[tuple[int, object]]:
        """Give the positions and raw records that may be shown; ids are not looked at.

        Raises:
            UserError: There is no record at one of the positions.
        """
        if not self.indices:
            yield from enumerate(source.read(0, len(source)))
            return
        for index in self.indices:
            if not 0 <= index < len(source):
                raise UserError(
                    f"There is no record {index} in {source.name}, which has {len(source)}. Allowed is 0 to "
                    f"{len(source) - 1}."
                )
            yield index, next(iter(source.read(index, index + 1)))


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
    """Write records of a run's data as the model will see them.

    Args:
        data_path: Of the run.
        plan: How the run reads its data.
        output: Where to.
        as_json: Whether to write one JSON object a line instead of text to read.
        html: Write a page to this file instead; without a selection, of the first `RECORDS_ON_A_PAGE` records.
        selection: Which records of each source.

    Returns:
        Whether every record shown can be used.

    Raises:
        UserError: The data or a record that was asked for is not there, or the page cannot be written.
    """
    data = DataSources.open(data_path, plan.preparation.directory)
    if html is not None and selection == ALL_RECORDS:
        selection = Selection(limit=RECORDS_ON_A_PAGE)
    summary = InspectionSummary()
    tokenizer = plan.tokenize.tokenizer
    views = (
        (view, plan.place_of(source))
        for source, prefix in zip(data.sources, data.prompt_prefixes, strict=True)
        for view in view_records(source, plan, summary, selection, prompt_prefix=prefix)
    )
    if html is not None:
        write_page(html, records_page(views, tokenizer, f"Records of {data.path}", summary))
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

    `prompt_prefix` is what the run puts before the first question of each record.
    """
    num_shown = 0
    for index, record in selection.of(source):
        if num_shown == selection.limit:
            return
        view = RecordView(source.name, index)
        try:
            sample = with_prompt_prefix(parse_record(record, index), prompt_prefix)
            if selection.ids and sample.id not in selection.ids:
                continue
            _look(sample, plan, plan.place_of(source), view)
        except BadSampleError as error:
            if selection.ids and error.sample_id not in selection.ids:
                continue
            view.id, view.error = error.sample_id, f"{error.kind}: {error.reason}"
        num_shown += 1
        summary.add(view)
        yield view


def _look(sample: Sample, plan: DataPlan, place: ImagePlace, view: RecordView) -> None:
    """Fill in what the model sees of a record.

    Raises:
        BadSampleError: A run would not train on it.
    """
    tokens = plan.tokenize(sample)
    sizes: list[SizeWH | None] = []
    for image in sample.images:
        try:  # without a folder there is nothing to open
            is_known = place.folder is not None or not is_relative(image)
            sizes.append(look_at_image(image, place, plan.checks) if is_known else None)
        except ImageError as error:
            raise BadSampleError(sample.index, sample.id, error.kind, str(error)) from None
    geometry = plan.limits.geometry
    num_kept, num_image_tokens = len(tokens.input_ids), None
    if not sizes or (geometry is not None and not (geometry.needs_image_sizes and None in sizes)):
        layout = plan.layout(sample, tokens, sizes)
        num_kept, num_image_tokens = layout.judge(plan.limits).ids, sum(width for _, width in layout.images)
    view.id, view.images = sample.id, list(sample.images)
    view.input_ids, view.labels = tokens.input_ids, tokens.labels
    view.num_images, view.num_image_tokens, view.num_kept = tokens.num_images, num_image_tokens, num_kept


def render_record(view: RecordView, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """Write one record for a person to read: its numbers, and the prompt with the supervised text marked.

    In colour supervised text is green and what is cut off struck through; else they stand in `[[ ]]` and `{- -}`. There
    is no final newline, and control characters in the data are shown as escapes.
    """
    if view.error is not None:
        return f"{view.title} cannot be used: {visible(view.error)}"
    target, cut = (_TARGET_COLOR, _CUT_COLOR) if color else (_TARGET_MARKS, _CUT_MARKS)
    text = ""
    for part in decode_parts(view, tokenizer):
        before, after = cut if part.is_cut else target if part.is_target else ("", "")
        text += f"{before}{visible(part.text)}{after}"
    return f"{view.title}: {view.describe()}\n{text}"


def records_page(
    views: Iterator[tuple[RecordView, ImagePlace]],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    summary: InspectionSummary,
) -> Iterator[str]:
    """Write records, each with where its images are, as a page, piece by piece.

    `summary` is complete when they have all been taken, which is before the page shows it.
    """
    return render_page(
        "records.html",
        title=title,
        views=views,
        summary=summary,
        decode_parts=lambda view: decode_parts(view, tokenizer),
        max_images=IMAGES_OF_A_RECORD,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a record's text, `<image>` for an image: whether it is supervised, and whether it is cut off."""

    text: str
    is_target: bool
    is_cut: bool


def decode_parts(view: RecordView, tokenizer: PreTrainedTokenizerBase) -> Iterator[Part]:
    """Give the text of a usable record stretch by stretch.

    A tokenizer may drop a blank where a text begins, so each stretch is what it adds to the text before it.
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
            yield Part(IMAGE_TOKEN * len(ids), False, is_cut)
            so_far, shown = [], ""
            continue
        so_far += ids
        text = tokenizer.decode(so_far, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        yield Part(text[len(shown) :], is_target, is_cut)
        shown = text
