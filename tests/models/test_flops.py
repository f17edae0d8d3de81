"""FLOPs are those that torch counts, and what recomputation adds is known."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llava_ft.models.flops import Counts, Flops, model_flops
from llava_ft.planning.advice import recomputed_flops
from llava_ft.planning.model import build_model, parameter_shapes
from llava_ft.planning.step import Batch
from llava_ft.tuning.recompute import recompute_activations
from tests.planning.helpers import native_model, request_of, write_configs
from tests.planning.test_step import METHODS


def _of_product(_, a_shape, b_shape, **kwargs) -> int:
    return 2 * math.prod(a_shape) * b_shape[-1]


def _of_attention(query_shape, key_shape, *args, **kwargs) -> int:
    return 4 * math.prod(query_shape) * key_shape[-2]


NOT_COUNTED_BY_TORCH = {
    torch.ops.aten.addmm_: _of_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
}
FROZEN_PROJECTOR = ["--freeze_mm_mlp_adapter", "True"]
BATCH = Batch(size=2, length=48, num_images=2, num_supervised=20, is_padded=True)


def counted_flops(argv: list[str]) -> tuple[int, float]:
    """FLOPs of a step that torch counts, and those that are worked out for it."""
    outline, request = request_of([*argv, "--attn_implementation", "eager"])
    torch.manual_seed(0)
    model = build_model(outline, request)
    shapes = parameter_shapes(model, request)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.randn(parameter.shape) * 0.02
                module._parameters[leaf] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    recompute_activations(model, request.recomputation, options={"preserve_rng_state": False})
    inputs = BATCH.inputs(native_model(model).config)
    model.train()
    with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED_BY_TORCH) as counter:
        model(**inputs, num_items_in_batch=1).loss.backward()
    pairs = BATCH.size * BATCH.length**2  # eager attention computes all pairs
    counts = Counts(BATCH.size * BATCH.length, BATCH.num_supervised, pairs, tiles=BATCH.num_images)
    forward, backward = model_flops(outline.config, shapes)
    total = forward + backward + recomputed_flops(outline, shapes, request)
    return counter.get_total_flops(), float(total.of(counts))


def recomputed(argv: list[str]) -> Flops:
    outline, request = request_of(argv)
    return recomputed_flops(outline, parameter_shapes(build_model(outline, request), request), request)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("full", []),
        ("full", FROZEN_PROJECTOR),
        ("lora", []),
        ("lora", FROZEN_PROJECTOR),
        ("lora", ["--fast_lora", "False"]),
        ("lora", ["--mm_use_im_start_end", "True"]),
        ("lora", ["--s2_scales", "28,56"]),
        ("projector", []),
    ],
)
def test_are_those_that_torch_counts(tmp_path, method, extra):
    counted, worked_out = counted_flops([*write_configs(tmp_path), *METHODS[method], *extra])
    assert worked_out == counted


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_is_counted_as_whole_layers(tmp_path, method):
    """torch stops recomputing a layer at the last tensor that the backward pass needs, before its last product."""
    argv = [*write_configs(tmp_path), *METHODS[method]]
    counted, worked_out = counted_flops([*argv, "--gradient_checkpointing", "True"])
    assert counted <= worked_out <= 1.1 * counted
    whole = [*argv, "--gradient_checkpointing", "full"]
    none, half, all_layers = (
        recomputed(flags) for flags in (argv, [*whole, "--gradient_checkpointing_every", "2"], whole)
    )
    assert none == Flops()
    assert 0 < half.per_position < all_layers.per_position
    assert half.per_pair == all_layers.per_pair / 2


@pytest.mark.parametrize(
    ("method", "extra", "again"),
    [("full", [], False), ("projector", [], False), ("lora", [], False), ("lora", ["--fast_lora", "False"], True)],
)
def test_selective_computes_low_rank_products_again(tmp_path, method, extra, again):
    argv = [*write_configs(tmp_path), *METHODS[method], *extra]
    flops = recomputed([*argv, "--gradient_checkpointing", "selective"])
    lora_up = 2 * 4 * (3 * 64 + 64 + 2 * 160 + 64)
    assert flops.per_position == (lora_up + 2 * 4 * 3 * 64 if again else 0)
    assert flops.per_supervised == (2 * 4 * (64 + 2 * 160 + 64) if again else 0)
    assert flops.per_pair == 0
