"""What is found out about records: in a first pass which images they name, in a second what a run makes of them.

Both passes read a range of a source on their own, so that any process can take any range. The second knows what
decoding the images has shown. It goes the way of a run - parse, tokenise, look at the images, cut - and so finds the
same records unusable, for the same reasons.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.doctor.pictures import ImageProblem, content_key
from llava_ft.data.doctor.workers import context
from llava_ft.data.image_files import ImageCheck, ImagePlace
from llava_ft.data.inspection.judge import judge
from llava_ft.data.preparation.samples import Limits
from llava_ft.data.records import Sample, parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.mixture import with_prompt_prefix
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.errors import BadSampleError
from llava_ft.geometry import SizeWH

RECORDS_PER_TASK: Final = 256
TINY_SIDE: Final = 16
"""Pixels of the shorter side below which an image is remarked upon."""
LONG_RATIO: Final = 20
"""How many times longer than wide an image is when it is remarked upon."""

COLUMNS: Final = (
    "index", "tokens", "kept_tokens", "supervised", "kept_supervised", "answers", "kept_answers", "images",
    "kept_images",
)  # fmt: skip
"""What is measured of each usable record. Tokens are counted with those of images; `kept_` is after truncation."""


@dataclass(frozen=True)
class Plan:
    """What a run is going to do with its records.

    Attributes:
        tokenize: Makes their tokens.
        limits: How long they may be.
        image_folder: Folder of the run's images.
        check_images: The check of images that the run makes before training.
        exif_transpose: Whether pictures are turned as their EXIF orientation says.
    """

    tokenize: SampleTokenizer
    limits: Limits
    image_folder: str | None
    check_images: ImageCheck = "header"
    exif_transpose: bool = False

    def place_of(self, source: RecordSource) -> ImagePlace:
        """Say where the images of a source are."""
        folder = source.image_folder if source.image_folder is not None else self.image_folder
        return ImagePlace(folder, source)


@dataclass(frozen=True)
class RecordTask:
    """A range of records.

    Attributes:
        source: Where they are.
        start: The first.
        stop: The one after the last.
        prompt_prefix: Text that the run puts before the first question.
    """

    source: RecordSource
    start: int
    stop: int
    prompt_prefix: str = ""


@dataclass
class Scan:
    """What a first pass over some records gives.

    Attributes:
        text_keys: For each record 8 bytes of hash of all its text, as a number; 0 if it cannot be parsed.
        id_keys: The same of its id; 0 without one.
        num_images: Images of each record.
        images: The images of all records in a row, as the records name them.
    """

    text_keys: list[int] = field(default_factory=list[int])
    id_keys: list[int] = field(default_factory=list[int])
    num_images: list[int] = field(default_factory=list[int])
    images: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class MeasureTask:
    """A range of records, with what is known of their images.

    Attributes:
        records: The range.
        images: The sizes of the images of all its records in a row; what is wrong with one, instead of its size.
    """

    records: RecordTask
    images: tuple[SizeWH | ImageProblem, ...]


@dataclass(frozen=True, slots=True)
class Remark:
    """Something worth saying of a record.

    Attributes:
        kind: Short, stable name; see `findings`.
        index: Number of the record in its source.
        sample_id: Its id, "" without one.
        reason: What it is, "" where the kind says it all.
        is_found_by_run: Of an error: whether a run finds it before training.
    """

    kind: str
    index: int
    sample_id: str
    reason: str = ""
    is_found_by_run: bool = True


@dataclass
class Measures:
    """What a second pass over some records gives.

    Attributes:
        columns: The columns of `COLUMNS`, one entry for each usable record.
        errors: The records that a run cannot use.
        dropped: The records that `truncation drop` leaves out.
        remarks: What else is worth saying of the usable ones.
    """

    columns: dict[str, "array[int]"] = field(default_factory=lambda: {name: array("q") for name in COLUMNS})
    errors: list[Remark] = field(default_factory=list[Remark])
    dropped: list[Remark] = field(default_factory=list[Remark])
    remarks: list[Remark] = field(default_factory=list[Remark])


def scan_records(task: RecordTask) -> Scan:
    """Find the images of records, and keys that tell equal records."""
    scan = Scan()
    for index, record in enumerate(task.source.read(task.start, task.stop), start=task.start):
        try:
            sample = parse_record(record, index)
        except BadSampleError as error:
            sample = Sample(index, error.sample_id, (), ())
        scan.text_keys.append(_key(repr((sample.system, sample.turns))) if sample.turns else 0)
        scan.id_keys.append(_key(sample.id) if sample.id else 0)
        scan.num_images.append(len(sample.images))
        scan.images += sample.images
    return scan


def measure_records(task: MeasureTask) -> Measures:
    """Find out what a run would make of each record."""
    plan: Plan = context()
    measures = Measures()
    images = iter(task.images)
    records = task.records
    for index, record in enumerate(records.source.read(records.start, records.stop), start=records.start):
        try:
            sample = with_prompt_prefix(parse_record(record, index), records.prompt_prefix)
        except BadSampleError as error:
            measures.errors.append(_as_remark(error))
            continue
        _measure(sample, [next(images) for _ in sample.images], plan, measures)
    return measures


def _measure(sample: Sample, images: list[SizeWH | ImageProblem], plan: Plan, measures: Measures) -> None:
    try:
        tokens = plan.tokenize(sample)
        problem = next((image for image in images if isinstance(image, ImageProblem)), None)
        if problem is not None:
            remark = Remark(problem.kind, sample.index, sample.id, problem.reason, problem.is_found_by_run)
            measures.errors.append(remark)
            return
        sizes = [image for image in images if not isinstance(image, ImageProblem)]
        judged = judge(sample, tokens, sizes, plan.limits)
    except BadSampleError as error:
        is_dropped = error.kind == "too-long" and plan.limits.truncation == "drop"
        (measures.dropped if is_dropped else measures.errors).append(_as_remark(error))
        return
    row = (
        sample.index, judged.num_tokens, judged.kept_tokens, judged.num_supervised, judged.kept_supervised,
        len(tokens.answer_ends), judged.kept_answers, len(sizes), judged.kept_images,
    )  # fmt: skip
    for name, value in zip(COLUMNS, row, strict=True):
        measures.columns[name].append(value)
    measures.remarks += _remarks(sample, sizes, plan.tokenize.template.stop)


def _remarks(sample: Sample, sizes: list[SizeWH], stop: str) -> Iterator[Remark]:
    """Remark on what is certain and cheap to find; each kind once for a record."""
    kinds: dict[str, str] = {}
    question = ""
    for turn in sample.turns:
        text = turn.text.replace(IMAGE_TOKEN, "").strip()
        if turn.role == "human":
            question = text
            continue
        if not text:
            kinds.setdefault("empty-answer", "")
        elif text == question:
            kinds.setdefault("answer-repeats-question", "")
        if stop.strip() and stop in turn.text:
            kinds.setdefault("stop-marker-in-answer", f"an answer holds {stop!r}.")
    for image, (width, height) in zip(sample.images, sizes, strict=True):
        reason = f"{image} is {width} x {height} pixels."
        if min(width, height) < TINY_SIDE:
            kinds.setdefault("tiny-image", reason)
        elif max(width, height) > LONG_RATIO * min(width, height):
            kinds.setdefault("long-image", reason)
    for kind, reason in kinds.items():
        yield Remark(kind, sample.index, sample.id, reason)


def _as_remark(error: BadSampleError) -> Remark:
    return Remark(error.kind, error.index, error.sample_id, error.reason)


def _key(text: str) -> int:
    return content_key(text.encode("utf-8", "surrogatepass"))
