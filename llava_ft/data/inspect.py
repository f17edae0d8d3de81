"""What the model will see of each record, for `llava-ft inspect data`.

It takes a tokenizer, a template and the records: no weights and, unless asked for, no images.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final, TextIO, TypedDict

from transformers import PreTrainedTokenizerBase

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.data.image_files import ImageCheck, check_image, resolve_image_path
from llava_ft.data.images import ImageError
from llava_ft.data.prepared import expand_checked
from llava_ft.data.schema import Sample, load_records, parse_record
from llava_ft.data.tokenize import TokenizedSample
from llava_ft.errors import BadSampleError

_GREEN: Final = "\x1b[32m"
_PLAIN: Final = "\x1b[0m"
_MARKS: Final = ("[[", "]]")
"""What stands around supervised text where there is no colour."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that could steer a terminal; tab and newline are not among them."""


class RecordView(TypedDict):
    """One record as the model will see it.

    Attributes:
        index: Position of the record in its file, counted from 0.
        id: The record's own id, "" when it has none.
        input_ids: Before expansion and truncation: one `IMAGE_TOKEN_INDEX` per image. Empty if unusable.
        labels: As long as `input_ids`; `IGNORE_INDEX` where nothing is supervised.
        num_images: Images of the record; 0 if unusable.
        num_image_tokens: Positions that all images together take. None if there are images and no vision
            tower is known.
        error: Why the record cannot be used, else None.
    """

    index: int
    id: str
    input_ids: list[int]
    labels: list[int]
    num_images: int
    num_image_tokens: int | None
    error: str | None


@dataclass
class InspectionSummary:
    """What was seen so far; `inspect_records` adds to it.

    Attributes:
        num_records: Records seen.
        num_usable: Records that a run could train on.
        counts: The others, by kind.
        num_tokens: Tokens of the usable records before truncation, with those of images where known.
        num_supervised: How many of these are supervised.
        num_images: Images of the usable records.
    """

    num_records: int = 0
    num_usable: int = 0
    counts: Counter[str] = field(default_factory=Counter[str])
    num_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0

    def add_usable(self, view: RecordView) -> None:
        """Count a usable record."""
        self.num_records += 1
        self.num_usable += 1
        self.num_tokens += len(view["input_ids"]) - view["num_images"] + (view["num_image_tokens"] or 0)
        self.num_supervised += _num_supervised(view)
        self.num_images += view["num_images"]

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
        lines += [f"{count} unusable: {kind}" for kind, count in self.counts.most_common()]
        return "\n".join(lines)


def inspect_records(
    data_path: str | os.PathLike[str],
    tokenize: Callable[[Sample], TokenizedSample],
    *,
    num_image_tokens: int | None = None,
    model_max_length: int | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    check_images: ImageCheck = "none",
    summary: InspectionSummary | None = None,
) -> Iterator[RecordView]:
    """Show every record of a file as the model will see it, in order.

    Args:
        data_path: Records, `.json` or `.jsonl`.
        tokenize: Usually a `SampleTokenizer`.
        num_image_tokens: Positions that one image takes; None when no vision tower is known.
        model_max_length: Tokens after which a sample is cut off: a record of which no answer is left is
            unusable. None checks nothing; neither does a record with images when their tokens are not known.
        image_folder: Folder that relative paths of images start from. Without one they are not checked.
        check_images: How much of each image file is read: "none", "exists", "header" or "decode".
        summary: Counts what is seen.

    Raises:
        UserError: The file itself cannot be read.
    """
    summary = summary if summary is not None else InspectionSummary()
    records = load_records(Path(data_path))
    for index in range(len(records)):
        record, records[index] = records[index], None
        try:
            sample = parse_record(record, index)
            _check_sample_images(sample, image_folder, check_images)
            tokens = tokenize(sample)
            if model_max_length is not None and (num_image_tokens is not None or not sample.images):
                expand_checked(sample, tokens, num_image_tokens or 0, model_max_length)
        except BadSampleError as error:
            summary.add_unusable(error)
            yield _unusable(error)
            continue
        view = _usable(sample, tokens, num_image_tokens)
        summary.add_usable(view)
        yield view


def _usable(sample: Sample, tokens: TokenizedSample, num_image_tokens: int | None) -> RecordView:
    is_unknown = num_image_tokens is None and tokens.num_images > 0
    return {
        "index": sample.index,
        "id": sample.id,
        "input_ids": tokens.input_ids,
        "labels": tokens.labels,
        "num_images": tokens.num_images,
        "num_image_tokens": None if is_unknown else (num_image_tokens or 0) * tokens.num_images,
        "error": None,
    }


def _unusable(error: BadSampleError) -> RecordView:
    return {
        "index": error.index,
        "id": error.sample_id,
        "input_ids": [],
        "labels": [],
        "num_images": 0,
        "num_image_tokens": 0,
        "error": f"{error.kind}: {error.reason}",
    }


def _check_sample_images(sample: Sample, image_folder: str | os.PathLike[str] | None, check_images: ImageCheck) -> None:
    for image in sample.images:
        if image_folder is None and not os.path.isabs(image):
            continue
        try:
            check_image(resolve_image_path(image, image_folder), check_images)
        except ImageError as error:
            raise BadSampleError(sample.index, sample.id, error.kind, str(error)) from None


def has_color(stream: TextIO) -> bool:
    """Whether text for `stream` may be coloured: it is a terminal, and NO_COLOR and TERM do not forbid it."""
    is_forbidden = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not is_forbidden


def render_colored(view: RecordView, tokenizer: PreTrainedTokenizerBase, *, color: bool) -> str:
    """Write one record for a person to read: its numbers, and the prompt with the supervised text marked.

    Args:
        view: From `inspect_records`.
        tokenizer: The one that made its ids.
        color: Whether supervised text is green, else it stands in `[[ ]]`. See `has_color`.

    Returns:
        Text without a final newline. Control characters in the data are shown as escapes.
    """
    name = f"Record {view['index']}" + (f" (id {_visible(view['id'])!r})" if view["id"] else "")
    if view["error"] is not None:
        return f"{name} cannot be used: {_visible(view['error'])}"
    before, after = (_GREEN, _PLAIN) if color else _MARKS
    text = "".join(
        f"{before}{_visible(part)}{after}" if is_target else _visible(part)
        for part, is_target in _decode(view["input_ids"], view["labels"], tokenizer)
    )
    num_text_tokens = len(view["input_ids"]) - view["num_images"]
    numbers = f"{num_text_tokens} text tokens ({_num_supervised(view)} supervised), {view['num_images']} images"
    if view["num_images"] and view["num_image_tokens"] is not None:
        numbers += f" ({view['num_image_tokens']} tokens)"
    return f"{name}: {numbers}\n{text}"


def _decode(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """Give the text of each stretch of tokens, and whether it is supervised.

    A tokenizer may drop a blank where a text begins, so each stretch is what it adds to the text before it.
    """
    pairs = zip(input_ids, (label != IGNORE_INDEX for label in labels), strict=True)
    so_far: list[int] = []
    shown = ""
    for (is_image, is_target), group in groupby(pairs, key=lambda pair: (pair[0] == IMAGE_TOKEN_INDEX, pair[1])):
        ids = [token for token, _ in group]
        if is_image:
            yield IMAGE_TOKEN * len(ids), False
            so_far, shown = [], ""
            continue
        so_far += ids
        text = tokenizer.decode(so_far, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # pyright: ignore[reportUnknownMemberType]
        assert isinstance(text, str)
        yield text[len(shown) :], is_target
        shown = text


def _visible(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _num_supervised(view: Mapping[str, Any] | RecordView) -> int:
    return sum(label != IGNORE_INDEX for label in view["labels"])
