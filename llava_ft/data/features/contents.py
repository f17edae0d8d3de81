"""Which content an image has: a digest of all bytes of its file, remembered between runs.

A digest takes reading the file. It is remembered for the file's path, size and times of change, as Git does for a
working tree, so a second start only asks the file system for these; an image inside a source of records keeps its
digest as long as the source's fingerprint stays. Renamed and copied files are read again and have the digest they had.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final

import torch

from llava_ft.data.features.store import DIGEST, digest_of
from llava_ft.data.features.tensor_files import DamagedShardError, list_shards, read_shard, write_shard
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.image_reader import ImageReader, ImageRef
from llava_ft.data.preparation.processes import Progress
from llava_ft.data.records import parse_embedded
from llava_ft.errors import ImageError, RunError

NO_CONTENT: Final = bytes(DIGEST.itemsize)
"""Stands for the digest of an image that cannot be read."""

_OWNER: Final = "image contents"
_PREFIX: Final = "contents"
_TENSORS: Final = ("states", "contents")
_SETTLED_SECONDS: Final = 2.0
"""A file changed more recently may be changed again within the same tick of the file system's clock."""
_TRIES: Final = 3
"""How often a file that changes while it is read, such as one that is being copied, is read again."""
_NUM_THREADS: Final = 16
_IMAGES_PER_TASK: Final = 256
_IMAGES_PER_SHARD: Final = 1024


@dataclass(frozen=True, slots=True)
class RunImage:
    """One image of a run's data, and what reads it."""

    reader: ImageReader
    ref: ImageRef

    @property
    def place(self) -> ImagePlace:
        """Where its name in the record leads from."""
        return self.reader.places[self.ref.source]

    def content_digest(self) -> bytes:
        """Return the digest of what its file holds now; `NO_CONTENT` if it cannot be read."""
        try:
            content = self.place.content(self.ref.image)
            return digest_of(content if isinstance(content, bytes) else Path(content).read_bytes())
        except (ImageError, OSError, ValueError):
            return NO_CONTENT


def content_digests(folder: Path, images: Sequence[RunImage]) -> list[bytes]:
    """Return the digest of each image's content, reading the images for which it is not remembered.

    `folder` is where digests are remembered, by any number of processes at once. A damaged file in it is left out: its
    images are read again. An image that cannot be read, or is being changed, has `NO_CONTENT`.

    Raises:
        RunError: The digests cannot be written.
    """
    known: dict[bytes, bytes] = {}
    for path in list_shards(folder, _PREFIX):
        with suppress(DamagedShardError):
            known.update(zip(*(map(bytes, table.numpy()) for table in read_shard(path, _OWNER, _TENSORS)), strict=True))
    places = {image.place for image in images}
    fingerprints = {place: place.source.fingerprint() for place in places if place.source is not None}

    def states(start: int) -> list[bytes]:  # of many: a task for each would take longer than looking
        return [_state(fingerprints, image) for image in images[start : start + _IMAGES_PER_TASK]]

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = chain.from_iterable(pool.map(states, range(0, len(images), _IMAGES_PER_TASK)))
        contents = [known.get(state, NO_CONTENT) for state in found]
        unknown = [number for number, content in enumerate(contents) if content == NO_CONTENT]
        with Progress("Reading images to know their content", len(unknown), "images") as progress:
            for start in range(0, len(unknown), _IMAGES_PER_SHARD):
                numbers = unknown[start : start + _IMAGES_PER_SHARD]
                pairs = [*pool.map(partial(_read, fingerprints), [images[number] for number in numbers])]
                _remember(folder, [pair for pair in pairs if NO_CONTENT not in pair])
                for number, (_, content) in zip(numbers, pairs, strict=True):
                    contents[number] = content
                progress.advance(len(numbers))
    return contents


def _remember(folder: Path, pairs: Sequence[tuple[bytes, bytes]]) -> None:
    if not pairs:
        return
    columns = zip(_TENSORS, zip(*pairs, strict=True), strict=True)
    tables = {
        name: torch.tensor(list(b"".join(column)), dtype=torch.uint8).view(len(pairs), -1) for name, column in columns
    }
    try:
        write_shard(folder, _PREFIX, tables, _OWNER)
    except OSError as error:
        raise RunError(
            f"The digests of images could not be written into {folder}: {error.strerror or error}. Free some space, or "
            "name another directory with --vision_cache."
        ) from error


def _state(fingerprints: Mapping[ImagePlace, str], image: RunImage) -> bytes:
    """Return a digest of all that says without reading an image whether it is still the same."""
    try:
        name = image.reader.locate(image.ref)
        if parse_embedded(image.ref.image) is not None:
            values = (name, fingerprints.get(image.place, ""))
        else:
            status = os.stat(name)
            values = (os.path.abspath(name), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except (ImageError, OSError, ValueError):
        return NO_CONTENT
    return digest_of("\0".join(map(str, values)).encode(errors="surrogateescape"))


def _read(fingerprints: Mapping[ImagePlace, str], image: RunImage) -> tuple[bytes, bytes]:
    """Return state and content of an image that does not change while it is read."""
    for _ in range(_TRIES):
        state = _state(fingerprints, image)
        if state != NO_CONTENT and parse_embedded(image.ref.image) is None:
            with suppress(OSError):
                age = time.time() - os.stat(image.reader.locate(image.ref)).st_ctime
                time.sleep(_SETTLED_SECONDS - age if 0 <= age < _SETTLED_SECONDS else 0)
        content = image.content_digest()
        if NO_CONTENT in (state, content):
            break
        if state == _state(fingerprints, image):
            return state, content
    return NO_CONTENT, NO_CONTENT
