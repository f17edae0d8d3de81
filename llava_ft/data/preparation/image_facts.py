"""What is known about the images of a data set before a run: whether they can be used, and how large they are.

Opening an image takes some 0.1 ms and decoding it 10 ms, so what was found is kept beside the prepared records. It
holds as long as the file has the same size and time of change, which every start looks at; an image that could not be
used is always opened again.
"""

import json
import logging
import os
import socket
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np

from llava_ft.data.image_files import (
    IMAGE_CHECKS,
    ImageCheck,
    ImagePlace,
    check_image_file,
    check_image_header,
    load_image,
)
from llava_ft.data.preparation.build_once import one_at_a_time
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.processes import run_tasks
from llava_ft.data.preparation.progress import Progress
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows, pa
from llava_ft.data.records import parse_embedded
from llava_ft.errors import ImageError
from llava_ft.geometry import SizeWH

logger = logging.getLogger(__name__)

FILES_FOR_PROCESSES: Final = {"header": 20_000, "decode": 500}
"""Fewer files are opened by threads of this process."""

_THREADS: Final = 32
_THREADS_PER_PROCESS: Final = 4
_FILES_PER_TASK: Final = 500
_FILES_PER_GROUP: Final = 128
_NUMBERS: Final = ("num_bytes", "mtime_ns", "rank", "width", "height")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known about the images of tokenised records.

    Attributes:
        numbers: `(M,)` int64, which of the different images each image of the records is, record by record.
        sizes_wh: `(N, 2)` int64, width and height in pixels of the different images; 0 where they are not known.
        errors: Why different images cannot be used, by number.
    """

    numbers: Array
    sizes_wh: Array
    errors: dict[int, ImageError]


@dataclass(frozen=True, slots=True)
class ImageChecks:
    """What has to be known about each image.

    Attributes:
        level: How much of each file is read.
        needs_sizes: Whether sizes have to be known; headers are read then, whatever the level.
        exif_transpose: Whether sizes are those after turning pictures as their EXIF orientation says.
    """

    level: ImageCheck
    needs_sizes: bool = False
    exif_transpose: bool = False

    @property
    def opens_files(self) -> bool:
        """Whether more has to be known than that there is a file."""
        return self.needs_sizes or self.level in ("header", "decode")

    @property
    def rank(self) -> int:
        """The level as a number, with what sizes ask for."""
        return max(IMAGE_CHECKS.index(self.level), IMAGE_CHECKS.index("header") if self.needs_sizes else 0)


def look_at_image(image: str, place: ImagePlace, checks: ImageChecks) -> SizeWH | None:
    """Find out what has to be known about one image.

    Args:
        image: As its record names it.
        place: Where it is.
        checks: What has to be known.

    Returns:
        Width and height in pixels; None if the file is not opened.

    Raises:
        ImageError: The image cannot be used.
    """
    content, name = place.content(image), place.locate(image)
    if not checks.opens_files:
        if checks.level == "exists" and not isinstance(content, bytes):
            check_image_file(content)
        return None
    size_wh = check_image_header(content, exif_transpose=checks.exif_transpose, name=name)
    if checks.level == "decode":
        load_image(content, name=name)
    return size_wh


def look_at_images(
    rows: TokenizedRows, place: ImagePlace, checks: ImageChecks, settings: PreparationSettings
) -> ImageFacts:
    """Find out what has to be known about the images of tokenised records.

    Args:
        rows: The records.
        place: Where the images are.
        checks: What has to be known.
        settings: Where earlier findings are kept, and with how many processes to work.
    """
    numbers, images = rows.numbered_images()
    sizes_wh, errors = np.zeros((len(images), 2), dtype=np.int64), dict[int, ImageError]()
    facts = ImageFacts(numbers, sizes_wh, errors)
    names: dict[int, str] = {}
    for number, image in enumerate(images):
        try:
            names[number] = place.locate(image)
        except ImageError as error:
            errors[number] = error
    if checks.rank == 0:
        return facts
    in_files = [number for number in names if parse_embedded(images[number]) is None]
    # An image in a source changes with it alone.
    states = dict.fromkeys(names, (0, 0)) | _file_states(names, in_files, errors)
    known = [number for number in states if number not in errors]
    if not checks.opens_files:
        return facts
    # One file of findings for each folder, and for each source that holds images itself.
    owner = [
        "" if place.folder is None else os.path.realpath(place.folder),
        place.source.fingerprint() if len(in_files) < len(names) and place.source is not None else "",
        str(checks.exif_transpose),
    ]
    key = blake2b(json.dumps(owner).encode(), digest_size=16).hexdigest()
    path = settings.directory / "images" / f"{key}.arrow"

    def read_findings() -> tuple[Findings, list[int]]:
        findings = Findings(path)
        return findings, [n for n in known if not findings.hold(names[n], states[n], checks.rank)]

    findings, unknown = read_findings()
    if unknown:
        with one_at_a_time(path, goes_first=settings.goes_first):
            findings, unknown = read_findings()
            opened = _open_images([images[number] for number in unknown], place, checks, settings)
            for number, result in zip(unknown, opened, strict=True):
                if isinstance(result, ImageError):
                    errors[number] = result
                else:
                    findings.add(names[number], states[number], checks.rank, result)
            findings.save()
    for number in known:
        if number not in errors:
            sizes_wh[number] = findings.size_wh(names[number])
    return facts


def _file_states(
    names: Mapping[int, str], numbers: Sequence[int], errors: dict[int, ImageError]
) -> dict[int, tuple[int, int]]:
    """Ask the file system for size and time of change of each file; note the files that cannot be used."""

    def look(group: Sequence[int]) -> list[tuple[int, int] | ImageError]:
        return [_file_state(names[number]) for number in group]

    states: dict[int, tuple[int, int]] = {}
    groups = [numbers[start : start + _FILES_PER_GROUP] for start in range(0, len(numbers), _FILES_PER_GROUP)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for group, found in zip(groups, pool.map(look, groups), strict=True):
            for number, state in zip(group, found, strict=True):
                if isinstance(state, ImageError):
                    errors[number] = state
                else:
                    states[number] = state
    return states


def _file_state(path: str) -> tuple[int, int] | ImageError:
    try:
        status = check_image_file(path)
    except ImageError as error:
        return error
    return status.st_size, status.st_mtime_ns


def _open_images(
    images: Sequence[str], place: ImagePlace, checks: ImageChecks, settings: PreparationSettings
) -> list[SizeWH | ImageError]:
    """Open images, in several processes if there are many."""
    decodes = checks.level == "decode"
    is_many = len(images) >= FILES_FOR_PROCESSES["decode" if decodes else "header"]
    work = _Opening(place, checks, _THREADS_PER_PROCESS if is_many else _THREADS)
    tasks = [images[start : start + _FILES_PER_TASK] for start in range(0, len(images), _FILES_PER_TASK)]
    what = "Decoding" if decodes else "Reading the headers of"
    results: list[SizeWH | ImageError] = []
    with Progress(f"{what} images", len(images), "images") as progress:
        for part in run_tasks(work, tasks, settings.processes if is_many else 1):
            results += part
            progress.advance(len(part))
    if is_many:
        logger.info("%s %d images took %.1f s (%.0f a second).", what, len(images), progress.seconds, progress.rate)
    return results


@dataclass(frozen=True, slots=True)
class _Opening:
    """The work of one process: sizes of images, or why they cannot be used."""

    place: ImagePlace
    checks: ImageChecks
    num_threads: int

    def __call__(self, images: Sequence[str]) -> list[SizeWH | ImageError]:
        with ThreadPoolExecutor(self.num_threads) as pool:
            return list(pool.map(self._open, images))

    def _open(self, image: str) -> SizeWH | ImageError:
        try:
            size_wh = look_at_image(image, self.place, self.checks)
        except ImageError as error:
            return error
        assert size_wh is not None
        return size_wh


class Findings:
    """What was found in image files earlier: for each, its state then, how much was read, and its size in pixels.

    Args:
        path: Where it is kept. A file that is missing or damaged counts as empty.
    """

    def __init__(self, path: Path):
        self.path = path
        self._names: list[str] = []
        self._numbers: list[array[int]] = [array("q") for _ in _NUMBERS]  # lists would hold five times as much
        try:
            with pa.memory_map(str(path), "r") as mapped, pa.ipc.open_stream(mapped) as reader:
                table = reader.read_all()
            self._names = table.column("name").to_pylist()
            for column, name in zip(self._numbers, _NUMBERS, strict=True):
                column.frombytes(table.column(name).to_numpy().astype(np.int64).tobytes())
        except (OSError, KeyError, pa.ArrowException) as error:
            if path.exists():
                logger.warning("%s is damaged (%s) and is made again.", path, error)
        self._rows = {name: row for row, name in enumerate(self._names)}

    def hold(self, name: str, state: tuple[int, int], rank: int) -> bool:
        """Whether an image with this state was read at least as far as `rank`."""
        row = self._rows.get(name)
        if row is None:
            return False
        num_bytes, mtime_ns, ranks = self._numbers[:3]
        return (num_bytes[row], mtime_ns[row]) == state and ranks[row] >= rank

    def size_wh(self, name: str) -> SizeWH:
        """Give the width and height of an image in pixels."""
        row = self._rows[name]
        return self._numbers[3][row], self._numbers[4][row]

    def add(self, name: str, state: tuple[int, int], rank: int, size_wh: SizeWH) -> None:
        """Note what was found; replaces what is known of the image."""
        row = self._rows.setdefault(name, len(self._names))
        if row == len(self._names):
            self._names.append(name)
        for column, value in zip(self._numbers, (*state, rank, *size_wh), strict=True):
            column[row : row + 1] = array("q", (value,))  # also where the column ends

    def save(self) -> None:
        """Keep the findings. Of two runs that do so at once the later one's stay; the other's are found again."""
        arrays = [pa.array(self._names, pa.string()), *(pa.array(np.asarray(column)) for column in self._numbers)]
        table = pa.Table.from_arrays(arrays, names=["name", *_NUMBERS])
        unfinished = self.path.with_name(f".{self.path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            unfinished.replace(self.path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            logger.warning("What was found about images could not be kept in %s: %s.", self.path.parent, error)
