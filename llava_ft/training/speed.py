"""How fast a run is, for its log: what it processes per second, the model's FLOP/s, and its waiting for data.

Nothing here waits for the device between two log entries: what is on the device is counted there, and FLOPs are linear
in the counts (`models/flops.py`), so that they are worked out when an entry is written, which waits for the loss.
Time that goes into evaluation and saving is left out.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from llava_ft.checkpoint.restore import whole_shape
from llava_ft.constants import IGNORE_INDEX
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.flops import Counts, Flops, model_flops
from llava_ft.models.parts import part_of
from llava_ft.tuning.quant import size_in_memory

_ONE_PER_IMAGE: Final = ("image_sizes", "pixel_values", "image_features")
"""Where a batch shows how many images it has; without tiles the last two have one entry for each, too."""

_ONE_PER_TILE: Final = ("pixel_values", "image_features")

_SECONDS_TO_MEASURE: Final = 0.2
_SIDE: Final = {"cuda": 8192, "cpu": 768}
"""Rows and columns of the matrices whose product is timed."""


class SpeedMeter:
    """Counts samples, tokens, images, FLOPs, and time waited for data, between two log entries.

    Args:
        flops: Model FLOPs for one of each of `Counts`; None leaves them out.

    Attributes:
        product_rate: FLOP/s of a product of large matrices here; None until it is measured.
    """

    def __init__(self, flops: Flops | None = None):
        self.product_rate: float | None = None
        self._flops = flops
        self._running_since: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._waited = 0.0
        self._supervised: torch.Tensor | int = 0
        self._tokens = self._positions = self._pairs = self._images = self._tiles = self._samples = 0

    def add(self, batch: dict[str, Any], *, num_samples: int, num_tokens: int, num_pairs: int) -> None:
        """Count a batch.

        Args:
            batch: What the model gets.
            num_samples: Samples in it; a packed row has several.
            num_tokens: Positions of it that hold a token of a sample.
            num_pairs: Pairs of a token and one that it sees.
        """
        self._supervised = self._supervised + (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._tokens += num_tokens
        self._pairs += num_pairs
        self._positions += batch["input_ids"].numel()
        self._samples += num_samples
        self._images += next((len(batch[key]) for key in _ONE_PER_IMAGE if key in batch), 0)
        self._tiles += next((len(batch[key]) for key in _ONE_PER_TILE if key in batch), 0)

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Pass batches on, and note how long each was waited for; time runs from the first one on."""
        if self._running_since is None:
            self._running_since = time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Leave out the time of what is done within, but not that of steps that the device still has to finish."""
        if self._running_since is None:
            yield
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += time.perf_counter() - self._running_since
        try:
            yield
        finally:
            self._running_since = time.perf_counter()

    def pop(self, device: torch.device, world_size: int) -> dict[str, float]:
        """Return what was measured on all ranks since the last call, and start anew.

        Returns:
            Per second, over all ranks: `samples_per_second`, `images_per_second` and `tokens_per_second` (real tokens,
            no padding). In all: `supervised_tokens`. `padding` is the share of computed positions that hold no token,
            `data_wait` the share of the time in which ranks waited for data. Of one rank, on average: `model_tflops`,
            10^12 model FLOPs a second, and `mfu`, their share of the rate of a product of matrices.
            `peak_memory_gib` is that of the rank with most, since the run began.
        """
        now = time.perf_counter()
        seconds = max(self._seconds + now - (now if self._running_since is None else self._running_since), 1e-9)
        self._running_since = now
        supervised = float(self._supervised)
        flops = self._flops.of(Counts(self._tokens, supervised, self._pairs, self._tiles)) if self._flops else 0.0
        sums = [self._tokens, supervised, self._positions, self._images, self._samples, flops, self._waited / seconds]
        peak = peak_memory(device)
        if world_size > 1:
            precision = torch.float64 if device.type != "mps" else torch.float32
            totals = torch.tensor([*sums], dtype=precision, device=device)
            highest = torch.tensor(peak, dtype=precision, device=device)
            torch.distributed.all_reduce(totals)
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
            sums, peak = totals.tolist(), highest.item()
        tokens, supervised, positions, images, samples, flops, waited = sums
        self._reset()
        if positions == 0:
            return {}
        entry = {
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(samples / seconds, 3),
            "images_per_second": round(images / seconds, 3),
            "supervised_tokens": supervised,
            "padding": round(1 - tokens / positions, 4),
            "data_wait": round(waited / world_size, 4),
            "peak_memory_gib": round(peak / 2**30, 3),
        }
        if flops:
            rate = flops / seconds / world_size
            entry["model_tflops"] = float(f"{rate / 1e12:.4g}")
            if self.product_rate:
                entry["mfu"] = float(f"{rate / self.product_rate:.4g}")
        return entry


@dataclass(frozen=True)
class _Weight:
    """A parameter of a model that is loaded; see `models.flops.Weight`."""

    name: str
    part: str
    shape: tuple[int, ...]
    numel: int
    is_trained: bool


def flops_of_run(model: nn.Module, config: LlavaModelConfig, *, runs_tower: bool) -> Flops:
    """Count the FLOPs that training this model needs, without recomputation.

    Args:
        model: The model as it is trained: adapters in place, `requires_grad` set, perhaps quantised or divided.
        config: Its configuration.
        runs_tower: Whether it encodes images.
    """
    weights = [
        _Weight(name, part_of(name), whole_shape(p), size_in_memory(p)[0], p.requires_grad)
        for name, p in model.named_parameters()
    ]
    forward, backward = model_flops(config, weights, runs_tower=runs_tower)
    return forward + backward


def measure_product_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measure the FLOP/s of a product of large matrices, in less than a second.

    Args:
        device: Where.
        dtype: In which dtype; float32 as the settings have it, so perhaps in TF32.

    Returns:
        The best of several runs; None if there is no room for the matrices.
    """
    side = _SIDE.get(device.type, _SIDE["cpu"])
    try:
        left, right, out = (torch.empty(side, side, device=device, dtype=dtype) for _ in range(3))
    except torch.OutOfMemoryError:
        return None
    numbers = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    left.normal_(generator=numbers)
    right.normal_(generator=numbers)
    best, deadline = float("inf"), time.perf_counter() + _SECONDS_TO_MEASURE
    torch.mm(left, right, out=out)
    _wait_for(device)
    while best == float("inf") or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had in use at most: what is allocated on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
