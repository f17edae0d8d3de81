"""The computed time of a step: its FLOPs are those that torch counts, and its parts follow from the stated model."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llava_ft.planning.flops import Counts, step_flops
from llava_ft.planning.shapes import build_model, native_model, parameter_shapes
from llava_ft.planning.step import Batch
from tests.planning.helpers import request_of, write_configs
from tests.planning.test_step import METHODS, real_inputs


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


def counted_flops(argv: list[str], batch: Batch) -> tuple[int, float]:
    """FLOPs of a step that torch counts, and those of the plan for the same step."""
    planned, request = request_of([*argv, "--attn_implementation", "eager"])
    torch.manual_seed(0)
    model = build_model(planned, request)
    shapes = parameter_shapes(model, request)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.randn(parameter.shape) * 0.02
                module._parameters[leaf] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    native = native_model(model)
    if request.gradient_checkpointing:
        native.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    inputs = real_inputs(model, batch)
    model.train()
    with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED_BY_TORCH) as counter:
        model(**inputs, num_items_in_batch=1).loss.backward()
    geometry = planned.config.image_geometry
    assert geometry is not None
    counts = Counts(
        positions=batch.size * batch.length,
        supervised=batch.num_supervised,
        pairs=batch.size * batch.length**2,  # eager attention computes all pairs
        tiles=batch.num_images * geometry.num_tiles(batch.image_size_wh),
    )
    return counter.get_total_flops(), float(step_flops(planned, shapes, request).computed.of(counts))


class TestFlops:
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
    def test_are_those_that_torch_counts(self, tmp_path, method, extra):
        counted, planned = counted_flops([*write_configs(tmp_path), *METHODS[method], *extra], BATCH)
        assert planned == counted

    @pytest.mark.parametrize("method", METHODS)
    def test_recomputation_is_counted_as_whole_layers(self, tmp_path, method):
        """torch stops recomputing a layer at the last tensor that the backward pass needs, before its last product."""
        argv = [*write_configs(tmp_path), *METHODS[method], "--gradient_checkpointing", "True"]
        counted, planned = counted_flops(argv, BATCH)
        assert counted <= planned <= 1.1 * counted
