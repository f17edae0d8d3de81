"""The run's model without a weight: built from shapes, and what its parts hold."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from llava_ft.models.builder import build_skeleton
from llava_ft.models.parts import part_of
from llava_ft.planning.quantized import stored_bytes
from llava_ft.planning.request import PlanRequest
from llava_ft.resolve import RunModel
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.quant import is_quantized, quantize_linears


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of the run's model."""

    name: str
    part: str  # of the model
    shape: tuple[int, ...]  # of the values it stands for
    is_trained: bool
    dtype: torch.dtype  # in memory without DeepSpeed; of quantised weights the compute dtype
    packed_bytes: int | None = None  # of a quantised weight, scales included

    @property
    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()


def build_model(run: RunModel, request: PlanRequest) -> nn.Module:
    """Build the run's model on the meta device, as training builds it, with what is trained marked."""
    config = copy.deepcopy(run.config)
    config.vocab_size += run.num_added_by_flags
    model = build_skeleton(config, attn_implementation="eager" if request.attention == "eager" else "sdpa")
    if model.has_vision:
        model.runs_tower = request.tower == "runs"
        if request.tower == "absent":
            del model.model.vision_tower
    if request.quantization is not None:
        quantize_linears(model, request.quantization, lambda _: request.compute_dtype)
    request.tuning.separate_new_rows(model, run.num_added_by_flags)
    result: nn.Module = model
    if request.lora is not None:
        with torch.device("meta"):
            result = add_lora(model, **asdict(request.lora), layers=request.tuning.of("model.layers").layers)
    request.tuning.apply(result)
    model.config.use_cache = False
    return result


def parameter_shapes(model: nn.Module, request: PlanRequest) -> list[ParameterShape]:
    """List the parameters of a model that `build_model` made."""
    packed = {
        module.weight: stored_bytes(module.out_features, module.in_features, request.quantization)
        for module in model.modules()
        if request.quantization is not None and isinstance(module, nn.Linear) and is_quantized(module)
    }
    return [
        ParameterShape(
            name=name,
            part=part_of(name),
            shape=tuple(parameter.shape),
            is_trained=parameter.requires_grad,
            dtype=request.tuning.dtype_of(name, request.compute_dtype),
            packed_bytes=packed.get(parameter),
        )
        for name, parameter in model.named_parameters()
    ]


def num_values(shapes: Sequence[ParameterShape]) -> int:
    """Number of values of all these parameters."""
    return sum(shape.numel for shape in shapes)


def largest(shapes: Sequence[ParameterShape]) -> int:
    """Number of values of the largest parameter; 0 without any."""
    return max((shape.numel for shape in shapes), default=0)
