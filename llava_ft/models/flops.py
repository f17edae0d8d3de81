"""FLOPs of a model, from its configuration and the shapes of its weights: matrix products alone, two a multiply-add.

A step's work is linear in a few counts: positions, supervised positions, pairs of positions that attention looks at,
and tiles that the vision tower sees. A linear layer with n weights takes 2n a position forward, 2n for the gradient of
its input where something before it is trained, and 2n for the gradient of its weights where they are trained. Scores
and values of attention take 4 times the width for each pair forward, and twice that backward.

The head and, in the last layer, what comes after its attention run at supervised positions alone (the latter where
there is a kernel for it); the tower runs forward, up to the layer that is read. Norms, softmax and other elementwise
work are not counted.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families import family_of
from llava_ft.models.projectors import find_projector
from llava_ft.models.towers import build_tower
from llava_ft.models.towers.tower import hidden_state_index

_LAYER: Final = re.compile(r"layers\.(\d+)\.")
_BEHIND_ATTENTION: Final = ("o_proj", "gate_proj", "up_proj", "down_proj")


class Weight(Protocol):
    """A parameter of the model, adapters included."""

    @property
    def name(self) -> str:
        """Its name in the model."""
        ...

    @property
    def part(self) -> str:
        """Part of the model, as `part_of` names it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values it stands for, however they are held."""
        ...

    @property
    def numel(self) -> int:
        """Number of these values."""
        ...

    @property
    def is_trained(self) -> bool:
        """Whether it is trained."""
        ...


@dataclass(frozen=True)
class Counts:
    """What a micro-batch holds; each a number or an array of them, one for each micro-batch."""

    positions: Any  # of the language model
    supervised: Any  # positions with a target
    pairs: Any  # of positions that attention looks at: with causal attention L (L + 1) / 2 for a row of L
    tiles: Any  # of its images


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


def model_flops(config: LlavaModelConfig, weights: Sequence[Weight], *, runs_tower: bool = True) -> tuple[Flops, Flops]:
    """Count what training needs, however it is done.

    Args:
        config: The model's configuration.
        weights: Its parameters.
        runs_tower: Whether the vision tower encodes images; False where features are read from a cache.

    Returns:
        FLOPs of the forward pass, the head's backward pass among them because it is made in it, and of the rest of the
        backward pass without recomputation.
    """
    decoder = decoder_forward(config, weights), _decoder_backward(config, weights)
    tower, projector = _vision(config, weights, runs_tower)
    return decoder[0] + _head(weights) + tower + projector[0], decoder[1] + projector[1]


def decoder_forward(
    config: LlavaModelConfig, weights: Sequence[Weight], layers: Collection[int] | None = None
) -> Flops:
    """Count the forward pass of the decoder's layers.

    Args:
        config: The model's configuration.
        weights: Its parameters.
        layers: Which layers, counted from 0; None is all.
    """
    chosen = range(int(config.num_hidden_layers)) if layers is None else layers
    total = Flops(per_pair=_attention_per_pair(config) * len(chosen))
    for weight in _decoder_matrices(weights):
        if _layer_of(weight.name) in chosen:
            total += _linear(weight, 1, config)
    return total


def _decoder_backward(config: LlavaModelConfig, weights: Sequence[Weight]) -> Flops:
    is_fed = any(w.is_trained for w in weights if w.part in ("embeddings", "projector", "image newline")) or any(
        w.is_trained and w.part == "new token rows" and "lm_head" not in w.name for w in weights
    )
    trains_anything = any(weight.is_trained for weight in weights)
    attention = 2 * _attention_per_pair(config) * int(config.num_hidden_layers)
    inputs = family_of(config).inputs
    total = Flops(per_pair=attention if trains_anything else 0.0)
    for weight in _decoder_matrices(weights):
        is_first = _layer_of(weight.name) == 0 and any(leaf in weight.name for leaf in inputs)
        needs_input_gradient = "lora_B" in weight.name or is_fed or not is_first
        total += _linear(weight, int(needs_input_gradient) + int(weight.is_trained), config)
    return total


def _decoder_matrices(weights: Sequence[Weight]) -> list[Weight]:
    parts = ("language model", "LoRA")
    return [w for w in weights if w.part in parts and len(w.shape) == 2 and _LAYER.search(w.name)]


def _layer_of(name: str) -> int:
    found = _LAYER.search(name)
    assert found is not None
    return int(found.group(1))


def _attention_per_pair(config: LlavaModelConfig) -> float:
    """FLOPs of one layer's attention forward, for a pair of positions."""
    return 4.0 * config.query_width


def _linear(weight: Weight, products: int, config: LlavaModelConfig) -> Flops:
    flops = 2.0 * weight.numel * products
    is_last = _layer_of(weight.name) == int(config.num_hidden_layers) - 1
    is_selective = (
        is_last and family_of(config).layer_form is not None and any(leaf in weight.name for leaf in _BEHIND_ATTENTION)
    )
    return Flops(per_supervised=flops) if is_selective else Flops(per_position=flops)


def _head(weights: Sequence[Weight]) -> Flops:
    matrices = [weight for weight in weights if weight.part == "head"]
    if not matrices:  # tied: the embedding matrix is the head's too
        matrices = [weight for weight in weights if weight.part == "embeddings"]
    total = sum(2.0 * weight.numel * (2 + int(weight.is_trained)) for weight in matrices)
    # rows of added tokens are computed instead of the matrix's own, and trained
    total += sum(
        2.0 * weight.numel for weight in weights if weight.part == "new token rows" and "lm_head" in weight.name
    )
    return Flops(per_supervised=total)


def _vision(config: LlavaModelConfig, weights: Sequence[Weight], runs_tower: bool) -> tuple[Flops, tuple[Flops, Flops]]:
    geometry = config.image_geometry
    if geometry is None:
        return Flops(), (Flops(), Flops())
    assert config.mm_vision_config is not None
    assert config.mm_hidden_size is not None
    forward, backward = _projector_flops(
        config.mm_projector_type, config.mm_hidden_size, config.hidden_size, geometry.features_per_tile
    )
    is_trained = any(weight.is_trained for weight in weights if weight.part == "projector")
    projector = Flops(per_tile=forward), Flops(per_tile=backward if is_trained else 0.0)
    return Flops(per_tile=tower_flops(config)) if runs_tower else Flops(), projector


@cache
def _projector_flops(name: str, width_in: int, width_out: int, num_features: int) -> tuple[float, float]:
    """FLOPs of the projector for one tile, forward and, all of it trained, backward."""
    with torch.device("meta"):
        projector = find_projector(name).build(name, width_in, width_out)
        with FlopCounterMode(display=False) as forward:
            tokens = projector(torch.empty(1, num_features, width_in))
        with FlopCounterMode(display=False) as backward:
            if tokens.requires_grad:
                tokens.sum().backward()
    return float(forward.get_total_flops()), float(backward.get_total_flops())


def tower_flops(config: LlavaModelConfig) -> float:
    """FLOPs of the vision tower for one tile, up to the layer that is read; with S2 at all scales."""
    geometry = config.image_geometry
    assert geometry is not None
    assert config.mm_vision_config is not None
    side = geometry.image_size
    flops = _encoder_flops(json.dumps(config.mm_vision_config), tower_layers_read(config), side)
    return flops * sum((scale // side) ** 2 for scale in geometry.s2_scales or (side,))


@cache
def _encoder_flops(vision: str, num_layers: int, side: int) -> float:
    """FLOPs of a tower's first layers, counted while they run without memory on a picture."""
    with torch.device("meta"), torch.no_grad():
        tower = build_tower(json.loads(vision), num_layers, "patch")
        with FlopCounterMode(display=False) as counter:
            tower(torch.empty(1, 3, side, side))
    return float(counter.get_total_flops())


def tower_layers_read(config: LlavaModelConfig) -> int:
    """Number of layers of the vision tower that run: up to the one whose output is read."""
    tower = config.tower_facts
    assert tower is not None
    return hidden_state_index(int(config.mm_vision_select_layer), tower.depth)
