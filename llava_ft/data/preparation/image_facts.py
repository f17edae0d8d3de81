"""What is known about the images of a data set before a run: whether they can be used, and how large they are.

Opening an image takes some 0.1 ms and decoding it 10 ms, so what was found is kept beside the prepared records. It
holds as long as the file has the same size and time of change, which every start looks at; an image that could not be
used is always opened again.
"""

import json
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from llava_ft.data.image_files import (
    FORMATS,
    IMAGE_CHECKS,
    ImageCheck,
    ImagePlace,
    check_image_file,
    check_image_header,
    load_image,
)
from llava_ft.data.preparation.build_once import one_at_a_time
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.processes import Progress, run_tasks
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows, pa
from llava_ft.data.records import parse_embedded
from llava_ft.errors import ImageError, UserError
from llava_ft.geometry import SizeWH

logger = logging.getLogger(__name__)

FILES_FOR_PROCESSES: Final = {"header": 20_000, "decode": 500}
"""Fewer files are opened by threads of this process."""

_THREADS: Final = 32
_THREADS_PER_PROCESS: Final = 4
_FILES_PER_TASK: Final = 500
_FILES_PER_GROUP: Final = 128
_NUMBERS: Final = ("num_bytes", "mtime_ns", "rank", "width", "height")
_Finding = tuple[int, int, int, int, int]
_DIGEST_SIZE: Final = xxhash.xxh3_128().digest_size
"""Bytes at the end of the file of findings, by which a damaged one is known."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known about the images of tokenised records."""

    numbers: Array  # `(M,)` int64, which of the different images each image of the records is, record by record
    sizes_wh: Array  # `(N, 2)` int64, width and height in pixels of the different images; 0 where they are not known
    errors: dict[int, ImageError]  # why different images cannot be used, by number


@dataclass(frozen=True, slots=True)
class ImageChecks:
    """What has to be known about each image."""

    level: ImageCheck  # how much of each file is read
    needs_sizes: bool = False  # headers are read then, whatever the level
    exif_transpose: bool = False  # whether pictures are turned as their EXIF orientation says

    def __post_init__(self) -> None:
        if self.level not in IMAGE_CHECKS:
            raise UserError(f"check_images is {self.level!r}; it can be {', '.join(IMAGE_CHECKS)}.")

    @property
    def opens_files(self) -> bool:
        """Whether more has to be known than that there is a file."""
        return self.needs_sizes or self.level in ("header", "decode")

    @property
    def rank(self) -> int:
        """The level as a number, with what sizes ask for."""
        return max(IMAGE_CHECKS.index(self.level), IMAGE_CHECKS.index("header") if self.needs_sizes else 0)


def look_at_image(image: str, place: ImagePlace, checks: ImageChecks) -> SizeWH | None:
    """Find out what has to be known about one image: width and height in pixels, None if the file is not opened.

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
    """Find out what has to be known about the images of tokenised records, or look up what was found earlier."""
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
    states: dict[int, tuple[int, int]] = dict.fromkeys(names, (0, 0))  # an image in a source changes with it alone

    def look(group: Sequence[int]) -> list[tuple[int, int] | ImageError]:
        found: list[tuple[int, int] | ImageError] = []
        for number in group:
            try:
                status = check_image_file(names[number])
                found.append((status.st_size, status.st_mtime_ns))
            except ImageError as error:
                found.append(error)
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        groups = [in_files[start : start + _FILES_PER_GROUP] for start in range(0, len(in_files), _FILES_PER_GROUP)]
        for number, state in zip(in_files, chain.from_iterable(pool.map(look, groups)), strict=True):
            if isinstance(state, ImageError):
                errors[number] = state
            else:
                states[number] = state
    if not checks.opens_files:
        return facts
    # One file of findings for each folder, and for each source that holds images itself.
    owner = [
        "" if place.folder is None else os.path.realpath(place.folder),
        place.source.fingerprint() if len(in_files) < len(names) and place.source is not None else "",
        str(checks.exif_transpose),
        *FORMATS,
        "with a digest",  # files of earlier versions are left alone
    ]
    key = blake2b(json.dumps(owner).encode(), digest_size=16).hexdigest()
    path = settings.directory / "images" / f"{key}.arrow"
    known = [number for number in names if number not in errors]

    def read_findings() -> tuple[dict[str, _Finding], list[int]]:
        findings = _read_findings(path)
        nothing = (-1,) * len(_NUMBERS)
        found = {number: findings.get(names[number], nothing) for number in known}
        return findings, [n for n, old in found.items() if old[:2] != states[n] or old[2] < checks.rank]

    findings, unknown = read_findings()
    if unknown:
        with one_at_a_time(path, goes_first=settings.goes_first):
            findings, unknown = read_findings()
            opened = _open_images([images[number] for number in unknown], place, checks, settings)
            for number, result in zip(unknown, opened, strict=True):
                if isinstance(result, ImageError):
                    errors[number] = result
                else:
                    findings[names[number]] = (*states[number], checks.rank, *result)
            _write_findings(path, findings)
    for number in known:
        if number not in errors:
            sizes_wh[number] = findings[names[number]][3:]
    return facts


def _open_images(
    images: Sequence[str], place: ImagePlace, checks: ImageChecks, settings: PreparationSettings
) -> list[SizeWH | ImageError]:
    """Open images, in several processes if there are many."""
    decodes = checks.level == "decode"
    is_many = len(images) >= FILES_FOR_PROCESSES["decode" if decodes else "header"]
    work = partial(_open_some, place, checks, _THREADS_PER_PROCESS if is_many else _THREADS)
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


def _open_some(
    place: ImagePlace, checks: ImageChecks, num_threads: int, images: Sequence[str]
) -> list[SizeWH | ImageError]:
    """Find out sizes of images, or why they cannot be used: the work of one process."""

    def look(image: str) -> SizeWH | ImageError:
        try:
            size_wh = look_at_image(image, place, checks)
        except ImageError as error:
            return error
        assert size_wh is not None
        return size_wh

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(look, images))


# What was found in image files earlier: for each, its state then, how much was read, and its size in pixels.


def _read_findings(path: Path) -> dict[str, _Finding]:
    """Read what is kept; a file that is missing or damaged counts as empty."""
    try:
        content = path.read_bytes()
        rows, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
        if xxhash.xxh3_128_digest(rows) != digest:
            raise ValueError("it is not as it was written")
        with pa.ipc.open_stream(rows) as reader:
            table = reader.read_all()
        numbers = zip(*(table.column(name).to_pylist() for name in _NUMBERS), strict=True)
        return dict(zip(table.column("name").to_pylist(), numbers, strict=True))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        if path.exists():
            logger.warning("%s is damaged (%s) and is made again.", path, error)
        return {}


def _write_findings(path: Path, findings: Mapping[str, _Finding]) -> None:
    """Keep findings. Of two runs that do so at once the later one's stay; the other's are found again."""
    columns = {name: [found[place] for found in findings.values()] for place, name in enumerate(_NUMBERS)}
    schema = pa.schema({"name": pa.string(), **dict.fromkeys(_NUMBERS, pa.int64())})
    table = pa.table({"name": list(findings), **columns}, schema=schema)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = pa.BufferOutputStream()
        with pa.ipc.new_stream(stream, schema) as writer:
            writer.write_table(table)
        rows = stream.getvalue().to_pybytes()
        unfinished.write_bytes(rows + xxhash.xxh3_128_digest(rows))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        logger.warning("What was found about images could not be kept in %s: %s.", path.parent, error)
