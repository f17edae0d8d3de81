"""Which content an image has: a digest of all bytes of its file, remembered between runs.

A digest takes reading the file. It is remembered for the file's path, size and times of change, as Git does for a
working tree, so a second start only asks the file system for these; an image inside a source of records keeps its
digest as long as the source's fingerprint stays. Renamed and copied files are read again and have the digest they had.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
import torch

from llava_ft.data.features.store import DIGEST, Array, find_digests
from llava_ft.data.features.tensor_files import DamagedShardError, list_shards, read_shard, write_shard
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.image_reader import ImageReader, ImageRef
from llava_ft.data.records import parse_embedded
from llava_ft.errors import ImageError, RunError

NO_CONTENT: Final = bytes(DIGEST.itemsize)
"""Stands for the digest of an image that cannot be read."""

_OWNER: Final = "image contents"
_PREFIX: Final = "contents"
_TENSORS: Final = ("states", "contents")
_SETTLED_SECONDS: Final = 2.0
"""A file changed more recently may be changed again within the same tick of the file system's clock."""
_NUM_THREADS: Final = 16
_IMAGES_PER_TASK: Final = 256
_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class RunImage:
    """One image of a run's data.

    Attributes:
        reader: Reads it.
        ref: Where it is.
    """

    reader: ImageReader
    ref: ImageRef

    @property
    def place(self) -> ImagePlace:
        """Where its name in the record leads from."""
        return self.reader.places[self.ref.source]

    def name_digest(self) -> bytes:
        """Return the digest of the name that no other image has.

        Raises:
            ImageError: The path may not be used.
        """
        return digest_of(self.reader.locate(self.ref).encode(errors="surrogateescape"))

    def content_digest(self) -> bytes:
        """Return the digest of what its file holds now; `NO_CONTENT` if it cannot be read."""
        try:
            content = self.place.content(self.ref.image)
            return digest_of(content if isinstance(content, bytes) else Path(content).read_bytes())
        except (ImageError, OSError, ValueError):
            return NO_CONTENT


def known_contents(folder: Path, images: Sequence[RunImage]) -> Array:
    """Return what is remembered of images, after asking for their states in threads.

    Args:
        folder: Where digests are remembered. A damaged file in it is left out: its images are read again.
        images: The images.

    Returns:
        `(I,)` digests, `NO_CONTENT` where none is known.
    """
    pairs = [np.empty((2, 0), dtype=DIGEST)]
    for path in list_shards(folder, _PREFIX):
        with suppress(DamagedShardError):
            pairs.append(np.stack([table.numpy().view(DIGEST)[:, 0] for table in read_shard(path, _OWNER, _TENSORS)]))
    known_states, contents = np.concatenate(pairs, axis=1)
    known_states, firsts = np.unique(known_states, return_index=True)
    fingerprints = _fingerprints(images)

    def states(
        start: int,
    ) -> list[bytes]:  # of many: a task for each would take longer than looking
        return [_state(fingerprints, image) for image in images[start : start + _IMAGES_PER_TASK]]

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found_states = chain.from_iterable(pool.map(states, range(0, len(images), _IMAGES_PER_TASK)))
        places = find_digests(known_states, as_array(list(found_states)))
    found = np.zeros(len(images), dtype=DIGEST)
    found[places >= 0] = contents[firsts][places[places >= 0]]
    return found


def read_contents(folder: Path, images: Sequence[RunImage], *, group: int = 1024) -> Iterator[Array]:
    """Read images in threads and remember their digests.

    Args:
        folder: Where digests are remembered, by any number of processes at once; it is made if it is not there.
        images: The images.
        group: How many to read before their digests are written and given out.

    Yields:
        Digests of one group after the other, `NO_CONTENT` for an image that cannot be read or does not stop changing.

    Raises:
        RunError: The digests cannot be written.
    """
    content = partial(_content, _fingerprints(images))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(images), group):
            pairs = [*pool.map(content, images[start : start + group])]
            read = [
                as_array(digests) for digests in zip(*(pair for pair in pairs if NO_CONTENT not in pair), strict=True)
            ]
            tables = [torch.tensor(digests.view(np.uint8).reshape(-1, DIGEST.itemsize)) for digests in read]
            try:
                if tables:
                    write_shard(folder, _PREFIX, dict(zip(_TENSORS, tables, strict=True)), _OWNER)
            except OSError as error:
                raise RunError(
                    f"The digests of images could not be written into {folder}: {error.strerror or error}. Free some "
                    "space, or name another directory with --vision_cache."
                ) from error
            yield as_array([digest for _, digest in pairs])


def as_array(digests: Sequence[bytes]) -> Array:
    """Return digests as an array that can be searched."""
    return np.frombuffer(b"".join(digests), dtype=DIGEST)


def digest_of(data: bytes) -> bytes:
    """Return a digest of 16 bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST.itemsize).digest()


def _fingerprints(images: Sequence[RunImage]) -> Mapping[ImagePlace, str]:
    """Ask each source that holds images for its fingerprint, once."""
    places = {image.place for image in images}
    return {place: place.source.fingerprint() for place in places if place.source is not None}


def _state(fingerprints: Mapping[ImagePlace, str], image: RunImage) -> bytes:
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


def _content(fingerprints: Mapping[ImagePlace, str], image: RunImage) -> tuple[bytes, bytes]:
    """Return state and digest of an image that does not change while it is read."""
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
