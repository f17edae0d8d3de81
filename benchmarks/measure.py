"""Clocks and memory of one process: processor time and resident memory on a CPU, the device's own on a GPU."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import is_trained, preset_config
from workload import Preset, Sample

from llava_ft.models.builder import build_skeleton
from llava_ft.models.flops import Counts, Flops
from llava_ft.models.flops import model_flops as count_flops
from llava_ft.models.parts import part_of
from llava_ft.planning.model import ParameterShape
from llava_ft.tuning.lora import add_lora


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


def matrix_product_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of products of matrices of the model's widths, the best of several runs; on a GPU of several sizes too."""
    is_gpu = device.type == "cuda"
    repeats = 20 if is_gpu else 3
    best = 0.0
    for rows in (4096, 8192, 16384) if is_gpu else (2048,):
        left = torch.randn(rows, width, device=device, dtype=dtype)
        right = torch.randn(width, 4 * width, device=device, dtype=dtype)
        out = torch.empty(rows, 4 * width, device=device, dtype=dtype)
        meter = Meter(device)
        for _ in range(8):
            meter.start()
            for _ in range(repeats):
                torch.mm(left, right, out=out)
            meter.stop()
        best = max(best, 2 * rows * width * 4 * width * repeats / min(meter.seconds[2:]))
    return best


def model_flops(preset: Preset, samples: Sequence[Sample], *, with_tower: bool) -> float:
    """FLOPs that training on these samples needs, whatever a program computes beside it; `llava-ft plan` counts them.

    Matrix products alone: forward and input gradients of frozen layers, and weight gradients of what is trained; causal
    attention, which is half of the pairs; the tower up to the layer that is read; the output layer, and what comes
    behind the last layer's attention, at supervised positions.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    counts = Counts(
        positions=sum(lengths),
        supervised=sum(int((sample.labels[1:] >= 0).sum()) for sample in samples),
        pairs=sum(length * (length + 1) // 2 for length in lengths),
        tiles=sum(sample.has_image for sample in samples),
    )
    return flops_of(preset, with_tower=with_tower).of(counts)


def flops_of(preset: Preset, *, with_tower: bool) -> Flops:
    """FLOPs of the preset's model for one of each of `Counts`."""
    model: torch.nn.Module = build_skeleton(preset_config(preset))
    if preset.lora_r:
        with torch.device("meta"):
            model = add_lora(model, r=preset.lora_r, alpha=preset.lora_alpha, dropout=0.0)
    weights = [
        ParameterShape(name, part_of(name), tuple(values.shape), is_trained(name, preset), preset.dtype)
        for name, values in model.named_parameters()
    ]
    forward, backward = count_flops(preset_config(preset), weights, runs_tower=with_tower)
    return forward + backward
