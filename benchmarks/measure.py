"""Clocks and memory of one process: processor time and resident memory on a CPU, the device's own on a GPU."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Meter:
    """Times steps and follows memory, from its making on.

    Attributes:
        device: Where the steps run.
        seconds: Time of each step: CPU seconds of this process, or seconds on the clock with a GPU.
    """

    device: torch.device
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._at_start = _resident()
        self._last = 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def start(self) -> None:
        """Begin a step."""
        self._last = self._now()

    def stop(self) -> None:
        """End a step."""
        self.seconds.append(self._now() - self._last)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def peak_bytes(self) -> int:
        """Most memory in use since the meter was made, beyond what was in use then."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._at_start


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def matrix_product_rate(device: torch.device, dtype: torch.dtype, width: int, rows: int = 2048) -> float:
    """FLOP/s of a product of matrices of the model's size, the best of several runs."""
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(width, 4 * width, device=device, dtype=dtype)
    out = torch.empty(rows, 4 * width, device=device, dtype=dtype)
    repeats = 20 if device.type == "cuda" else 3
    meter = Meter(device)
    for _ in range(8):
        meter.start()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        meter.stop()
    return 2 * rows * width * 4 * width * repeats / min(meter.seconds[2:])


def model_flops(preset: Any, samples: Sequence[Any], *, with_tower: bool) -> float:
    """FLOPs that training on these samples needs, whatever a program computes beside it.

    Matrix products alone: forward and input gradients of frozen layers, and weight gradients of adapters and projector;
    causal attention, which is half of the pairs; the tower up to the layer before the last; the output layer at
    supervised positions.
    """
    language, vision = preset.language, preset.vision
    width, inner, layers = language["hidden_size"], language["intermediate_size"], language["num_hidden_layers"]
    frozen = layers * (4 * width * width + 3 * width * inner)
    adapters = layers * preset.lora_r * (4 * 2 * width + 3 * (width + inner))
    v_width, v_layers = vision["hidden_size"], vision["num_hidden_layers"] - 1
    v_tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    tower = v_layers * (4 * v_width**2 + 2 * v_width * vision["intermediate_size"])
    projector = v_width * width + width * width
    flops = 0.0
    for sample in samples:
        tokens, supervised = len(sample.input_ids), int((sample.labels[1:] >= 0).sum())
        flops += tokens * (4 * frozen + 6 * adapters) + supervised * 4 * width * language["vocab_size"]
        flops += layers * 12 * tokens * tokens * width / 2  # two products forward, four backward
        if sample.has_image:
            flops += 6 * (v_tokens - 1) * projector
            if with_tower:
                flops += 2 * v_tokens * tower + v_layers * 4 * v_tokens * v_tokens * v_width
    return flops


def median_per_step(seconds: Sequence[float]) -> float:
    """The median time of a step."""
    return statistics.median(seconds)


def run_steps(meter: Meter, steps: Sequence[Callable[[], None]]) -> None:
    """Run steps, each timed."""
    for step in steps:
        meter.start()
        step()
        meter.stop()
