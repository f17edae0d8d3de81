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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from llava_ft.data.features.entry_log import CHECKSUM, DIGEST, Array, EntryReader, EntryWriter, find_digests, new_name
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.records import parse_embedded
from llava_ft.errors import ImageError, RunError

NO_CONTENT: Final = bytes(DIGEST.itemsize)
"""Stands for the digest of an image that cannot be read."""

_ENTRY: Final = np.dtype([("state", DIGEST), ("content", DIGEST), (CHECKSUM, "<u4")])
_OWNER: Final = b"image contents"
_PATTERN: Final = "contents-*.idx"
_SETTLED_SECONDS: Final = 2.0
"""A file changed more recently may be changed again within the same tick of the file system's clock."""
_NUM_THREADS: Final = 16
_IMAGES_PER_TASK: Final = 256
_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class LocatedImage:
    """An image by its name in a record and the place that the name refers to."""

    place: ImagePlace
    name: str


class ContentTable:
    """Digests of images by their state, kept in a folder that several processes may use at once.

    Args:
        folder: The folder; made when something is added.

    Raises:
        UserError: A file in it is of another kind or version.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._indexes: list[EntryReader] = []
        self._entries: Array = np.empty(0, dtype=_ENTRY)
        self._writer: EntryWriter | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look for what other processes have added."""
        known = {index.path for index in self._indexes}
        fresh = (path for path in sorted(self._folder.glob(_PATTERN)) if path not in known)
        self._indexes += [EntryReader(path, _ENTRY, _OWNER) for path in fresh]
        every = np.concatenate([self._entries, *(index.read_new() for index in self._indexes)])
        self._entries = every[np.unique(every["state"], return_index=True)[1]]

    def find(self, states: Array) -> Array:
        """Find digests by state: `(S,)` to `(S,)`, `NO_CONTENT` where none is known."""
        places = find_digests(self._entries["state"], states)
        contents = np.zeros(len(states), dtype=DIGEST)
        contents[places >= 0] = self._entries["content"][places[places >= 0]]
        return contents

    def add(self, states: Array, contents: Array) -> None:
        """Remember digests.

        Raises:
            RunError: They cannot be written.
        """
        entries = np.zeros(len(states), dtype=_ENTRY)
        entries["state"], entries["content"] = states, contents
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / _PATTERN.replace("*", new_name())
                self._writer = EntryWriter(path, _ENTRY, _OWNER)
            self._writer.append(entries)
        except OSError as error:
            raise RunError(
                f"The digests of images could not be written into {self._folder}: {error.strerror or error}. Free some "
                "space, or name another directory with --vision_cache."
            ) from error

    def close(self) -> None:
        """Close the file that was written, if any."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def digest_of(data: bytes) -> bytes:
    """Return a digest of 16 bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST.itemsize).digest()


def content_digest(image: LocatedImage) -> bytes:
    """Return the digest of what an image's file holds now; `NO_CONTENT` if it cannot be read."""
    try:
        content = image.place.content(image.name)
        return digest_of(content if isinstance(content, bytes) else Path(content).read_bytes())
    except (ImageError, OSError, ValueError):
        return NO_CONTENT


def image_states(images: Sequence[LocatedImage]) -> Array:
    """Ask for the states of many images at once, in threads: `(I,)`, `NO_CONTENT` for one that cannot be reached."""
    fingerprints = _fingerprints(images)

    def look(group: Sequence[LocatedImage]) -> list[bytes]:
        return [_state(fingerprints, image) for image in group]

    groups = [images[start : start + _IMAGES_PER_TASK] for start in range(0, len(images), _IMAGES_PER_TASK)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return _as_array([state for states in pool.map(look, groups) for state in states])


def image_contents(images: Sequence[LocatedImage], *, group: int = 1024) -> Iterator[tuple[Array, Array]]:
    """Read many images in threads.

    Args:
        images: Where they are.
        group: How many to read before they are given out.

    Yields:
        States and digests of one group after the other; both are `NO_CONTENT` for an image that cannot be read or does
        not stop changing.
    """
    content = partial(_content, _fingerprints(images))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for start in range(0, len(images), group):
            pairs = list(pool.map(content, images[start : start + group]))
            yield _as_array([state for state, _ in pairs]), _as_array([content for _, content in pairs])


def _fingerprints(images: Sequence[LocatedImage]) -> Mapping[ImagePlace, str]:
    """Ask each source that holds images for its fingerprint, once."""
    places = {image.place for image in images}
    return {place: place.source.fingerprint() for place in places if place.source is not None}


def _state(fingerprints: Mapping[ImagePlace, str], image: LocatedImage) -> bytes:
    try:
        name = image.place.locate(image.name)
        if parse_embedded(image.name) is not None:
            values = (name, fingerprints.get(image.place, ""))
        else:
            status = os.stat(name)
            values = (os.path.abspath(name), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except (ImageError, OSError, ValueError):
        return NO_CONTENT
    return digest_of("\0".join(map(str, values)).encode(errors="surrogateescape"))


def _content(fingerprints: Mapping[ImagePlace, str], image: LocatedImage) -> tuple[bytes, bytes]:
    try:
        for _ in range(_TRIES):
            state, content = _state(fingerprints, image), image.place.content(image.name)
            if isinstance(content, bytes):
                return state, digest_of(content)
            age = time.time() - os.stat(content).st_ctime
            if 0 <= age < _SETTLED_SECONDS:
                time.sleep(_SETTLED_SECONDS - age)
            digest = digest_of(Path(content).read_bytes())
            if state == _state(fingerprints, image):
                return state, digest
    except (ImageError, OSError, ValueError):
        pass
    return NO_CONTENT, NO_CONTENT


def _as_array(digests: Sequence[bytes]) -> Array:
    return np.frombuffer(b"".join(digests), dtype=DIGEST)
