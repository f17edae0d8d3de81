"""FLOPs of a planned training step: those of the model (`models/flops.py`), and what recomputation adds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_ft.models.flops import Counts, Flops, decoder_forward, model_flops
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.shapes import ParameterShape, PlannedModel
from llava_ft.tuning.recompute import is_cheap

__all__ = ["Counts", "Flops", "StepFlops", "step_flops"]


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of the parts of a micro-batch.

    Attributes:
        forward: The forward pass. The head's backward pass is made in it.
        backward: The backward pass without recomputation.
        recomputed: What gradient checkpointing computes again.
    """

    forward: Flops
    backward: Flops
    recomputed: Flops

    @property
    def model(self) -> Flops:
        """What training needs, however it is done."""
        return self.forward + self.backward

    @property
    def computed(self) -> Flops:
        """What is computed."""
        return self.model + self.recomputed


def step_flops(planned: PlannedModel, shapes: Sequence[ParameterShape], request: PlanRequest) -> StepFlops:
    """Count the FLOPs of the run's model.

    Args:
        planned: The model.
        shapes: Its parameters, adapters included.
        request: The run.
    """
    forward, backward = model_flops(planned.config, shapes, runs_tower=request.tower == "runs")
    return StepFlops(forward, backward, _recomputed(planned, shapes, request))


def _recomputed(planned: PlannedModel, shapes: Sequence[ParameterShape], request: PlanRequest) -> Flops:
    """Count what is computed again: all of a layer, or the products that `selective` does not keep.

    torch stops computing a layer again at the last tensor that its backward pass needs, which may be before its last
    product; that is not taken off.
    """
    wanted, config = request.recomputation, planned.config
    layers = [index for index in range(int(config.num_hidden_layers)) if wanted.includes(index)]
    if wanted.mode != "selective":
        return decoder_forward(config, shapes, layers)
    if keeps_little(request):
        return Flops()
    cheap = [s for s in shapes if s.part == "LoRA" and len(s.shape) == 2 and is_cheap(s.shape[1], s.shape[0])]
    again = decoder_forward(config, cheap, layers)
    return replace(again, per_pair=again.per_pair / 2 if request.attention == "eager" else 0.0)  # of the scores


def keeps_little(request: PlanRequest) -> bool:
    """Whether decoder layers compute by `lora_layer.py`, which recomputes by itself what costs little."""
    lora, quantization = request.lora, request.quantization
    return lora is not None and lora.fast and lora.bias == "none" and (quantization is None or quantization.bits == 4)
