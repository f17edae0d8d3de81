"""One training step on tensors without values: what it would take, measured on the model's own code.

The model is built from shapes, its weights are fake tensors, and forward and backward pass run as in training with a
`MemoryTracker` around them. So the memory of activations is that of the code that will run, checkpointing, adapters,
autocast and attention kernels included, and nothing is estimated by formula. Two things that a step reads off its data
are answered from the workload: how many positions are images and how many are supervised.

The trace runs on fake CPU tensors whatever the target is, because a torch without CUDA has no CUDA autograd. Both run
the same operations; where their kernels keep different tensors (dropout's mask) the GPU's are put in.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_ft.geometry import SizeWH
from llava_ft.models.llava import LlavaLlamaForCausalLM
from llava_ft.planning.quantized import replace_kernel
from llava_ft.planning.tracker import MemoryTracker, Peak
from llava_ft.tuning.quant import Quantization, is_quantized
from llava_ft.tuning.recompute import Recomputation, recompute_activations

VISION, FORWARD, LOSS, BACKWARD = "vision tower", "forward", "loss", "backward"
PHASES = (VISION, FORWARD, LOSS, BACKWARD)
ACTIVATIONS, LOGITS, GRADIENTS, COPIES = "activations", "logits", "gradients", "weight copies"

Gradients = Literal["fresh", "accumulated", "handed over"]
"""What becomes of gradients: made anew in each step; there from earlier micro-batches; taken away as soon as made."""

_CUDA_GRANULARITY = 512


@dataclass(frozen=True)
class Batch:
    """The micro-batch of one rank that takes most memory.

    Attributes:
        size: Samples.
        length: Positions of each, padding included.
        num_images: Images of all samples.
        num_supervised: Positions of all samples that have to be predicted.
        is_padded: Whether lengths differ, so that an attention mask is needed.
        image_size_wh: Width and height of each image in pixels; None where they do not matter.
    """

    size: int
    length: int
    num_images: int
    num_supervised: int
    is_padded: bool
    image_size_wh: SizeWH | None = None


@dataclass(frozen=True)
class StepSettings:
    """How a step is run.

    Attributes:
        batch: The micro-batch.
        autocast_dtype: Type of matrix products under autocast; None without.
        recomputation: What the backward pass computes again.
        gradients: What becomes of gradients.
        on_gpu: Whether the kernels are those of a GPU.
        quantization: How the language model's linear layers are held.
        compute_dtype: Type of the vision tower's features.
    """

    batch: Batch
    autocast_dtype: torch.dtype | None
    recomputation: Recomputation
    gradients: Gradients
    on_gpu: bool
    quantization: Quantization | None = None
    compute_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Traced:
    """What a step takes.

    Attributes:
        peaks: For each phase the bytes alive beside the model's weights at its highest point.
        on_host: Bytes of activations that wait in the host's memory.
    """

    peaks: Mapping[str, Peak]
    on_host: int

    @property
    def most(self) -> int:
        """Bytes at the highest point of all."""
        return max(peak.total for peak in self.peaks.values())


def trace_step(model: nn.Module, dtypes: Mapping[str, torch.dtype], settings: StepSettings) -> Traced:
    """Run forward and backward pass without memory.

    Args:
        model: The run's model on the meta device, what is trained marked by `requires_grad`. It is used up.
        dtypes: Type of each parameter by name. Those of quantised weights are not looked at.
        settings: How the step is run.
    """
    native = next(module for module in model.modules() if isinstance(module, LlavaLlamaForCausalLM))
    tracker = _StepTracker(native, settings)
    fake = FakeTensorMode()
    with fake:
        _give_fake_values(model, dtypes, settings)
    tracker.ignore([*model.parameters(), *model.buffers()])
    _watch_phases(native, tracker)
    with fake, tracker:
        _watch_gradients(model, tracker, settings.gradients)
        recompute_activations(
            model, settings.recomputation, options={"preserve_rng_state": False}, offloading=tracker.offloading
        )
        tracker.label = ACTIVATIONS
        model.train()
        inputs = _inputs(settings, native)  # alive to the end of the step, as in the training loop
        with _autocast(settings.autocast_dtype):
            loss = model(**inputs, num_items_in_batch=1).loss
        tracker.phase, tracker.label = BACKWARD, ACTIVATIONS
        loss.backward()
    return Traced({phase: tracker.peaks.get(phase, Peak()) for phase in PHASES}, tracker.on_host)


class _StepTracker(MemoryTracker):
    """Answers what a step reads off its data, and tells logits and copies of weights from activations."""

    def __init__(self, model: LlavaLlamaForCausalLM, settings: StepSettings):
        super().__init__(_CUDA_GRANULARITY if settings.on_gpu else 1)
        self._batch = settings.batch
        geometry = model.config.image_geometry
        num_images = settings.batch.num_images
        self._num_image_positions = 0
        if num_images and geometry is not None:
            self._num_image_positions = num_images * geometry.num_tokens(settings.batch.image_size_wh)
        self._logits_shape = (settings.batch.num_supervised, model.config.vocab_size)
        self._weight_shapes: set[torch.Size] = set()
        self._has_host = settings.on_gpu
        self.on_host = 0

    def offloading(self) -> AbstractContextManager[Any]:
        """The context in which what is saved leaves the device; on a CPU there is nowhere to go."""
        if not self._has_host:
            return contextlib.nullcontext()

        def leave(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
            self.on_host += 1 << (tensor.nbytes - 1).bit_length()  # torch pins powers of two
            return tensor.shape, tensor.dtype

        def come_back(left: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
            return torch.empty(left[0], dtype=left[1])

        return torch.autograd.graph.saved_tensors_hooks(leave, come_back)

    def ignore(self, tensors: Any) -> None:
        tensors = list(tensors)
        self._weight_shapes = {tensor.shape for tensor in tensors if tensor.dim() == 2}
        super().ignore(tensors)

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else self._num_image_positions
        if func is torch.ops.aten.nonzero.default:
            assert args[0].shape == (self._batch.size * self._batch.length,)
            return args[0].new_empty((self._batch.num_supervised, 1), dtype=torch.int64)
        return func(*args, **kwargs)

    def label_of(self, func: Callable[..., Any], args: Sequence[Any], result: torch.Tensor) -> str:
        if tuple(result.shape) == self._logits_shape:
            return LOGITS
        is_weight_like = result.shape in self._weight_shapes
        if is_weight_like and func in (torch.ops.aten._to_copy.default, torch.ops.aten.new_empty.default):
            return COPIES
        if is_weight_like and func is torch.ops.aten.zeros.default:  # the head's, made while its logits are there
            return GRADIENTS
        return self.label


def _give_fake_values(model: nn.Module, dtypes: Mapping[str, torch.dtype], settings: StepSettings) -> None:
    """Replace every parameter and buffer by a fake one; dropout and quantised layers by what the target runs."""
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        if settings.on_gpu and type(module) is nn.Dropout:
            module.__class__ = _FusedDropout
        if is_quantized(module):
            assert settings.quantization is not None
            replace_kernel(module, settings.quantization, on_gpu=settings.on_gpu)
            continue
        prefix = f"{module_name}." if module_name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=dtypes[prefix + leaf])
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _watch_phases(model: LlavaLlamaForCausalLM, tracker: MemoryTracker) -> None:
    def enter(phase: str, label: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            tracker.phase, tracker.label = phase, label

        return hook

    if model.has_vision and model.runs_tower:
        tower = model.model.get_submodule("vision_tower")
        tower.register_forward_pre_hook(enter(VISION, VISION))
        tower.register_forward_hook(enter(FORWARD, ACTIVATIONS))
    model.lm_head.register_forward_pre_hook(enter(LOSS, LOGITS))


def _watch_gradients(model: nn.Module, tracker: MemoryTracker, gradients: Gradients) -> None:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if gradients == "handed over":
            parameter.grad = None
        else:
            tracker.relabel(parameter.grad, GRADIENTS)

    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if gradients == "accumulated":
            parameter.grad = torch.empty_like(parameter)
            tracker.relabel(parameter.grad, GRADIENTS)
        parameter.register_post_accumulate_grad_hook(hook)


def _inputs(settings: StepSettings, model: LlavaLlamaForCausalLM) -> dict[str, Any]:
    batch = settings.batch
    inputs: dict[str, Any] = {
        "input_ids": torch.empty(batch.size, batch.length, dtype=torch.int64),
        "labels": torch.empty(batch.size, batch.length, dtype=torch.int64),
        "attention_mask": torch.empty(batch.size, batch.length, dtype=torch.bool) if batch.is_padded else None,
    }
    geometry = model.config.image_geometry
    if batch.num_images and geometry is not None:
        num_tiles, side = batch.num_images * geometry.num_tiles(batch.image_size_wh), geometry.input_size
        if model.runs_tower:
            inputs["pixel_values"] = torch.empty(num_tiles, 3, side, side)
        else:
            assert model.config.mm_hidden_size is not None
            shape = (num_tiles, geometry.tokens_per_tile, model.config.mm_hidden_size)
            inputs["image_features"] = torch.empty(shape, dtype=settings.compute_dtype)
        inputs["image_sizes"] = [batch.image_size_wh] * batch.num_images
    return inputs


@contextlib.contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype):
        yield


class _FusedDropout(nn.Dropout):
    """Dropout as a GPU runs it: one kernel that keeps a mask of one byte a value."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.p == 0.0 or not self.training:
            return input
        return torch.ops.aten.native_dropout(input, self.p, True)[0]
