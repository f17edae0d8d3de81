"""Several sources read as one, end to end."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from llava_ft.data.sources.base import RecordSource


class ChainSource(RecordSource):
    """The records of each source in turn, numbered through."""

    def __init__(self, name: str, sources: Sequence[RecordSource], image_folder: str | None = None):
        super().__init__(name, image_folder)
        self.sources = list(sources)
        self._starts: list[int] = []

    def fingerprint(self) -> str:
        """Give a hash of the sources' fingerprints, in order."""
        parts = "\n".join(source.fingerprint() for source in self.sources)
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def prepare(self, cache_dir: Path) -> None:
        """Prepare each source."""
        for source in self.sources:
            source.prepare(cache_dir)
        self._starts = list(accumulate(map(len, self.sources), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Iterator[object]:
        """Read a range across sources."""
        while start < stop:
            source, first = self._find(start)
            last = min(len(source), first + stop - start)
            yield from source.read(first, last)
            start += last - first

    def image_bytes(self, index: int, position: int) -> bytes:
        """Read an image from the source that holds it."""
        source, number = self._find(index)
        return source.image_bytes(number, position)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        place = bisect_right(self._starts, index) - 1
        return self.sources[place], index - self._starts[place]
