"""Tokenised samples in a few flat arrays: some 5 bytes a token, shared by all data-loading workers.

Python lists of numbers would take ten times as much, and forked workers would copy them page by page. Strings
are packed too: one that stays alive keeps the memory of the whole record around it from being given back.
"""

import logging
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

import numpy as np

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.schema import Sample
from llava_ft.data.tokenize import ExpandedSample, TokenizedSample, expand_and_truncate
from llava_ft.errors import BadSampleError

logger = logging.getLogger(__name__)

_SAMPLES_PER_NOTE: Final = 50_000

Array = np.ndarray[Any, np.dtype[Any]]


class PackedStrings(Sequence[str]):
    """A list of strings in two flat arrays."""

    def __init__(self, strings: Iterable[str] = ()):
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        """Add a string at the end."""
        self._bytes += string.encode()
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return self._bytes[self._ends[position] : self._ends[position + 1]].decode()


@dataclass(frozen=True, slots=True)
class PreparedSamples:
    """Samples after tokenisation, with their exact lengths; images are still paths.

    Attributes:
        tokens_per_image: Positions that one image takes.
        max_length: Tokens after which a sample is cut off.
        token_ids: `(N,)` int32, the ids of all samples in a row, one `IMAGE_TOKEN_INDEX` per image.
        is_target: `(N,)` bool, whether the token is supervised.
        ends: `(S + 1,)` int64, where each sample starts and ends in `token_ids`.
        lengths: `(S,)` int32, tokens of each sample after expansion and truncation.
        num_supervised: `(S,)` int32, how many of these tokens have to be predicted.
        num_images: `(S,)` int32, images of each sample that truncation leaves.
        was_truncated: `(S,)` bool.
        record_indices: `(S,)` int64, position of each sample's record in its file, ascending.
        sample_ids: The records' own ids, "" where there is none.
        image_paths: Paths as written in the records, all samples in a row.
        image_ends: `(S + 1,)` int64, where the paths of each sample start and end in `image_paths`.
    """

    tokens_per_image: int
    max_length: int
    token_ids: Array
    is_target: Array
    ends: Array
    lengths: Array
    num_supervised: Array
    num_images: Array
    was_truncated: Array
    record_indices: Array
    sample_ids: PackedStrings
    image_paths: PackedStrings
    image_ends: Array

    def __len__(self) -> int:
        return len(self.sample_ids)

    def expanded(self, row: int) -> ExpandedSample:
        """Give one sample as the model sees it."""
        span = slice(int(self.ends[row]), int(self.ends[row + 1]))
        ids = self.token_ids[span]
        tokens = TokenizedSample(
            input_ids=ids.tolist(),
            labels=np.where(self.is_target[span], ids, IGNORE_INDEX).tolist(),
            num_images=int(self.image_ends[row + 1] - self.image_ends[row]),
        )
        return _expand(tokens, self.tokens_per_image, self.max_length)

    def images(self, row: int) -> list[str]:
        """Give the paths of the images of one sample, as written in its record."""
        return self.image_paths[int(self.image_ends[row]) : int(self.image_ends[row + 1])]

    def bad_sample(self, row: int, kind: str, reason: str) -> BadSampleError:
        """Make the error that says why a sample cannot be used."""
        return BadSampleError(int(self.record_indices[row]), self.sample_ids[row], kind, reason)


def prepare_samples(
    samples: Iterable[Sample],
    tokenize: Callable[[Sample], TokenizedSample],
    *,
    tokens_per_image: int,
    max_length: int,
) -> tuple[PreparedSamples, list[BadSampleError]]:
    """Tokenise samples and measure them; no image is opened.

    Args:
        samples: In the order of their records. They are not kept, so they can come from a generator.
        tokenize: Usually a `SampleTokenizer`.
        tokens_per_image: Positions that one image takes.
        max_length: Tokens after which a sample is cut off.

    Returns:
        The samples that can be used, and an error for each that cannot.
    """
    token_ids, is_target, ends = array("i"), bytearray(), array("q", [0])
    columns = {name: array("q") for name in ("lengths", "num_supervised", "num_images", "truncated", "records")}
    sample_ids, image_paths, image_ends = PackedStrings(), PackedStrings(), array("q", [0])
    errors: list[BadSampleError] = []
    for sample in samples:
        try:
            tokens = tokenize(sample)
            expanded, num_supervised = expand_checked(sample, tokens, tokens_per_image, max_length)
        except BadSampleError as error:
            errors.append(error)
            continue
        token_ids.extend(tokens.input_ids)
        is_target.extend(label != IGNORE_INDEX for label in tokens.labels)
        ends.append(len(token_ids))
        columns["lengths"].append(len(expanded.input_ids))
        columns["num_supervised"].append(num_supervised)
        columns["num_images"].append(expanded.num_images_kept)
        columns["truncated"].append(expanded.was_truncated)
        columns["records"].append(sample.index)
        sample_ids.append(sample.id)
        for image in sample.images:
            image_paths.append(image)
        image_ends.append(len(image_paths))
        if len(sample_ids) % _SAMPLES_PER_NOTE == 0:
            logger.info("Tokenised %d samples.", len(sample_ids))
    prepared = PreparedSamples(
        tokens_per_image=tokens_per_image,
        max_length=max_length,
        token_ids=np.asarray(token_ids),
        is_target=np.asarray(is_target).view(np.bool_),
        ends=np.array(ends, dtype=np.int64),
        lengths=np.array(columns["lengths"], dtype=np.int32),
        num_supervised=np.array(columns["num_supervised"], dtype=np.int32),
        num_images=np.array(columns["num_images"], dtype=np.int32),
        was_truncated=np.array(columns["truncated"], dtype=np.bool_),
        record_indices=np.array(columns["records"], dtype=np.int64),
        sample_ids=sample_ids,
        image_paths=image_paths,
        image_ends=np.array(image_ends, dtype=np.int64),
    )
    return prepared, errors


def _expand(tokens: TokenizedSample, tokens_per_image: int, max_length: int) -> ExpandedSample:
    return expand_and_truncate(tokens, [tokens_per_image] * tokens.num_images, max_length)


def expand_checked(
    sample: Sample, tokens: TokenizedSample, tokens_per_image: int, max_length: int
) -> tuple[ExpandedSample, int]:
    """Expand and truncate one sample, and count the tokens that have to be predicted.

    The first position is not counted: it has nothing to be predicted from.

    Raises:
        BadSampleError: There is no such token, because of truncation ("truncated-answer") or in the first
            place ("no-supervised-token").
    """
    expanded = _expand(tokens, tokens_per_image, max_length)
    num_tokens = len(expanded.labels)
    num_supervised = max(0, num_tokens - 1) - expanded.labels[1:].count(IGNORE_INDEX)
    if num_supervised:
        return expanded, num_supervised
    if expanded.was_truncated:
        raise BadSampleError(
            sample.index,
            sample.id,
            "truncated-answer",
            f"the {num_tokens} tokens that model_max_length = {max_length} leaves hold no part of an answer. "
            "Raise model_max_length, shorten the record or pass --on_bad_sample skip.",
        )
    raise BadSampleError(
        sample.index,
        sample.id,
        "no-supervised-token",
        "no token of it is supervised, so there is nothing to learn. Fix the record or pass --on_bad_sample skip.",
    )
