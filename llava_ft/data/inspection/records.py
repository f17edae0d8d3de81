"""What the model will see of each record, for `llava-ft inspect data`.

It takes a tokenizer, a template and the records: no weights and, unless asked for, no images.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Final, TypedDict

from transformers import PreTrainedTokenizerBase

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.data.image_files import ImageCheck, ImagePlace, check_image, check_image_header
from llava_ft.data.inspection.judge import judge
from llava_ft.data.inspection.terminal import visible
from llava_ft.data.preparation.samples import Limits
from llava_ft.data.records import Sample, parse_embedded, parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.mixture import with_prompt_prefix
from llava_ft.data.tokenize import TokenizedSample
from llava_ft.errors import BadSampleError, ImageError, UserError
from llava_ft.geometry import SizeWH

_GREEN: Final = "\x1b[32m"
_CUT: Final = "\x1b[9;31m"
"""Struck through and red."""
_PLAIN: Final = "\x1b[0m"
_MARKS: Final = ("[[", "]]")
"""What stands around supervised text where there is no colour."""
_CUT_MARKS: Final = ("{-", "-}")
"""What stands around text that is cut off where there is no colour."""


class RecordView(TypedDict):
    """One record as the model will see it.

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
    id: str
    input_ids: list[int]
    labels: list[int]
    num_images: int
    num_image_tokens: int | None
    num_kept: int
    images: list[str]
    error: str | None


@dataclass
class InspectionSummary:
    """What was seen so far; an `Inspector` adds to it.

    Attributes:
        num_records: Records seen.
        num_usable: Records that a run could train on.
        counts: The others, by kind.
        num_tokens: Tokens of the usable records before truncation, with those of images where known.
        num_supervised: How many of these are supervised.
        num_images: Images of the usable records.
        num_cut: Usable records that are cut off.
    """

    num_records: int = 0
    num_usable: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])
    num_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0
    num_cut: int = 0

    def add_usable(self, view: RecordView) -> None:
        """Count a usable record."""
        self.num_records += 1
        self.num_usable += 1
        self.num_tokens += len(view["input_ids"]) - view["num_images"] + (view["num_image_tokens"] or 0)
        self.num_supervised += _num_supervised(view)
        self.num_images += view["num_images"]
        self.num_cut += view["num_kept"] < len(view["input_ids"])

    def add_unusable(self, error: BadSampleError) -> None:
        """Count a record that cannot be used."""
        self.num_records += 1
        self.counts[error.kind] += 1

    def describe(self) -> str:
        """Give the numbers as a few lines of text."""
        share = self.num_supervised / max(1, self.num_tokens)
        lines = [
            f"{self.num_records} records, {self.num_usable} usable",
            f"{self.num_tokens} tokens, {self.num_supervised} supervised ({share:.1%})",
            f"{self.num_images} images",
        ]
        if self.num_cut:
            lines.append(f"{self.num_cut} cut off at model_max_length")
        lines += [f"{count} unusable: {kind}" for kind, count in self.counts.most_common()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Selection:
    """Which records of a source are shown.

    Attributes:
        limit: At most so many; None means all.
        indices: Only these positions; empty means all.
        ids: Only records with these ids; empty means all.
    """

    limit: int | None = None
    indices: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()

    def records(self, source: RecordSource) -> Iterator[tuple[int, object]]:
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


@dataclass(frozen=True)
class Inspector:
    """Looks at records as a run would.

    Attributes:
        tokenize: Usually a `SampleTokenizer`.
        limits: How long a record may be, and how many tokens an image has. None checks no length.
        image_folder: Folder that relative paths of images start from. Without one they are not opened.
        check_images: How much of each image file is read: "none", "exists", "header" or "decode".
        exif_transpose: Whether pictures are turned as their EXIF orientation says.
    """

    tokenize: Callable[[Sample], TokenizedSample]
    limits: Limits | None = None
    image_folder: str | os.PathLike[str] | None = None
    check_images: ImageCheck = "none"
    exif_transpose: bool = False

    def views(
        self,
        source: RecordSource,
        summary: InspectionSummary,
        selection: Selection | None = None,
        *,
        prompt_prefix: str = "",
    ) -> Iterator[RecordView]:
        """Show records as the model will see them, in order.

        Args:
            source: A prepared source.
            summary: Counts what is seen.
            selection: Which records; None means all.
            prompt_prefix: Text that the run puts before the first question of each record.
        """
        selection = selection or Selection()
        look = _Look(source.name, self.place_of(source), prompt_prefix, selection.ids)
        seen = (self._view(record, index, look) for index, record in selection.records(source))
        for view in islice((view for view in seen if view is not None), selection.limit):
            if isinstance(view, BadSampleError):
                summary.add_unusable(view)
                yield _unusable(view, source.name)
            else:
                summary.add_usable(view)
                yield view

    def place_of(self, source: RecordSource) -> ImagePlace:
        """Say where the images of a source are."""
        return ImagePlace(source.image_folder or self.image_folder, source)

    def _view(self, record: object, index: int, look: "_Look") -> RecordView | BadSampleError | None:
        try:
            sample = with_prompt_prefix(parse_record(record, index), look.prompt_prefix)
            if look.ids and sample.id not in look.ids:
                return None
            tokens = self.tokenize(sample)
            return self._usable(sample, tokens, self._sizes(sample, look.place), look.source)
        except BadSampleError as error:
            return None if look.ids and error.sample_id not in look.ids else error

    def _usable(self, sample: Sample, tokens: TokenizedSample, sizes: list[SizeWH | None], source: str) -> RecordView:
        geometry = self.limits.geometry if self.limits else None
        needs_sizes = geometry is not None and geometry.needs_image_sizes
        is_known = not sizes or (geometry is not None and (not needs_sizes or None not in sizes))
        judged = judge(sample, tokens, sizes, self.limits) if self.limits and is_known else None
        num_image_tokens = judged.num_image_tokens if judged else 0
        return {
            "source": source,
            "index": sample.index,
            "id": sample.id,
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "num_images": tokens.num_images,
            "num_image_tokens": num_image_tokens if is_known else None,
            "num_kept": judged.cut if judged else len(tokens.input_ids),
            "images": list(sample.images),
            "error": None,
        }

    def _sizes(self, sample: Sample, place: ImagePlace) -> list[SizeWH | None]:
        """Check the images, and measure them where their sizes matter."""
        geometry = self.limits.geometry if self.limits else None
        sizes: list[SizeWH | None] = []
        for image in sample.images:
            if place.folder is None and not os.path.isabs(image) and parse_embedded(image) is None:
                sizes.append(None)
                continue
            try:
                content, name = place.content(image), place.locate(image)
                check_image(content, self.check_images, name=name)
                size = None
                if geometry is not None and geometry.needs_image_sizes:
                    size = check_image_header(content, exif_transpose=self.exif_transpose, name=name)
                sizes.append(size)
            except ImageError as error:
                raise BadSampleError(sample.index, sample.id, error.kind, str(error)) from None
        return sizes


@dataclass(frozen=True, slots=True)
class _Look:
    """What is the same for all records of a source."""

    source: str
    place: ImagePlace
    prompt_prefix: str
    ids: tuple[str, ...]


def _unusable(error: BadSampleError, source: str) -> RecordView:
    return {
        "source": source,
        "index": error.index,
        "id": error.sample_id,
        "input_ids": [],
        "labels": [],
        "num_images": 0,
        "num_image_tokens": 0,
        "num_kept": 0,
        "images": [],
        "error": f"{error.kind}: {error.reason}",
    }


def render_colored(view: RecordView, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """Write one record for a person to read: its numbers, and the prompt with the supervised text marked.

    Args:
        view: From an `Inspector`.
        tokenizer: The one that made its ids.
        color: Whether supervised text is green and what is cut off struck through, else they stand in `[[ ]]` and
            `{- -}`. See `terminal.has_color`.

    Returns:
        Text without a final newline. Control characters in the data are shown as escapes.
    """
    if view["error"] is not None:
        return f"{title_of(view)} cannot be used: {visible(view['error'])}"
    marks = {"target": (_GREEN, _PLAIN), "cut": (_CUT, _PLAIN)} if color else {"target": _MARKS, "cut": _CUT_MARKS}
    text = ""
    for part in decode_parts(view, tokenizer):
        before, after = marks["cut"] if part.is_cut else marks["target"] if part.is_target else ("", "")
        text += f"{before}{visible(part.text)}{after}"
    return f"{title_of(view)}: {describe_view(view)}\n{text}"


def title_of(view: RecordView) -> str:
    """Name a record by its position and, where it has one, its id."""
    return f"Record {view['index']}" + (f" (id {visible(view['id'])!r})" if view["id"] else "")


def describe_view(view: RecordView) -> str:
    """Give the numbers of a record in a line."""
    num_text_tokens = len(view["input_ids"]) - view["num_images"]
    numbers = f"{num_text_tokens} text tokens ({_num_supervised(view)} supervised), {view['num_images']} images"
    if view["num_images"] and view["num_image_tokens"] is not None:
        numbers += f" ({view['num_image_tokens']} tokens)"
    num_cut = len(view["input_ids"]) - view["num_kept"]
    if num_cut:
        num_images = view["input_ids"][view["num_kept"] :].count(IMAGE_TOKEN_INDEX)
        numbers += f"; model_max_length cuts off {num_cut - num_images} text tokens and {num_images} images"
    return numbers


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a record's text.

    Attributes:
        text: The text; `<image>` for an image.
        is_target: Whether it is supervised.
        is_cut: Whether truncation cuts it off.
        num_images: How many images it stands for.
    """

    text: str
    is_target: bool
    is_cut: bool
    num_images: int = 0


def decode_parts(view: RecordView, tokenizer: PreTrainedTokenizerBase) -> Iterator[Part]:
    """Give the text of a usable record stretch by stretch.

    A tokenizer may drop a blank where a text begins, so each stretch is what it adds to the text before it.
    """
    kinds = (
        (token == IMAGE_TOKEN_INDEX, label != IGNORE_INDEX, position >= view["num_kept"])
        for position, (token, label) in enumerate(zip(view["input_ids"], view["labels"], strict=True))
    )
    so_far: list[int] = []
    shown = ""
    for (is_image, is_target, is_cut), group in groupby(
        zip(kinds, view["input_ids"], strict=True), key=lambda pair: pair[0]
    ):
        ids = [token for _, token in group]
        if is_image:
            yield Part(IMAGE_TOKEN * len(ids), False, is_cut, len(ids))
            so_far, shown = [], ""
            continue
        so_far += ids
        text = tokenizer.decode(so_far, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # pyright: ignore[reportUnknownMemberType]
        assert isinstance(text, str)
        yield Part(text[len(shown) :], is_target, is_cut)
        shown = text


def _num_supervised(view: Mapping[str, Any] | RecordView) -> int:
    return sum(label != IGNORE_INDEX for label in view["labels"])
