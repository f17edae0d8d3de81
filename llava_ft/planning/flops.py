"""FLOPs of a training step, from the shapes of the run's model: matrix products alone, two for each multiply and add.

A step's work is linear in a few counts: positions, supervised positions, pairs of positions that attention looks at,
and tiles that the vision tower sees. A linear layer with n weights takes 2n a position forward, 2n for the gradient of
its input where something before it is trained, and 2n for the gradient of its weights where they are trained. Scores
and values of attention take 4 times the width for each pair forward, and twice that backward.

The head and, in the last layer, what comes after its attention run at supervised positions alone; the tower runs
forward, up to the layer that is read. Norms, softmax and other elementwise work are not counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from llava_ft.planning.request import PlanRequest
from llava_ft.planning.shapes import ParameterShape, PlannedModel

_LAYER: Final = re.compile(r"layers\.(\d+)\.")
_BEHIND_ATTENTION: Final = ("o_proj", "gate_proj", "up_proj", "down_proj")
_IN_FRONT_OF_ATTENTION: Final = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Counts:
    """What a micro-batch holds; each a number or an array of them, one for each micro-batch.

    Attributes:
        positions: Positions of the language model.
        supervised: Positions with a target.
        pairs: Pairs of positions that attention looks at: with causal attention L (L + 1) / 2 for a row of L.
        tiles: Tiles of its images.
    """

    positions: Any
    supervised: Any
    pairs: Any
    tiles: Any


@dataclass(frozen=True)
class Flops:
    """FLOPs for one of each of `Counts`."""

    per_position: float = 0.0
    per_supervised: float = 0.0
    per_pair: float = 0.0
    per_tile: float = 0.0

    def of(self, counts: Counts) -> Any:
        """FLOPs of a micro-batch, or of each."""
        return (
            self.per_position * counts.positions
            + self.per_supervised * counts.supervised
            + self.per_pair * counts.pairs
            + self.per_tile * counts.tiles
        )

    def __add__(self, other: "Flops") -> "Flops":
        """Add coefficient by coefficient."""
        return Flops(
            self.per_position + other.per_position,
            self.per_supervised + other.per_supervised,
            self.per_pair + other.per_pair,
            self.per_tile + other.per_tile,
        )


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
    layers, recomputed = _decoder(planned, shapes, request)
    head = _head(shapes)
    tower, projector = _vision(planned, shapes, request)
    return StepFlops(
        forward=layers[0] + head + tower + projector[0],
        backward=layers[1] + projector[1],
        recomputed=recomputed if request.gradient_checkpointing else Flops(),
    )


def _decoder(
    planned: PlannedModel, shapes: Sequence[ParameterShape], request: PlanRequest
) -> tuple[tuple[Flops, Flops], Flops]:
    config = planned.config
    num_layers = int(config.num_hidden_layers)
    last = f"layers.{num_layers - 1}."
    is_fed = any(s.is_trained for s in shapes if s.part in ("embeddings", "projector", "image newline")) or any(
        s.is_trained and s.part == "new token rows" and "lm_head" not in s.name for s in shapes
    )
    forward, backward, again = Flops(), Flops(), Flops()
    for shape in shapes:
        if len(shape.shape) != 2 or not _LAYER.search(shape.name) or shape.part not in ("language model", "LoRA"):
            continue
        is_selective = last in shape.name and any(leaf in shape.name for leaf in _BEHIND_ATTENTION)
        is_first = "layers.0." in shape.name and any(leaf in shape.name for leaf in _IN_FRONT_OF_ATTENTION)
        needs_input_gradient = "lora_B" in shape.name or is_fed or not is_first
        products = int(needs_input_gradient) + int(shape.is_trained)
        forward += _linear(shape.numel, 1, is_selective)
        backward += _linear(shape.numel, products, is_selective)
        again += _linear(shape.numel, 1, is_selective)
    width = int(config.num_attention_heads) * int(getattr(config, "head_dim", None) or _head_width(config))
    attention = Flops(per_pair=4.0 * width * num_layers)
    trains_anything = any(shape.is_trained for shape in shapes)
    backward_attention = Flops(per_pair=2 * attention.per_pair if trains_anything else 0.0)
    return (forward + attention, backward + backward_attention), again + attention


def _head_width(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


def _linear(numel: int, products: int, is_selective: bool) -> Flops:
    flops = 2.0 * numel * products
    return Flops(per_supervised=flops) if is_selective else Flops(per_position=flops)


def _head(shapes: Sequence[ParameterShape]) -> Flops:
    matrices = [shape for shape in shapes if shape.part == "head"]
    if not matrices:  # tied: the embedding matrix is the head's too
        matrices = [shape for shape in shapes if shape.part == "embeddings"]
    total = sum(2.0 * shape.numel * (2 + int(shape.is_trained)) for shape in matrices)
    # rows of added tokens are computed instead of the matrix's own, and trained
    total += sum(2.0 * shape.numel for shape in shapes if shape.part == "new token rows" and "lm_head" in shape.name)
    return Flops(per_supervised=total)


def _vision(
    planned: PlannedModel, shapes: Sequence[ParameterShape], request: PlanRequest
) -> tuple[Flops, tuple[Flops, Flops]]:
    geometry = planned.config.image_geometry
    if geometry is None:
        return Flops(), (Flops(), Flops())
    matrices = [shape for shape in shapes if shape.part == "projector" and len(shape.shape) == 2]
    forward = sum(2.0 * shape.numel for shape in matrices)
    backward = sum(2.0 * shape.numel * (int(number > 0) + 1) for number, shape in enumerate(matrices))
    is_trained = any(shape.is_trained for shape in matrices)
    tokens = geometry.tokens_per_tile
    projector = Flops(per_tile=forward * tokens), Flops(per_tile=backward * tokens if is_trained else 0.0)
    tower = Flops(per_tile=tower_flops(planned, shapes)) if request.tower == "runs" else Flops()
    return tower, projector


def tower_flops(planned: PlannedModel, shapes: Sequence[ParameterShape]) -> float:
    """FLOPs of the vision tower for one tile, up to the layer that is read; with S2 at all scales."""
    geometry, vision = planned.config.image_geometry, planned.config.mm_vision_config
    assert geometry is not None
    assert vision is not None
    num_layers = layers_read(planned)
    patches = (geometry.image_size // geometry.patch_size) ** 2
    total = 4.0 * (patches + 1) ** 2 * int(vision["hidden_size"]) * num_layers
    for shape in shapes:
        layer = _LAYER.search(shape.name)
        if shape.part != "vision tower":
            continue
        if layer is not None and len(shape.shape) == 2 and int(layer.group(1)) < num_layers:
            total += 2.0 * shape.numel * (patches + 1)
        elif len(shape.shape) == 4:
            total += 2.0 * shape.numel * patches
    sides = geometry.s2_scales or (geometry.image_size,)
    return total * sum((side // geometry.image_size) ** 2 for side in sides)


def layers_read(planned: PlannedModel) -> int:
    """Number of layers of the vision tower that run: up to the one whose output is read."""
    vision, select = planned.config.mm_vision_config, int(planned.config.mm_vision_select_layer)
    assert vision is not None
    return select if select >= 0 else int(vision["num_hidden_layers"]) + 1 + select
