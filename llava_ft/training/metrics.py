"""Counting what a run processes, for the rates in its log."""

import time
from typing import Any

import torch

from llava_ft.constants import IGNORE_INDEX

_ONE_PER_IMAGE = ("image_sizes", "pixel_values", "image_features")
"""Where a batch shows how many images it has; without tiles the last two have one entry for each, too."""


class Throughput:
    """Counts samples, tokens, supervised tokens and images between two log entries.

    Counts stay on the device until they are asked for, so that counting never waits for it.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._supervised: torch.Tensor | int = 0
        self._tokens = 0
        self._positions = 0
        self._images = 0
        self._samples = 0

    def add(self, batch: dict[str, Any], *, num_samples: int, num_tokens: int) -> None:
        """Count a batch.

        Args:
            batch: What the model gets.
            num_samples: Samples in it; a packed row has several.
            num_tokens: Positions of it that hold a token of a sample.
        """
        self._supervised = self._supervised + (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._tokens += num_tokens
        self._positions += batch["input_ids"].numel()
        self._samples += num_samples
        self._images += next((len(batch[key]) for key in _ONE_PER_IMAGE if key in batch), 0)

    def pop(self, device: torch.device, world_size: int) -> dict[str, float]:
        """Return rates over all ranks since the last call, and start anew.

        Returns:
            Per second: `samples_per_second`, `images_per_second` and `tokens_per_second` (real tokens, no padding).
            In all: `supervised_tokens`. `padding` is the share of computed positions that hold no token.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        counts = torch.tensor(
            [self._tokens, float(self._supervised), self._positions, self._images, self._samples],
            dtype=torch.float64 if device.type != "mps" else torch.float32,
            device=device,
        )
        if world_size > 1:
            torch.distributed.all_reduce(counts)
        tokens, supervised, positions, images, samples = counts.tolist()
        self.__init__()
        if positions == 0:
            return {}
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 3),
            "images_per_second": round(images / seconds, 3),
            "supervised_tokens": supervised,
            "padding": round(1 - tokens / positions, 4),
        }
