"""The check of one source: records are scanned, their images decoded, and each record is judged, on all cores.

Every image is decoded once, however many records name it. What is kept in this process are numbers for each record
and image, the paths of images, and a few examples of each kind of finding.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import numpy as np

from llava_ft.data.doctor.pictures import (
    IMAGES_PER_TASK,
    DecodedImage,
    ImageProblem,
    ImageTask,
    examine_images,
    killed_by,
)
from llava_ft.data.doctor.records import (
    COLUMNS,
    RECORDS_PER_TASK,
    Measures,
    MeasureTask,
    Plan,
    RecordTask,
    Remark,
    measure_records,
    scan_records,
)
from llava_ft.data.doctor.workers import Workers
from llava_ft.data.preparation.progress import Progress
from llava_ft.data.records import parse_embedded, parse_record
from llava_ft.data.sources.base import RecordSource
from llava_ft.errors import BadSampleError, RunError, UserError
from llava_ft.geometry import SizeWH

Array = np.ndarray[Any, np.dtype[Any]]
ShowProgress = Callable[[str, int, str], Progress]
"""Called with what is done, how many there are and what they are."""

NUM_EXAMPLES: Final = 20
"""Records of each kind that are named."""

Item = TypeVar("Item")


@dataclass
class Tally:
    """The records of one kind.

    Attributes:
        indices: All of them, ascending.
        examples: What is said of the first ones.
    """

    indices: "array[int]" = field(default_factory=lambda: array("q"))
    examples: list[Remark] = field(default_factory=list[Remark])
    num_late: int = 0

    def add(self, remark: Remark) -> None:
        """Add a record."""
        self.indices.append(remark.index)
        self.num_late += not remark.is_found_by_run
        if len(self.examples) < NUM_EXAMPLES:
            self.examples.append(remark)


@dataclass(frozen=True)
class ImageTable:
    """The distinct images of a source.

    Attributes:
        names: As the records name them.
        decoded: What decoding each has shown.
        numbers: The images of all records in a row, by position in `names`.
        ends: `(N + 1,)`, where the images of each record start and end in `numbers`.
    """

    names: list[str]
    decoded: list[DecodedImage]
    numbers: Array
    ends: Array

    def of_records(self, start: int, stop: int) -> Iterator[SizeWH | ImageProblem]:
        """Give the size of each image of some records, or what is wrong with it."""
        numbers: list[int] = self.numbers[self.ends[start] : self.ends[stop]].tolist()
        for number in numbers:
            image = self.decoded[number]
            yield image.problem or (image.width, image.height)

    def content_keys(self, index: int) -> tuple[int, ...]:
        """Give keys that tell whether two records have the same pictures."""
        return tuple(self.decoded[number].content_key for number in self.of_record(index))

    def of_record(self, index: int) -> list[int]:
        """Give the positions in `names` of the images of a record."""
        return self.numbers[self.ends[index] : self.ends[index + 1]].tolist()


@dataclass(frozen=True)
class SourceCheck:
    """What was found in one source.

    Attributes:
        source: The source.
        num_records: Records in it.
        columns: What is measured of each usable record; see `COLUMNS`.
        errors: The records that a run cannot use, by kind.
        dropped: The records that `truncation drop` leaves out, by kind.
        remarks: What else is worth saying, by kind.
        images: Its images.
    """

    source: RecordSource
    num_records: int
    columns: dict[str, Array]
    errors: dict[str, Tally]
    dropped: dict[str, Tally]
    remarks: dict[str, Tally]
    images: ImageTable

    @property
    def num_unusable(self) -> int:
        """Records that a run cannot use."""
        return sum(len(tally.indices) for tally in self.errors.values())

    def unusable(self) -> dict[int, str]:
        """Give the kind of each unusable record."""
        return {index: kind for kind, tally in self.errors.items() for index in tally.indices}


def check_source(
    source: RecordSource, plan: Plan, workers: Workers, progress: ShowProgress, *, prompt_prefix: str = ""
) -> SourceCheck:
    """Check all records and images of a source.

    Args:
        source: A prepared source.
        plan: What a run would do.
        workers: Processes that were given `plan`.
        progress: Shows how far the check is.
        prompt_prefix: Text that the run puts before the first question of each record.

    Raises:
        UserError: Records have images, and the run could not read any.
        RunError: A worker was killed while it read records.
    """
    tasks = [
        RecordTask(source, start, min(start + RECORDS_PER_TASK, len(source)), prompt_prefix)
        for start in range(0, len(source), RECORDS_PER_TASK)
    ]
    text_keys, id_keys, images = _scan(source, tasks, workers, progress)
    _check_images_can_be_read(source, plan, images)
    _examine(images, plan, source, workers, progress)
    found = _Found()
    measuring = (MeasureTask(task, tuple(images.of_records(task.start, task.stop))) for task in tasks)
    with progress(f"Judging {source.name}", len(source), "records") as shown:
        for task, measures in zip(tasks, workers.map(measure_records, measuring, _killed), strict=True):
            found.add(measures)
            shown.advance(task.stop - task.start)
    columns = {name: np.asarray(found.columns[name], dtype=np.int64) for name in COLUMNS}
    _find_duplicates(source, columns["index"], text_keys, images, found.remarks)
    _find_repeated_ids(source, id_keys, found.remarks)
    return SourceCheck(source, len(source), columns, found.errors, found.dropped, found.remarks, images)


@dataclass
class _Found:
    """Everything that the second pass over the records gave so far."""

    columns: dict[str, "array[int]"] = field(default_factory=lambda: {name: array("q") for name in COLUMNS})
    errors: dict[str, Tally] = field(default_factory=dict[str, Tally])
    dropped: dict[str, Tally] = field(default_factory=dict[str, Tally])
    remarks: dict[str, Tally] = field(default_factory=dict[str, Tally])

    def add(self, measures: Measures) -> None:
        for name, values in measures.columns.items():
            self.columns[name].extend(values)
        for tallies, remarks in [
            (self.errors, measures.errors),
            (self.dropped, measures.dropped),
            (self.remarks, measures.remarks),
        ]:
            for remark in remarks:
                tallies.setdefault(remark.kind, Tally()).add(remark)


def _scan(
    source: RecordSource, tasks: list[RecordTask], workers: Workers, progress: ShowProgress
) -> tuple[Array, Array, ImageTable]:
    text_keys, id_keys, numbers, ends = array("Q"), array("Q"), array("q"), array("q", [0])
    known: dict[str, int] = {}
    with progress(f"Reading {source.name}", len(source), "records") as shown:
        for scan in workers.map(scan_records, tasks, _killed):
            text_keys.extend(scan.text_keys)
            id_keys.extend(scan.id_keys)
            numbers.extend(known.setdefault(image, len(known)) for image in scan.images)
            for count in scan.num_images:
                ends.append(ends[-1] + count)
            shown.advance(len(scan.text_keys))
    table = ImageTable(list(known), [], np.asarray(numbers), np.asarray(ends))
    return np.asarray(text_keys), np.asarray(id_keys), table


def _examine(images: ImageTable, plan: Plan, source: RecordSource, workers: Workers, progress: ShowProgress) -> None:
    place = plan.place_of(source)

    def task_of(names: tuple[str, ...]) -> ImageTask:
        return ImageTask(place, names, plan.check_images, plan.exif_transpose)

    def one_by_one(task: ImageTask) -> list[DecodedImage]:
        alone = [workers.run_alone(examine_images, task_of((name,)), killed_by) for name in task.images]
        return [decoded for each in alone for decoded in each]

    tasks = (task_of(names) for names in _in_groups(images.names, IMAGES_PER_TASK))
    with progress(f"Decoding the images of {source.name}", len(images.names), "images") as shown:
        for decoded in workers.map(examine_images, tasks, one_by_one):
            images.decoded.extend(decoded)
            shown.advance(len(decoded))


def _check_images_can_be_read(source: RecordSource, plan: Plan, images: ImageTable) -> None:
    """Refuse, as a run does, a request under which no image could be read at all."""
    if images.names and plan.limits.geometry is None:
        raise UserError(
            f"Records of {source.name} have images, but the model has no vision tower. Pass --vision_tower, start from "
            "a LLaVA checkpoint, or take the images out of the records."
        )
    relative = next((name for name in images.names if not os.path.isabs(name) and not parse_embedded(name)), None)
    folder = plan.place_of(source).folder
    if relative is None or (folder is not None and Path(folder).is_dir()):
        return
    if folder is None:
        raise UserError(
            f"{source.name} names the image {relative!r}, a relative path, but there is no image folder. Pass "
            "--image_folder."
        )
    raise UserError(
        f"The image folder {str(folder)!r} is not a directory, but {source.name} names images in it. Check "
        "--image_folder."
    )


def _find_duplicates(
    source: RecordSource, usable: Array, text_keys: Array, images: ImageTable, remarks: dict[str, Tally]
) -> None:
    """Remark on usable records whose texts and images are those of an earlier one."""
    _, first_of, counts = np.unique(text_keys[usable], return_inverse=True, return_counts=True)
    first_with: dict[tuple[int, ...], int] = {}
    for index in usable[counts[first_of] > 1].tolist():
        first = first_with.setdefault((int(text_keys[index]), *images.content_keys(index)), index)
        if first != index:
            _remark(source, "duplicate-record", index, f"record {first} says the same of the same images.", remarks)


def _find_repeated_ids(source: RecordSource, id_keys: Array, remarks: dict[str, Tally]) -> None:
    with_id = np.flatnonzero(id_keys)
    _, first_place, first_of = np.unique(id_keys[with_id], return_index=True, return_inverse=True)
    firsts = with_id[first_place][first_of]
    for index, first in zip(with_id[firsts != with_id].tolist(), firsts[firsts != with_id].tolist(), strict=True):
        _remark(source, "repeated-id", index, f"record {first} has the same id.", remarks)


def _remark(source: RecordSource, kind: str, index: int, reason: str, remarks: dict[str, Tally]) -> None:
    tally = remarks.setdefault(kind, Tally())
    sample_id = id_of(source, index) if len(tally.examples) < NUM_EXAMPLES else ""
    tally.add(Remark(kind, index, sample_id, reason))


def id_of(source: RecordSource, index: int) -> str:
    """Give the id of a record, "" without one."""
    try:
        return parse_record(next(iter(source.read(index, index + 1))), index).id
    except BadSampleError as error:
        return error.sample_id


def _killed(task: RecordTask | MeasureTask) -> NoReturn:
    records = task if isinstance(task, RecordTask) else task.records
    raise RunError(
        f"The process that read records {records.start} to {records.stop - 1} of {records.source.name} was ended from "
        "outside, most likely because memory ran out. Give fewer --workers, or look at these records."
    )


def _in_groups(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    remaining = iter(items)
    while group := tuple(islice(remaining, size)):
        yield group
