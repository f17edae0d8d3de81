"""Records as the model will see them, as a page: text with what is supervised and what is cut off, and images."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from transformers import PreTrainedTokenizerBase

from llava_ft.data.image_files import ImagePlace
from llava_ft.data.inspection.html import PAGE_END, missing, page_start, text, thumbnail
from llava_ft.data.inspection.records import InspectionSummary, RecordView, decode_parts, describe_view, title_of
from llava_ft.errors import ImageError

NUM_THUMBNAILS: Final = 8
"""Images of a record that are shown."""


def inspection_page(
    shown: Iterable[tuple[RecordView, ImagePlace]],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    summary: InspectionSummary,
) -> Iterator[str]:
    """Write records as a page, piece by piece.

    Args:
        shown: The records, and where the images of each are.
        tokenizer: The one that made their ids.
        title: Heading of the page.
        summary: Of the records, complete when they have all been taken.
    """
    yield page_start(title)
    yield (
        '<p class="dim"><mark>Marked text</mark> is supervised. <del>Struck through</del> is what model_max_length '
        "cuts off. Everything else is context.</p>\n"
    )
    for view, place in shown:
        yield "".join(_record(view, place, tokenizer))
    lines = "<br>".join(map(text, summary.describe().splitlines()))
    yield f"<h2>All records above</h2><p>{lines}</p>\n{PAGE_END}"


def _record(view: RecordView, place: ImagePlace, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield f"<article><h2>{text(title_of(view))}</h2>"
    if view["error"] is not None:
        yield f'<p class="error">Cannot be used: {text(view["error"])}</p></article>\n'
        return
    yield f'<p class="dim">{text(view["source"])}<br>{text(describe_view(view))}</p>'
    for image in islice(view["images"], NUM_THUMBNAILS):
        yield show_image(image, place)
    if len(view["images"]) > NUM_THUMBNAILS:
        yield f'<p class="dim">and {len(view["images"]) - NUM_THUMBNAILS} more images</p>'
    yield "<pre>"
    for part in decode_parts(view, tokenizer):
        piece = text(part.text)
        if part.is_target:
            piece = f"<mark>{piece}</mark>"
        yield f"<del>{piece}</del>" if part.is_cut else piece
    yield "</pre></article>\n"


def show_image(image: str, place: ImagePlace) -> str:
    """Show an image small, or say why that cannot be done."""
    try:
        return thumbnail(place.content(image), image)
    except ImageError as error:
        return missing(str(error))
