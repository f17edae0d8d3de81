"""The data set of a run: records that were checked, tokenised and measured before the first step.

Lengths are exact before any image is decoded. Images are decoded when an item is asked for; one that has
become unreadable by then never stops the run: its sample keeps its length and loses its labels.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.image_reader import ImageRef, ReadsImages
from llava_ft.data.preparation.samples import Samples
from llava_ft.data.preparation.tokenized_rows import Array
from llava_ft.errors import BadSampleError, ImageError


class JoinedSamples:
    """The usable samples of several sources, one source after the other.

    Attributes:
        lengths: `(S,)` int32, tokens of each sample after expansion and truncation.
        num_supervised: `(S,)` int32, how many of these have to be predicted.
        num_images: `(S,)` int32, images of each sample that truncation leaves.
        firsts: Where the samples of each source begin.
        first_records: Where the records of each source begin, unusable ones counted.
    """

    def __init__(self, parts: Sequence[Samples], names: Sequence[str]):
        self.parts = tuple(parts)
        self.names = tuple(names)
        self.lengths: Array = np.concatenate([part.lengths for part in parts])
        self.num_supervised: Array = np.concatenate([part.num_supervised for part in parts])
        self.num_images: Array = np.concatenate([part.num_images for part in parts])
        self.firsts: Array = _firsts([len(part) for part in parts])
        self.first_records: Array = _firsts([len(part.rows) for part in parts])

    def __len__(self) -> int:
        return len(self.lengths)

    def find(self, sample: int) -> tuple[int, int]:
        """Give the source of a sample and its row among the samples of that source."""
        source = int(np.searchsorted(self.firsts, sample, side="right")) - 1
        return source, sample - int(self.firsts[source])

    def describe(self, index: int) -> str:
        """Name the record at a position among the records of all sources."""
        source = int(np.searchsorted(self.first_records, index, side="right")) - 1
        record = index - int(self.first_records[source])
        sample_id = self.parts[source].rows.sample_id(record)
        name = f"{record} (id {sample_id!r})" if sample_id else str(record)
        return f"{name} of {self.names[source]}" if len(self.parts) > 1 else name

    def bad_sample(self, sample: int, kind: str, reason: str) -> BadSampleError:
        """Make the error that says why a sample cannot be used."""
        source, row = self.find(sample)
        part, where = self.parts[source], f" (record of {self.names[source]})" if len(self.parts) > 1 else ""
        record = int(part.record_indices[row])
        return BadSampleError(record, part.rows.sample_id(record), kind, reason + where)


def _firsts(counts: Sequence[int]) -> Array:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)))[:-1]


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations about images as tensors.

    Args:
        image_reader: Gives the entries of an item that stand for its images, usually an `ImageReader`; None when no
            sample has images.
        rows: Which of the samples belong to this data set, in order, some perhaps several times; None means all.
    """

    def __init__(
        self,
        samples: JoinedSamples,
        *,
        image_reader: ReadsImages | None = None,
        rows: Sequence[int] | Array | None = None,
    ):
        self.samples = samples
        self.image_reader = image_reader
        self.rows: Array = np.arange(len(samples)) if rows is None else np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample after expansion and truncation."""
        return self.samples.lengths[self.rows].tolist()

    @property
    def modality_lengths(self) -> list[int]:
        """Tokens of each sample, negative for a sample without images."""
        lengths, num_images = self.samples.lengths[self.rows], self.samples.num_images[self.rows]
        return np.where(num_images > 0, lengths, -lengths).tolist()

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Give one sample.

        Returns:
            `input_ids` `(T,)` int64, expanded: each image position holds `IMAGE_TOKEN_INDEX`; `labels`
            `(T,)` int64; `index`, the position of the record in the whole data set, which `describe` names; for a
            sample with images what the image reader gives, usually `pixel_values` `(num_tiles, 3, H, W)` uint8 and,
            where sizes matter, `image_sizes` `(M, 2)` int64. If an image cannot be read, `labels` are all
            `IGNORE_INDEX`, `pixel_values` zeros, and `bad_sample` is the `BadSampleError` that says why.
        """
        sample = int(self.rows[position])
        source, row = self.samples.find(sample)
        input_ids, labels = self.samples.parts[source].arrays(row)
        item: dict[str, Any] = {
            "input_ids": torch.as_tensor(input_ids),
            "labels": torch.as_tensor(labels),
            "index": int(self.samples.first_records[source] + self.samples.parts[source].record_indices[row]),
        }
        images = self.image_refs(position)
        if not images:
            return item
        assert self.image_reader is not None, "a sample with images needs an image reader"
        try:
            item.update(self.image_reader.read(images))
        except ImageError as error:
            item["labels"].fill_(IGNORE_INDEX)
            item.update(self.image_reader.blank(images))
            item["bad_sample"] = self.samples.bad_sample(sample, error.kind, str(error))
        return item

    def image_refs(self, position: int) -> list[ImageRef]:
        """Name the images of one sample that truncation leaves, in reading order."""
        source, row = self.samples.find(int(self.rows[position]))
        part = self.samples.parts[source]
        if part.num_images[row] == 0:
            return []
        sizes = part.image_sizes(row) or repeat(None)
        return [ImageRef(image, source, size_wh) for image, size_wh in zip(part.images(row), sizes, strict=False)]

    def subset(self, positions: Sequence[int] | Array) -> "ConversationDataset":
        """Give a data set of some of the samples, sharing everything with this one."""
        rows = self.rows[np.asarray(positions, dtype=np.int64)]
        return ConversationDataset(self.samples, image_reader=self.image_reader, rows=rows)

    def describe(self, index: int) -> str:
        """Name a record for messages, by an item's `index`: its position in its source, its id, and the source."""
        return self.samples.describe(index)
