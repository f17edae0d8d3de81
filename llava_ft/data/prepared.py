"""Tokenised samples in a few flat arrays: some 5 bytes a token, shared by all data-loading workers.

Python lists of numbers would take ten times as much, and forked workers would copy them page by page.
"""

import logging
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.schema import Sample
from llava_ft.data.tokenize import ExpandedSample, TokenizedSample, expand_and_truncate
from llava_ft.errors import BadSampleError

logger = logging.getLogger(__name__)

_SAMPLES_PER_NOTE: Final = 100_000

IntArray = np.ndarray[Any, np.dtype[np.int32]]


class PreparedSamples:
    """Samples after tokenisation, with their exact lengths; images are still paths.

    Args:
        tokens_per_image: Positions that one image takes.
        max_length: Tokens after which a sample is cut off.

    Attributes:
        lengths: `(S,)` int32, tokens of each sample after expansion and truncation.
        num_images: `(S,)` int32, images of each sample that truncation leaves.
        record_indices: `(S,)` int64, position of each sample's record in its file.
        num_truncated: Samples that are cut off.
        num_supervised: Supervised tokens of all samples, after truncation.
    """

    def __init__(self, tokens_per_image: int, max_length: int):
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self.num_truncated = 0
        self.num_supervised = 0
        self._token_ids = array("i")
        self._is_target = bytearray()
        self._ends = array("q", [0])
        self._lengths = array("i")
        self._num_images = array("i")
        self._record_indices = array("q")
        self._sample_ids: list[str] = []
        self._images: list[tuple[str, ...]] = []

    def append(self, sample: Sample, tokens: TokenizedSample) -> None:
        """Add one sample.

        Raises:
            BadSampleError: Truncation leaves no supervised token.
        """
        expanded = self._expand(tokens)
        num_supervised = len(expanded.labels) - expanded.labels.count(IGNORE_INDEX)
        if num_supervised == 0:
            raise BadSampleError(
                sample.index,
                sample.id,
                "truncated-answer",
                f"its first {len(expanded.labels)} tokens hold no part of an answer, and the rest is cut off because "
                f"model_max_length is {self.max_length}. Raise model_max_length or shorten the record.",
            )
        self._token_ids.extend(tokens.input_ids)
        self._is_target.extend(label != IGNORE_INDEX for label in tokens.labels)
        self._ends.append(len(self._token_ids))
        self._lengths.append(len(expanded.input_ids))
        self._num_images.append(expanded.num_images_kept)
        self._record_indices.append(sample.index)
        self._sample_ids.append(sample.id)
        self._images.append(sample.images)
        self.num_truncated += expanded.was_truncated
        self.num_supervised += num_supervised

    def __len__(self) -> int:
        return len(self._sample_ids)

    @property
    def lengths(self) -> IntArray:
        return np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)

    @property
    def num_images(self) -> IntArray:
        return np.frombuffer(self._num_images, dtype=np.int32) if self._num_images else np.empty(0, np.int32)
