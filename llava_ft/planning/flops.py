"""FLOPs of a planned training step: those of the model (`models/flops.py`), and what recomputation adds."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_ft.models.flops import Counts, Flops, decoder_forward, model_flops
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.shapes import ParameterShape, PlannedModel

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
    recomputed = decoder_forward(planned.config, shapes) if request.gradient_checkpointing else Flops()
    return StepFlops(forward, backward, recomputed)
