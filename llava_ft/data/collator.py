"""From the items of a data set to one batch: padded, packed, or joined without padding."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from llava_ft.constants import IGNORE_INDEX

Item = Mapping[str, Any]

_VALUES_LOOKED_AT: Final = 64
"""Values of a tile that are hashed before all of them are compared."""


class PaddingCollator:
    """Pads the items of a batch to its longest one, on the right.

    Attention looks back, so no token sees what stands on its right, and padding is no target: training needs no
    attention mask, and without one attention runs in kernels that take none.

    Args:
        pad_token_id: Vocabulary entry in padded positions. It may also occur in the text.
        with_mask: Say which positions are padding all the same, for models that want it.
        length_multiple: Rows are filled up to a multiple of so many positions; 0 leaves them as long as the longest.
    """

    def __init__(self, pad_token_id: int, *, with_mask: bool = False, length_multiple: int = 0):
        self.pad_token_id = pad_token_id
        self.with_mask = with_mask
        self.length_multiple = length_multiple

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Put items of `ConversationDataset` together; at least one.

        Returns:
            `input_ids` `(B, T)` int64, already expanded: each image position holds `IMAGE_TOKEN_INDEX`;
            `labels` `(B, T)` int64, `IGNORE_INDEX` where nothing is learnt; with a mask `attention_mask` `(B, T)`
            bool, False for padding; what `collect` gives.
        """
        lengths = [len(item["input_ids"]) for item in items]
        size = rounded_up(max(lengths), self.length_multiple)
        batch = {
            "input_ids": _pad([item["input_ids"] for item in items], self.pad_token_id, size),
            "labels": _pad([item["labels"] for item in items], IGNORE_INDEX, size),
            **collect(items),
        }
        if self.with_mask:
            batch["attention_mask"] = torch.arange(size)[None, :] < torch.tensor(lengths)[:, None]
        return batch


class PackedCollator:
    """Writes the samples of each row one after the other; attention and positions stay separate.

    What keeps the samples apart is `sample_lengths`, which reach every layer's attention as they are, on the host;
    where rows stay apart, `position_ids`, which restart at 0 with each sample, and the absence of an attention mask.
    The first position of a sample has no label, because what stands before it belongs to another one.

    Args:
        pad_token_id: Vocabulary entry in what is left over of a row, which is kept apart as a sample of its own.
        row_length: Positions to which each row is filled up, the same on every rank; None leaves rows as long as they
            are, which needs `flatten`.
        flatten: Join the rows of a batch to one, for kernels that are told where samples begin. Eager attention
            computes whole rows and masks them: there shorter rows cost less.
        length_multiple: A row joined of rows of different lengths is filled up to a multiple of so many positions; 0
            leaves it as long as they are. What fills it is a sample of its own without targets.

    Raises:
        ValueError: Neither `row_length` nor `flatten` is given.
    """

    def __init__(
        self, pad_token_id: int, *, row_length: int | None = None, flatten: bool = False, length_multiple: int = 0
    ):
        if row_length is None and not flatten:
            raise ValueError("Rows of different lengths do not fit into one tensor. Give a row_length or flatten.")
        self.row_length = row_length
        self.flatten = flatten
        self.length_multiple = length_multiple if row_length is None else 0
        self._pad_samples = PaddingCollator(pad_token_id, length_multiple=length_multiple)

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Put rows of a `RowDataset` together; plain samples, as validation data has them, are padded instead.

        Returns:
            `input_ids`, `labels` and `position_ids`, `(B, T)` int64 or, flattened, `(1, sum of T)`; flattened also
            `sample_lengths`, a list of the positions of each sample, the rest of a row being one more; what `collect`
            gives for the samples of all rows.
        """
        if "samples" not in items[0]:
            return self._pad_samples(items)
        rows: list[Sequence[Item]] = [item["samples"] for item in items]
        total = sum(len(sample["input_ids"]) for row in rows for sample in row)
        filled = [self._row(row, self.row_length) for row in rows]
        if size := rounded_up(total, self.length_multiple) - total:
            filled.append(self._row([], size))
        input_ids, labels, position_ids, lengths = zip(*filled, strict=True)
        joined = {"sample_lengths": [length for row in lengths for length in row]} if self.flatten else {}
        return {
            "input_ids": self._join(input_ids),
            "labels": self._join(labels),
            "position_ids": self._join(position_ids),
            **joined,
            **collect([sample for row in rows for sample in row]),
        }

    def _join(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(rows))[None] if self.flatten else torch.stack(list(rows))

    def _row(
        self, samples: Sequence[Item], size: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
        """Give the ids, labels and positions of one row, each `(T,)`, and the lengths that they are made of."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        used = sum(lengths)
        size = used if size is None else size
        if used > size:
            raise ValueError(f"The samples of a row have {used} tokens, but it has room for {size}.")
        input_ids = torch.full((size,), self._pad_samples.pad_token_id)
        labels = torch.full((size,), IGNORE_INDEX)
        position_ids = torch.arange(size)
        start = 0
        for sample, length in zip(samples, lengths, strict=True):
            input_ids[start : start + length] = sample["input_ids"]
            labels[start + 1 : start + length] = sample["labels"][1:]
            start += length
            position_ids[start:] -= length
        return input_ids, labels, position_ids, lengths + [size - used] * (used < size)


def collect(samples: Sequence[Item]) -> dict[str, Any]:
    """Gather what a batch has beside its tokens, from items of `ConversationDataset` in reading order.

    Returns:
        `pixel_values` `(num_tiles, 3, H, W)` uint8 or float32, or `image_features` `(num_tiles, N, C)` instead, and
        `image_sizes` `(M, 2)` int64 (width, height): of all samples in reading order, each absent when no sample has
        it. Where tiles are equal, `pixel_values` has each once and `tile_index` `(num_tiles,)` int64 says which of
        them each tile is. `sample_indices`, the record of each sample; `num_tokens`, positions that hold one;
        `num_pairs`, pairs of a position and one that it sees; `bad_samples`, one error for each sample that has no
        labels because of it.
    """
    gathered: dict[str, Any] = {}
    for key in ("pixel_values", "image_features", "image_sizes"):  # one entry per tile or image
        if tensors := [sample[key] for sample in samples if key in sample]:
            gathered[key] = torch.cat(tensors)
    if "pixel_values" in gathered:
        gathered["pixel_values"], tile_index = distinct_tiles(gathered["pixel_values"])
        if tile_index is not None:
            gathered["tile_index"] = tile_index
    gathered["sample_indices"] = [int(sample["index"]) for sample in samples]
    lengths = [len(sample["input_ids"]) for sample in samples]
    gathered["num_tokens"] = sum(lengths)
    gathered["num_pairs"] = sum(length * (length + 1) // 2 for length in lengths)
    gathered["bad_samples"] = [sample["bad_sample"] for sample in samples if "bad_sample" in sample]
    return gathered


def distinct_tiles(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Find equal tiles among `(K, 3, H, W)` pixels, so that each is sent to the device and encoded once.

    Records about one picture are common in LLaVA's data, and packing puts up to a dozen records into a row.

    Returns:
        The different ones in the order of their first occurrence, `(L, 3, H, W)`, and which of them each tile is,
        `(K,)` int64. If all are different: the tiles themselves and None.
    """
    rows = tiles.flatten(1)
    probes = rows[:, :: max(1, rows.shape[1] // _VALUES_LOOKED_AT)].contiguous().numpy()
    alike: dict[bytes, list[int]] = {}
    firsts: list[int] = []
    index: list[int] = []
    for number, probe in enumerate(probes):
        candidates = alike.setdefault(probe.tobytes(), [])
        found = next((place for place in candidates if torch.equal(rows[firsts[place]], rows[number])), None)
        if found is None:
            found = len(firsts)
            firsts.append(number)
            candidates.append(found)
        index.append(found)
    if len(firsts) == len(index):
        return tiles, None
    return tiles[firsts], torch.tensor(index)


def rounded_up(length: int, multiple: int) -> int:
    """Return the next multiple of `multiple`, or `length` itself where that is 0."""
    return length if multiple == 0 else -(-length // multiple) * multiple


def _pad(rows: Sequence[torch.Tensor], value: int, size: int) -> torch.Tensor:
    """Write rows one below the other: `(B, size)`, `value` behind each."""
    padded = torch.full((len(rows), size), value, dtype=rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
