"""The check of one source: what a run makes of its records, and what else is wrong with them or their images.

It is the run's own preparation - records tokenised, images looked at, everything measured - with two additions: each
image is decoded whole, once, however many records name it, and records are read once more for what is odd about them.
What is kept in this process are numbers for each record and image, the paths of images, and a few examples of each
kind of finding.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.image_files import ImagePlace, load_image, refuse_unreadable_images
from llava_ft.data.preparation.image_facts import ImageChecks, ImageFacts, look_at_image
from llava_ft.data.preparation.prepare import RECORDS_FOR_PROCESSES, prepare_rows
from llava_ft.data.preparation.processes import run_alone, run_tasks
from llava_ft.data.preparation.progress import Progress
from llava_ft.data.preparation.samples import find_samples
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows
from llava_ft.data.preparation.truncation import too_long_reason
from llava_ft.data.records import Sample, parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.errors import BadSampleError, ImageError
from llava_ft.geometry import SizeWH
from llava_ft.inspection.data_plan import DataPlan

RECORDS_PER_TASK: Final = 256
IMAGES_PER_TASK: Final = 32
NUM_EXAMPLES: Final = 20
"""Records of each kind that are named."""

TINY_SIDE: Final = 16
"""Pixels of the shorter side below which an image is remarked upon."""
LONG_RATIO: Final = 20
"""How many times longer than wide an image is when it is remarked upon."""


class Example(NamedTuple):
    """A record that is named: its position in its source, its id ("" without one), and what is wrong with it."""

    index: int
    sample_id: str
    reason: str = ""


@dataclass
class Tally:
    """The records of one kind: all their positions, ascending, and the first ones with what is said of them.

    `num_late` counts those that a run would not notice before training.
    """

    indices: "array[int]" = field(default_factory=lambda: array("q"))
    examples: list[Example] = field(default_factory=list[Example])
    num_late: int = 0

    def add(self, index: int, id_of: Callable[[int], str], reason: str) -> None:
        """Add a record; `id_of` gives its id, and is called for the first ones only."""
        self.indices.append(index)
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(Example(index, id_of(index), reason))


class DecodedImage(NamedTuple):
    """What decoding an image shows: its size as the run sees it and the hash and size of its file, or an error."""

    size_wh: SizeWH = (0, 0)
    content_key: int = 0
    num_bytes: int = 0
    error: ImageError | None = None
    is_late: bool = False
    """Whether the check that a run makes before training would not find the error."""


@dataclass(frozen=True)
class ImageTable:
    """The distinct images of a source.

    Attributes:
        names: As the records name them.
        decoded: What decoding each has shown.
        numbers: `(M,)`, the images of all records in a row, by position in `names`.
        ends: `(N + 1,)`, where the images of each record start and end in `numbers`.
    """

    names: list[str]
    decoded: list[DecodedImage]
    numbers: Array
    ends: Array

    def of_record(self, index: int) -> list[int]:
        """Give the positions in `names` of the images of a record."""
        return self.numbers[self.ends[index] : self.ends[index + 1]].tolist()

    def facts(self, rows: TokenizedRows) -> ImageFacts:
        """Give what is known about the images of tokenised records, as a run would find it if it decoded all."""
        numbers, names = rows.numbered_images()
        known = {name: number for number, name in enumerate(self.names)}
        decoded = [self.decoded[known[name]] for name in names]
        sizes = np.array([image.size_wh for image in decoded], dtype=np.int64).reshape(-1, 2)
        return ImageFacts(numbers, sizes, {n: image.error for n, image in enumerate(decoded) if image.error})


@dataclass(frozen=True)
class SourceCheck:
    """What was found in one source.

    Attributes:
        source: The source.
        rows: Its tokenised records.
        columns: What is measured of each usable record: its `index`; `tokens` with those of images, those `supervised`,
            `answers` and `images`; and `kept_` of each, what truncation leaves.
        errors: The records that a run cannot use, by kind.
        dropped: The records that `truncation drop` leaves out.
        remarks: What else is worth saying, by kind.
        images: Its images.
    """

    source: RecordSource
    rows: TokenizedRows
    columns: dict[str, Array]
    errors: dict[str, Tally]
    dropped: Tally
    remarks: dict[str, Tally]
    images: ImageTable

    def unusable(self) -> dict[int, str]:
        """Give the kind of each unusable record."""
        return {index: kind for kind, tally in self.errors.items() for index in tally.indices}


def check_source(source: RecordSource, plan: DataPlan, *, prompt_prefix: str = "") -> SourceCheck:
    """Check all records and images of a source; `prompt_prefix` stands before the first question of each record.

    Raises:
        UserError: Records have images, and the run could not read any.
        RunError: A process was killed while it read records.
    """
    scan, images = _scan(source, plan)
    place = plan.place_of(source)
    refuse_unreadable_images(source.name, images.names, place, has_tower=plan.limits.geometry is not None)
    images.decoded.extend(_decode(images.names, place, plan, source.name))
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
    for place_of_sample in np.flatnonzero(samples.was_truncated).tolist():
        ends = rows.numbers("answer_ends", int(usable[place_of_sample]))
        kept_answers[place_of_sample] = np.count_nonzero(ends <= samples.cuts[place_of_sample])
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
    remarks: dict[str, Tally] = {}
    for kind, index, reason in chain(
        scan.remarks_on(usable),
        _odd_images(usable, images),
        _duplicates(usable, scan.text_keys, images),
        _repeated_ids(scan.id_keys),
    ):
        remarks.setdefault(kind, Tally()).add(index, rows.sample_id, reason)
    return SourceCheck(source, rows, columns, errors, too_long, remarks, images)


@dataclass
class Scan:
    """What reading records shows, without a tokenizer."""

    # for each record a hash of all its text and of its id (0 if it cannot be parsed or has none), and its images
    text_keys: "array[int]" = field(default_factory=lambda: array("Q"))
    id_keys: "array[int]" = field(default_factory=lambda: array("Q"))
    num_images: "array[int]" = field(default_factory=lambda: array("q"))
    # the images of all records in a row, as the records name them
    images: list[str] = field(default_factory=list[str])
    # records that something is odd about, by kind and reason
    remarks: dict[tuple[str, str], "array[int]"] = field(default_factory=dict[tuple[str, str], "array[int]"])

    def remarks_on(self, usable: Array) -> Iterator[tuple[str, int, str]]:
        """Give kind, record and reason of each remark on a usable record."""
        for (kind, reason), indices in self.remarks.items():
            for index in np.intersect1d(np.asarray(indices), usable).tolist():
                yield kind, index, reason


def ranges_of(source: RecordSource) -> Iterator[tuple[int, int]]:
    """Cut the records of a source into tasks: the first of each, and the one after its last."""
    for start in range(0, len(source), RECORDS_PER_TASK):
        yield start, min(start + RECORDS_PER_TASK, len(source))


def scan_records(source: RecordSource, stop: str, part: tuple[int, int]) -> Scan:
    """Read the records from `part[0]` to before `part[1]`; `stop` is the marker that ends answers."""
    scan = Scan()
    for index, record in enumerate(source.read(*part), start=part[0]):
        try:
            sample = parse_record(record, index)
        except BadSampleError as error:
            sample = Sample(index, error.sample_id, (), ())
        scan.text_keys.append(_key(repr((sample.system, sample.turns))) if sample.turns else 0)
        scan.id_keys.append(_key(sample.id) if sample.id else 0)
        scan.num_images.append(len(sample.images))
        scan.images += sample.images
        remarks: set[tuple[str, str]] = set()
        question = ""
        for turn in sample.turns:
            text = turn.text.replace(IMAGE_TOKEN, "").strip()
            if turn.role == "human":
                question = text
                continue
            if not text:
                remarks.add(("empty-answer", ""))
            elif text == question:
                remarks.add(("answer-repeats-question", ""))
            if stop.strip() and stop in turn.text:
                remarks.add(("stop-marker-in-answer", f"an answer holds {stop!r}."))
        for remark in remarks:
            scan.remarks.setdefault(remark, array("q")).append(index)
    return scan


def _scan(source: RecordSource, plan: DataPlan) -> tuple[Scan, ImageTable]:
    """Read all records; give what they show, their images by number, and the images, not decoded yet."""
    num_processes = plan.preparation.processes if len(source) >= RECORDS_FOR_PROCESSES else 1
    work = partial(scan_records, source, plan.tokenize.template.stop)
    whole, numbers, ends, known = Scan(), array("q"), array("q", [0]), dict[str, int]()
    with Progress(f"Reading {source.name}", len(source), "records") as shown:
        for scan in run_tasks(work, ranges_of(source), num_processes):
            whole.text_keys.extend(scan.text_keys)
            whole.id_keys.extend(scan.id_keys)
            for remark, indices in scan.remarks.items():
                whole.remarks.setdefault(remark, array("q")).extend(indices)
            numbers.extend(known.setdefault(image, len(known)) for image in scan.images)
            for count in scan.num_images:
                ends.append(ends[-1] + count)
            shown.advance(len(scan.text_keys))
    return whole, ImageTable(list(known), [], np.asarray(numbers), np.asarray(ends))


def decode_images(place: ImagePlace, checks: ImageChecks, images: Iterable[str]) -> list[DecodedImage]:
    """Decode images whole; whatever is wrong with one is noted and ends nothing.

    `checks` is what the run finds out before it trains, and `images` are as the records name them.
    """
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


def _odd_images(usable: Array, images: ImageTable) -> Iterator[tuple[str, int, str]]:
    """Remark on very small and very long images, each kind once for a record."""
    shorter, longer = (
        np.array([side(image.size_wh) for image in images.decoded], dtype=np.int64) for side in (min, max)
    )
    is_tiny = (shorter < TINY_SIDE) & (longer > 0)
    for kind, is_odd in [("tiny-image", is_tiny), ("long-image", ~is_tiny & (longer > LONG_RATIO * shorter))]:
        places = np.flatnonzero(is_odd[images.numbers]) if len(images.numbers) else np.zeros(0, dtype=np.int64)
        records, firsts = np.unique(np.searchsorted(images.ends, places, side="right") - 1, return_index=True)
        is_usable = np.isin(records, usable)
        for index, place in zip(records[is_usable].tolist(), places[firsts[is_usable]].tolist(), strict=True):
            number = int(images.numbers[place])
            width, height = images.decoded[number].size_wh
            yield kind, index, f"{images.names[number]} is {width} x {height} pixels."


def _duplicates(usable: Array, text_keys: "array[int]", images: ImageTable) -> Iterator[tuple[str, int, str]]:
    """Remark on usable records whose texts and images are those of an earlier one."""
    keys = np.asarray(text_keys)[usable]
    _, first_of, counts = np.unique(keys, return_inverse=True, return_counts=True)
    first_with: dict[tuple[int, ...], int] = {}
    for index in usable[counts[first_of] > 1].tolist():
        contents = (images.decoded[number].content_key for number in images.of_record(index))
        first = first_with.setdefault((text_keys[index], *contents), index)
        if first != index:
            yield "duplicate-record", index, f"record {first} says the same of the same images."


def _repeated_ids(id_keys: "array[int]") -> Iterator[tuple[str, int, str]]:
    """Remark on records, usable or not, with the id of an earlier one."""
    keys = np.asarray(id_keys)
    with_id = np.flatnonzero(keys)
    _, first_place, first_of = np.unique(keys[with_id], return_index=True, return_inverse=True)
    firsts = with_id[first_place][first_of]
    for index, first in zip(with_id.tolist(), firsts.tolist(), strict=True):
        if first != index:
            yield "repeated-id", index, f"record {first} has the same id."


def _key(text: str) -> int:
    return _hash(text.encode("utf-8", "surrogatepass"))


def _hash(content: bytes) -> int:
    """Give 8 bytes of hash as a number, never 0."""
    return int.from_bytes(blake2b(content, digest_size=8).digest()) or 1
