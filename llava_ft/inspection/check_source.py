"""The check of one source: what a run makes of its records, and what else is wrong with them or their images.

It is the run's own preparation - records tokenised, images looked at, everything measured - with two additions: each
image is decoded whole, once, however many records name it, and records are read once more for what is odd about them.
What is kept in this process are numbers for each record and image, the paths of images, and a few examples of each
kind of finding.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.image_files import ImagePlace, load_image, refuse_unreadable_images
from llava_ft.data.preparation.image_facts import ImageChecks, ImageFacts, look_at_image
from llava_ft.data.preparation.prepare import RECORDS_FOR_PROCESSES, prepare_rows
from llava_ft.data.preparation.processes import Progress, run_alone, run_tasks
from llava_ft.data.preparation.samples import DataPlan, find_samples
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows
from llava_ft.data.preparation.truncation import too_long_reason
from llava_ft.data.records import Sample, parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.errors import BadSampleError, ImageError
from llava_ft.geometry import SizeWH

RECORDS_PER_TASK: Final = 256
IMAGES_PER_TASK: Final = 32
NUM_EXAMPLES: Final = 20  # records of each kind that are named

TINY_SIDE: Final = 16  # pixels of the shorter side below which an image is remarked upon
LONG_RATIO: Final = 20  # times longer than wide that an image is when it is remarked upon

Result = TypeVar("Result")
Remark = tuple[str, int, str]  # kind, position of the record, and what is said of it


@dataclass(frozen=True)
class Example:
    """A record that is named; the keys are those of the JSON report."""

    record: int  # its position in its source; -1 for none
    id: str  # "" without one
    reason: str = ""


@dataclass
class Tally:
    """The records of one kind."""

    indices: list[int] = field(default_factory=list[int])
    examples: list[Example] = field(default_factory=list[Example])  # the first `NUM_EXAMPLES`
    num_late: int = 0  # those that a run would not notice before training

    def add(self, index: int, id_of: Callable[[int], str], reason: str) -> None:
        """Add a record; `id_of` gives its id, and is called for the first ones only."""
        self.indices.append(index)
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(Example(index, id_of(index), reason))


class DecodedImage(NamedTuple):
    """What decoding an image shows: its size as the run sees it, its file's hash and size; or an error."""

    size_wh: SizeWH = (0, 0)
    content_key: int = 0
    num_bytes: int = 0
    error: ImageError | None = None
    is_late: bool = False  # whether the check that a run makes before training would not find the error


@dataclass(frozen=True)
class ImageTable:
    """The distinct images of a source."""

    names: list[str]  # as the records name them
    decoded: list[DecodedImage]
    numbers: Sequence[int]  # the images of all records in a row, by position in `names`
    ends: Sequence[int]  # where those of each record start and end in `numbers`; one more than there are records

    def of_record(self, index: int) -> Sequence[int]:
        """Give the positions in `names` of the images of a record."""
        return self.numbers[self.ends[index] : self.ends[index + 1]]

    def facts(self, rows: TokenizedRows) -> ImageFacts:
        """Give what is known about the images of tokenised records, as a run would find it if it decoded all."""
        numbers, names = rows.numbered_images()
        known = dict(zip(self.names, self.decoded, strict=True))
        decoded = [known[name] for name in names]
        sizes = np.array([image.size_wh for image in decoded], dtype=np.int64).reshape(-1, 2)
        return ImageFacts(numbers, sizes, {n: image.error for n, image in enumerate(decoded) if image.error})


@dataclass(frozen=True)
class SourceCheck:
    """What was found in one source."""

    source: RecordSource
    rows: TokenizedRows
    columns: dict[str, Array]  # `index`, `tokens`, `supervised`, `answers`, `images` of usable records; `kept_` of each
    errors: dict[str, Tally]  # the records that a run cannot use, by kind
    dropped: Tally  # those that `truncation drop` leaves out
    remarks: dict[str, Tally]  # what else is worth saying, by kind
    images: ImageTable

    def unusable(self) -> dict[int, str]:
        """Give the kind of each unusable record."""
        return {index: kind for kind, tally in self.errors.items() for index in tally.indices}


def check_source(source: RecordSource, plan: DataPlan, *, prompt_prefix: str = "") -> SourceCheck:
    """Check all records and images of a source; `prompt_prefix` stands before the first question of each record.

    Raises:
        UserError: Records have images, and the run could not read any.
    """
    texts, ids, odd_texts = array("Q"), array("Q"), list[Remark]()
    known, numbers, ends = dict[str, int](), array("q"), array("q", [0])
    with Progress(f"Reading {source.name}", len(source), "records") as shown:
        for records in read_in_parts(partial(scan_records, source, plan.tokenize.template.stop), source, plan):
            for text, sample_id, images, remarks in records:
                texts.append(text)
                ids.append(sample_id)
                numbers.extend(known.setdefault(image, len(known)) for image in images)
                ends.append(len(numbers))
                odd_texts += remarks
            shown.advance(len(records))

    names, place = list(known), plan.place_of(source)
    refuse_unreadable_images(source.name, names, place, has_tower=plan.limits.geometry is not None)
    images = ImageTable(names, list(_decode(names, place, plan, source.name)), numbers, ends)
    rows = prepare_rows(source, plan.tokenize, plan.preparation, prompt_prefix=prompt_prefix)
    samples = find_samples(rows, plan.limits, images.facts(rows))

    errors: dict[str, Tally] = {}
    for error in samples.errors:
        tally = errors.setdefault(error.kind, Tally())
        tally.add(error.index, rows.sample_id, error.reason)
        bad = next((image for n in images.of_record(error.index) if (image := images.decoded[n]).error), None)
        tally.num_late += bad is not None and bad.is_late and str(bad.error) == error.reason
    too_long = Tally()
    for index in samples.too_long.tolist() if plan.limits.truncation != "truncate" else ():
        too_long.add(index, rows.sample_id, too_long_reason(int(samples.full_lengths[index]), plan.limits))
    if plan.limits.truncation == "error" and too_long.indices:
        errors["too-long"], too_long = too_long, Tally()
        errors = dict(sorted(errors.items(), key=lambda item: item[1].indices[0]))

    usable, answers = samples.record_indices, rows.counts("answer_ends")[samples.record_indices]
    kept_answers = answers.copy()
    for row in np.flatnonzero(samples.was_truncated).tolist():
        kept_answers[row] = np.count_nonzero(rows.numbers("answer_ends", int(usable[row])) <= samples.cuts[row])
    columns = {
        "index": usable,
        "tokens": samples.full_lengths[usable],
        "kept_tokens": samples.lengths.astype(np.int64),
        "supervised": samples.full_supervised[usable],
        "kept_supervised": samples.num_supervised.astype(np.int64),
        "answers": answers,
        "kept_answers": kept_answers,
        "images": rows.counts("image_positions")[usable],
        "kept_images": samples.num_images.astype(np.int64),
    }

    found: dict[str, Tally] = {}
    for kind, index, reason in _remarks(usable.tolist(), texts, ids, odd_texts, images):
        found.setdefault(kind, Tally()).add(index, rows.sample_id, reason)
    return SourceCheck(source, rows, columns, errors, too_long, found, images)


def read_in_parts(work: Callable[[tuple[int, int]], Result], source: RecordSource, plan: DataPlan) -> Iterator[Result]:
    """Do `work` on ranges of records - the first, and the one after the last - in order; in processes if it pays."""
    starts = range(0, len(source), RECORDS_PER_TASK)
    parts = ((start, min(start + RECORDS_PER_TASK, len(source))) for start in starts)
    return run_tasks(work, parts, plan.preparation.processes if len(source) >= RECORDS_FOR_PROCESSES else 1)


def scan_records(
    source: RecordSource, stop: str, part: tuple[int, int]
) -> list[tuple[int, int, tuple[str, ...], list[Remark]]]:
    """Read a range of records, without a tokenizer; `stop` is the marker that ends answers.

    For each it gives a hash of all text and one of the id, 0 where there is none; the images; and remarks on the text.
    """
    stop_reason = f"an answer holds {stop!r}."  # one object, which is cheap to send to another process many times
    found: list[tuple[int, int, tuple[str, ...], list[Remark]]] = []
    for index, record in enumerate(source.read(*part), start=part[0]):
        try:
            sample = parse_record(record, index)
        except BadSampleError as error:
            sample = Sample(index, error.sample_id, (), ())
        remarks: set[Remark] = set()
        question = ""
        for turn in sample.turns:
            text = turn.text.replace(IMAGE_TOKEN, "").strip()
            if turn.role == "human":
                question = text
                continue
            if not text:
                remarks.add(("empty-answer", index, ""))
            elif text == question:
                remarks.add(("answer-repeats-question", index, ""))
            if stop.strip() and stop in turn.text:
                remarks.add(("stop-marker-in-answer", index, stop_reason))
        text_key = _hash(repr((sample.system, sample.turns)).encode("utf-8", "surrogatepass")) if sample.turns else 0
        id_key = _hash(sample.id.encode("utf-8", "surrogatepass")) if sample.id else 0
        found.append((text_key, id_key, tuple(sample.images), list(remarks)))
    return found


def decode_images(place: ImagePlace, checks: ImageChecks, images: Iterable[str]) -> list[DecodedImage]:
    """Decode images whole; whatever is wrong with one, beyond what `checks` find before a run, is noted."""
    # One decoding is enough, also for a run that decodes everything before it trains.
    before = ImageChecks("header", checks.needs_sizes, checks.exif_transpose) if checks.level == "decode" else checks
    decoded: list[DecodedImage] = []
    for image in images:
        is_late = False
        try:
            look_at_image(image, place, before)
            is_late = checks.level != "decode"
            found = place.content(image)
            picture = load_image(found, exif_transpose=checks.exif_transpose, name=place.locate(image))
            content = found if isinstance(found, bytes) else Path(found).read_bytes()
            decoded.append(DecodedImage(picture.size, _hash(content), len(content)))
            continue
        except ImageError as caught:
            error = caught
        except MemoryError:
            error = ImageError(image, "image-too-large", "does not fit into memory")
        except OSError as caught:
            error = ImageError(image, "image-unreadable", f"cannot be read: {caught.strerror}")
        decoded.append(DecodedImage(error=error, is_late=is_late))
    return decoded


def _decode(names: list[str], place: ImagePlace, plan: DataPlan, source_name: str) -> Iterator[DecodedImage]:
    """Decode images in processes; one that ends its process is found and named."""
    work = partial(decode_images, place, plan.checks)

    def crashed(images: tuple[str, ...]) -> list[DecodedImage]:
        reason = "ends the process that decodes it: the decoder fails, or memory runs out"
        return [DecodedImage(error=ImageError(image, "image-crash", reason), is_late=True) for image in images]

    def one_by_one(images: tuple[str, ...]) -> list[DecodedImage]:
        return [decoded for image in images for decoded in run_alone(work, (image,), crashed)]

    remaining = iter(names)
    groups = iter(lambda: tuple(islice(remaining, IMAGES_PER_TASK)), ())
    with Progress(f"Decoding the images of {source_name}", len(names), "images") as shown:
        for decoded in run_tasks(work, groups, plan.preparation.processes if names else 1, one_by_one):
            yield from decoded
            shown.advance(len(decoded))


def _remarks(
    usable: list[int], texts: Sequence[int], ids: Sequence[int], odd_texts: list[Remark], images: ImageTable
) -> Iterator[Remark]:
    """Remark on records; on those that cannot be used only if an earlier one has the same id."""
    is_usable = set(usable)
    yield from (remark for remark in odd_texts if remark[1] in is_usable)
    first_with: dict[tuple[int, ...], int] = {}
    for index in usable:
        of_record = images.of_record(index)
        odd: dict[str, int] = {}  # the first image of each kind
        for number in of_record:
            shorter, longer = sorted(images.decoded[number].size_wh)
            if shorter < TINY_SIDE:
                odd.setdefault("tiny-image", number)
            elif longer > LONG_RATIO * shorter:
                odd.setdefault("long-image", number)
        for kind, number in odd.items():
            width, height = images.decoded[number].size_wh
            yield kind, index, f"{images.names[number]} is {width} x {height} pixels."
        first = first_with.setdefault((texts[index], *(images.decoded[n].content_key for n in of_record)), index)
        if first != index:
            yield "duplicate-record", index, f"record {first} says the same of the same images."
    first_named: dict[int, int] = {}
    for index, sample_id in enumerate(ids):
        if sample_id and (first := first_named.setdefault(sample_id, index)) != index:
            yield "repeated-id", index, f"record {first} has the same id."


def _hash(content: bytes) -> int:
    """Give 8 bytes of hash as a number, never 0."""
    return int.from_bytes(blake2b(content, digest_size=8).digest()) or 1
