"""From the items of a data set to one padded batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llava_ft.constants import IGNORE_INDEX
from llava_ft.errors import BadSampleError


class PaddingCollator:
    """Pads the items of a batch to its longest one, on the right.

    Args:
        pad_token_id: Vocabulary entry in padded positions. The attention mask comes from the lengths, so the
            entry may also occur in the text.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Put items of `ConversationDataset` together.

        Args:
            items: At least one item.

        Returns:
            `input_ids` `(B, T)` int64, already expanded: each image position holds `IMAGE_TOKEN_INDEX`;
            `labels` `(B, T)` int64, `IGNORE_INDEX` where nothing is learnt; `attention_mask` `(B, T)`
            bool, False for padding; `pixel_values` `(M, 3, H, W)` float32, the images of all items in
            reading order, absent when M is 0; `sample_indices`, the record of each row; `bad_samples`,
            one error for each row that has no labels because of it.
        """
        pixel_values = [item["pixel_values"] for item in items if "pixel_values" in item]
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        bad_samples: list[BadSampleError] = [item["bad_sample"] for item in items if "bad_sample" in item]
        batch: dict[str, Any] = {
            "input_ids": _pad([item["input_ids"] for item in items], self.pad_token_id),
            "labels": _pad([item["labels"] for item in items], IGNORE_INDEX),
            "attention_mask": torch.arange(int(lengths.max()))[None, :] < lengths[:, None],
            "sample_indices": [int(item["index"]) for item in items],
            "bad_samples": bad_samples,
        }
        if pixel_values:
            batch["pixel_values"] = torch.cat(pixel_values)
        return batch


def _pad(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
