"""Tokenised records as the model will see them: each image with its true number of tokens, too long ones cut.

The tokens stay on disk, mapped into memory; what is held here is a few numbers for each sample (`measure.py`).
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.preparation.tokenized_rows import Array, TokenizedRows, spans_of
from llava_ft.data.preparation.truncation import TruncationPolicy
from llava_ft.data.tokenize import ExpandedSample
from llava_ft.errors import BadSampleError
from llava_ft.geometry import SizeWH


class CountsTokens(Protocol):
    """Knows how many tokens an image takes; `ImageGeometry` is one."""

    @property
    def needs_image_sizes(self) -> bool:
        """Whether that depends on the image's size."""
        ...

    def num_tokens(self, size_wh: SizeWH | None = None) -> int:
        """Count the tokens of an image, by its width and height in pixels where they matter."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What decides how long a sample is, and what is done with one that is too long.

    Attributes:
        geometry: Counts the tokens of images; None for a model without vision tower.
        max_length: Tokens that a sample may have.
        truncation: What is done with one that has more.
    """

    geometry: CountsTokens | None
    max_length: int
    truncation: TruncationPolicy = "truncate"


@dataclass(frozen=True, slots=True)
class PreparedSamples:
    """The usable samples of one source, in the order of their records.

    Attributes:
        rows: The tokenised records.
        limits: How they were measured.
        record_indices: `(S,)` int64, position of each sample's record in its source, ascending.
        cuts: `(S,)` int32, tokens that stay of each row, an image counted as one.
        lengths: `(S,)` int32, tokens of each sample after expansion and truncation.
        num_supervised: `(S,)` int32, how many of these have to be predicted.
        num_images: `(S,)` int32, images of each sample that truncation leaves.
        was_truncated: `(S,)` bool.
        sizes_wh: `(M, 2)` int32, width and height in pixels of each image that is left, sample by sample; None where
            nothing depends on them.
    """

    rows: TokenizedRows
    limits: Limits
    record_indices: Array
    cuts: Array
    lengths: Array
    num_supervised: Array
    num_images: Array
    was_truncated: Array
    sizes_wh: Array | None = None
    _image_ends: Array = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_image_ends", np.cumsum(self.num_images, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.record_indices)

    def arrays(self, row: int) -> tuple[Array, Array]:
        """Give ids and labels of one sample as the model sees them, both `(T,)` int64."""
        record, cut = int(self.record_indices[row]), int(self.cuts[row])
        input_ids = self.rows.numbers("input_ids", record)[:cut].astype(np.int64)
        labels = np.full(cut, IGNORE_INDEX, dtype=np.int64)
        for start, end in spans_of(self.rows.numbers("target_spans", record)):
            labels[start:end] = input_ids[start:end]
        num_images = int(self.num_images[row])
        if num_images == 0:
            return input_ids, labels
        repeats = np.ones(cut, dtype=np.int64)
        repeats[self.rows.numbers("image_positions", record)[:num_images]] = self._image_tokens(row)
        return np.repeat(input_ids, repeats), np.repeat(labels, repeats)

    def expanded(self, row: int) -> ExpandedSample:
        """Give one sample as the model sees it, in lists."""
        input_ids, labels = self.arrays(row)
        return ExpandedSample(
            input_ids.tolist(), labels.tolist(), int(self.num_images[row]), bool(self.was_truncated[row])
        )

    def _image_tokens(self, row: int) -> int | list[int]:
        assert self.limits.geometry is not None
        if self.sizes_wh is None:
            return self.limits.geometry.num_tokens()
        return [self.limits.geometry.num_tokens(size_wh) for size_wh in self.image_sizes(row)]

    def images(self, row: int) -> list[str]:
        """Name the images of one sample that truncation leaves, as in its record."""
        return self.rows.images(int(self.record_indices[row]))[: int(self.num_images[row])]

    def image_sizes(self, row: int) -> list[SizeWH]:
        """Give width and height in pixels of the images of one sample; empty where nothing depends on them."""
        if self.sizes_wh is None:
            return []
        end = int(self._image_ends[row])
        sizes: list[list[int]] = self.sizes_wh[end - int(self.num_images[row]) : end].tolist()
        return [(width, height) for width, height in sizes]

    def sample_id(self, row: int) -> str:
        """Give the record's own id, "" where there is none."""
        return self.rows.sample_id(int(self.record_indices[row]))

    def bad_sample(self, row: int, kind: str, reason: str) -> BadSampleError:
        """Make the error that says why a sample cannot be used."""
        return BadSampleError(int(self.record_indices[row]), self.sample_id(row), kind, reason)
