"""`llava-ft inspect data`: what the model will see of each record, without any model weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

from llava_ft.args import ParsedArgs
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.inspection.html import write_page
from llava_ft.data.inspection.page import inspection_page
from llava_ft.data.inspection.records import InspectionSummary, Inspector, RecordView, Selection, render_colored
from llava_ft.data.inspection.terminal import has_color, visible
from llava_ft.data.sources.selection import DataSources
from llava_ft.training.data_model import DataModel, find_data_model
from llava_ft.training.data_setup import preparation_settings

RECORDS_ON_A_PAGE: Final = 100
"""Records that a page shows if nothing says how many."""


def run_inspect_data(
    args: ParsedArgs, output: TextIO, *, as_json: bool, html: Path | None = None, selection: Selection | None = None
) -> bool:
    """Write records of the training data as the model will see them.

    Args:
        args: The request; a directory with a tokenizer is enough of a model.
        output: Where to.
        as_json: Whether to write one JSON object a line instead of text to read.
        html: Write a page to this file instead; without a selection, of the first `RECORDS_ON_A_PAGE` records.
        selection: Which records of each source; None means all.

    Returns:
        Whether every record shown can be used.

    Raises:
        UserError: The data, the tokenizer or the template is not there.
    """
    model = find_data_model(args)
    assert args.data.data_path is not None
    data = DataSources.open(args.data.data_path, preparation_settings(args).directory)
    selection = selection or Selection()
    if html is not None and selection == Selection():
        selection = Selection(limit=RECORDS_ON_A_PAGE)
    summary = InspectionSummary()
    inspector = Inspector(
        model.tokenize,
        model.limits,
        image_folder=args.data.image_folder,
        check_images=args.data.check_images,
        exif_transpose=args.data.image_exif_transpose,
    )
    views = _views(inspector, data, summary, selection)
    if html is not None:
        write_page(html, inspection_page(views, model.tokenizer, f"Records of {data.path}", summary))
        output.write(f"{html} shows {summary.num_records} of {sum(map(len, data.sources))} records.\n")
    else:
        shown = None
        for view, _ in views:
            if view["source"] != shown and data.mixture is not None and not as_json:
                shown = view["source"]
                output.write(f"Source {visible(shown)}\n\n")
            output.write(_line(view, model, output, as_json=as_json))
    if not as_json:
        output.write(summary.describe() + "\n")
    return summary.num_usable == summary.num_records


def _views(
    inspector: Inspector, data: DataSources, summary: InspectionSummary, selection: Selection
) -> Iterator[tuple[RecordView, ImagePlace]]:
    """Give the records of each source, and where their images are."""
    for source, prefix in zip(data.sources, data.prompt_prefixes, strict=True):
        place = inspector.place_of(source)
        for view in inspector.views(source, summary, selection, prompt_prefix=prefix):
            yield view, place


def _line(view: RecordView, model: DataModel, output: TextIO, *, as_json: bool) -> str:
    if as_json:
        return json.dumps(view, ensure_ascii=False) + "\n"
    return render_colored(view, model.tokenizer, color=has_color(output)) + "\n\n"
