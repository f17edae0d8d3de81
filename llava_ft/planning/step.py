"""One training step on tensors without values: what it would take, measured on the model's own code.

The model is built from shapes, its weights are fake tensors, and forward and backward pass run as in training with a
`MemoryTracker` around them. So the memory of activations is that of the code that will run, checkpointing, adapters,
autocast and attention kernels included, and nothing is estimated by formula.

Whatever is no floating-point number keeps its values: ids, labels and masks are those of a batch that is made up, and
what is computed from them alone (where the images are, which positions are supervised, where samples end) is computed.

The trace runs on fake CPU tensors whatever the target is, because a torch without CUDA has no CUDA autograd. Both run
the same operations; where their kernels keep different tensors (dropout's mask) the GPU's are put in.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.geometry import SizeWH
from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.planning.quantized import replace_kernel
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.tracker import MemoryTracker
from llava_ft.tuning.quant import is_quantized
from llava_ft.tuning.recompute import recompute_activations

VISION, FORWARD, LOSS, BACKWARD = "vision tower", "forward", "loss", "backward"
PHASES = (VISION, FORWARD, LOSS, BACKWARD)
ACTIVATIONS, LOGITS, GRADIENTS, COPIES = "activations", "logits", "gradients", "weight copies"

Gradients = Literal["fresh", "accumulated", "handed over"]
"""What becomes of gradients: made anew in each step; there from earlier micro-batches; taken away as soon as made."""

_CUDA_GRANULARITY = 512


@dataclass(frozen=True)
class Batch:
    """The micro-batch of one rank that takes most memory."""

    size: int  # samples
    length: int  # positions of each, padding included
    num_images: int  # of all samples
    num_supervised: int  # positions of all samples that have to be predicted
    is_padded: bool  # whether lengths differ, so that an attention mask is needed
    image_size_wh: SizeWH | None = None  # of each image, in pixels; None where it does not matter

    def inputs(self, config: LlavaModelConfig, *, feature_dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Make a batch up for the model's `forward`: images come first, what is supervised last.

        With a `feature_dtype` features of that type stand in for pixels.
        """
        geometry, (num_rows, length) = config.image_geometry, (self.size, self.length)
        ids = torch.zeros(num_rows * length, dtype=torch.int64)
        labels = torch.full((num_rows, length), IGNORE_INDEX)
        for row in range(num_rows):
            count = self.num_supervised // num_rows + (row < self.num_supervised % num_rows)
            labels[row, length - count :] = 0
        mask = None
        if self.is_padded:
            mask = torch.ones(num_rows, length, dtype=torch.bool)
            mask[-1, -1] = False
        inputs: dict[str, Any] = {"input_ids": ids.view(num_rows, length), "labels": labels, "attention_mask": mask}
        if not self.num_images or geometry is None:
            return inputs
        ids[: self.num_images * geometry.num_tokens(self.image_size_wh)] = IMAGE_TOKEN_INDEX
        num_tiles = self.num_images * geometry.num_tiles(self.image_size_wh)
        inputs["image_sizes"] = [self.image_size_wh] * self.num_images
        if feature_dtype is None:
            return inputs | {"pixel_values": torch.empty(num_tiles, 3, geometry.input_size, geometry.input_size)}
        assert config.mm_hidden_size is not None
        shape = (num_tiles, geometry.features_per_tile, config.mm_hidden_size)
        return inputs | {"image_features": torch.empty(shape, dtype=feature_dtype)}


@dataclass(frozen=True)
class StepTrace:
    """What a step takes beside the model's weights, in bytes."""

    peaks: Mapping[str, Mapping[str, int]]  # by phase what is alive at its highest point, by label
    on_host: int  # activations that wait in the host's memory


def trace_step(model: nn.Module, request: PlanRequest, batch: Batch, gradients: Gradients) -> StepTrace:
    """Run forward and backward pass without memory; a model that `build_model` made is used up."""
    native = next(module for module in model.modules() if isinstance(module, LlavaForCausalLM))
    tracker = _StepTracker(on_gpu=request.on_gpu, logits_shape=(batch.num_supervised, native.config.vocab_size))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        _give_fake_values(model, request)
    tracker.ignore_weights([*model.parameters(), *model.buffers()])
    _watch_phases(native, tracker)
    with fake, tracker:
        _watch_gradients(model, tracker, gradients)
        recompute_activations(
            model, request.recomputation, options={"preserve_rng_state": False}, offloading=tracker.offloading
        )
        model.train()
        # Alive to the end of the step, as in the training loop.
        inputs = batch.inputs(native.config, feature_dtype=None if native.runs_tower else request.compute_dtype)
        with autocast(request):
            loss = model(**inputs, num_items_in_batch=1).loss
        tracker.phase, tracker.label = BACKWARD, ACTIVATIONS
        loss.backward()
    return StepTrace({phase: tracker.peaks[phase] for phase in PHASES if phase in tracker.peaks}, tracker.on_host)


def autocast(request: PlanRequest) -> AbstractContextManager[Any]:
    """The context in which a run computes its forward pass, on a CPU. DeepSpeed converts the model instead."""
    if request.zero is not None or request.compute_dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", request.compute_dtype)


class _StepTracker(MemoryTracker):
    """Computes what has values, and tells logits and copies of weights from activations."""

    def __init__(self, *, on_gpu: bool, logits_shape: tuple[int, int]):
        super().__init__(_CUDA_GRANULARITY if on_gpu else 1)
        self.label = ACTIVATIONS
        self.on_host = 0
        self._logits_shape = logits_shape
        self._weight_shapes: set[torch.Size] = set()
        self._has_host = on_gpu

    def ignore_weights(self, tensors: Sequence[torch.Tensor]) -> None:
        """Count the model's weights as nothing, and know copies of them by their shape."""
        self._weight_shapes = {tensor.shape for tensor in tensors if tensor.dim() == 2}
        self.ignore(tensors)

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

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        if given and any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*args, **kwargs)
        if not given:
            result = func(*args, **kwargs)
            is_empty = func is torch.ops.aten.empty.memory_format  # no values yet: dropout draws its mask into one
            if is_empty or (isinstance(result, torch.Tensor) and result.is_floating_point()):
                return result
        with unset_fake_temporarily():  # whole numbers and truth values, or what is computed from them alone
            return func(*args, **kwargs)

    def label_of(self, func: Callable[..., Any], result: torch.Tensor) -> str:
        if tuple(result.shape) == self._logits_shape:
            return LOGITS
        is_weight_like = result.shape in self._weight_shapes
        if is_weight_like and func in (torch.ops.aten._to_copy.default, torch.ops.aten.new_empty.default):
            return COPIES
        if is_weight_like and func is torch.ops.aten.zeros.default:  # the head's, made while its logits are there
            return GRADIENTS
        return self.label


def _give_fake_values(model: nn.Module, request: PlanRequest) -> None:
    """Replace every parameter and buffer by a fake one; dropout and quantised layers by what the target runs."""
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        if request.on_gpu and type(module) is nn.Dropout:
            module.__class__ = _FusedDropout
        if is_quantized(module):
            assert request.quantization is not None
            replace_kernel(module, request.quantization, on_gpu=request.on_gpu)
            continue
        prefix = f"{module_name}." if module_name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=request.dtype_of(prefix + leaf))
                made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _watch_phases(model: LlavaForCausalLM, tracker: MemoryTracker) -> None:
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


class _FusedDropout(nn.Dropout):
    """Dropout as a GPU runs it: one kernel that keeps a mask of one byte a value."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.p == 0.0 or not self.training:
            return input
        return torch.ops.aten.native_dropout(input, self.p, True)[0]
