"""A step traced without memory equals the same step run for real."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from llava_ft.planning.model import build_model, parameter_shapes
from llava_ft.planning.placement import place
from llava_ft.planning.request import Machine, PlanRequest
from llava_ft.planning.step import (
    BACKWARD,
    GRADIENTS,
    LOGITS,
    LOSS,
    VISION,
    Batch,
    Gradients,
    StepTrace,
    autocast,
    trace_step,
)
from llava_ft.planning.tracker import MemoryTracker
from llava_ft.tuning.recompute import Recomputation, recompute_activations
from tests.planning.helpers import native_model, request_of, write_configs

NONE, FULL, SELECTIVE = (Recomputation(mode) for mode in ("none", "full", "selective"))
BATCH = Batch(size=2, length=48, num_images=2, num_supervised=20, is_padded=True)
LONG = Batch(2, 512, 2, 200, True)
METHODS = {
    "full": [],
    "lora": ["--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0.1"],
    "projector": ["--tune_mm_mlp_adapter", "True"],
}
ANYRES = ["--image_aspect_ratio", "anyres", "--image_grid_pinpoints", "(1x2),(2x1)"]


def trace(argv: list[str], batch: Batch, gradients: Gradients = "fresh", **changes: object) -> StepTrace:
    outline, request = request_of(argv)
    request = request.changed(**changes)
    return trace_step(build_model(outline, request), request, batch, gradients)


def most(peaks: Mapping[str, Mapping[str, int]]) -> int:
    return max(sum(peak.values()) for peak in peaks.values())


def run_for_real(model: nn.Module, request: PlanRequest, batch: Batch, gradients: Gradients) -> int:
    """Give a skeleton random weights, run the step, and return the peak beside the weights."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.randn(parameter.shape, dtype=request.dtype_of(prefix + leaf)) * 0.02
                module._parameters[leaf] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    recompute_activations(model, request.recomputation, options={"preserve_rng_state": False})
    model.train()
    with MemoryTracker() as tracker:
        tracker.ignore([*model.parameters(), *model.buffers()])
        if gradients == "accumulated":
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        inputs = batch.inputs(native_model(model).config)
        with autocast(request):
            loss = model(**inputs, num_items_in_batch=1).loss
        loss.backward()
    return most(tracker.peaks)


class TestTraceStep:
    @pytest.mark.parametrize(
        ("method", "recomputation", "extra"),
        [
            ("full", NONE, []),
            ("full", FULL, ["--bf16", "True"]),
            ("full", SELECTIVE, ["--bf16", "True"]),
            ("full", Recomputation("full", 2), []),
            ("full", NONE, ["--gradient_accumulation_steps", "2"]),
            ("lora", NONE, ["--bf16", "True"]),
            ("lora", FULL, []),
            ("lora", SELECTIVE, []),
            ("lora", SELECTIVE, ["--bf16", "True", "--fast_lora", "False"]),
            ("lora", Recomputation("selective", 2), ["--fast_lora", "False"]),
            ("lora", NONE, ["--attn_implementation", "eager"]),
            ("lora", SELECTIVE, ["--attn_implementation", "eager", "--fast_lora", "False"]),
            ("lora", NONE, ["--mm_use_im_start_end", "True"]),
            ("projector", NONE, []),
            ("projector", SELECTIVE, []),
            ("projector", FULL, ["--bf16", "True", "--mm_use_im_start_end", "True"]),
            ("lora", NONE, [*ANYRES, "--mm_patch_merge_type", "flat"]),
            ("full", NONE, [*ANYRES, "--mm_patch_merge_type", "spatial_unpad"]),
            ("projector", NONE, [*ANYRES, "--mm_patch_merge_type", "spatial_unpad", "--bf16", "True"]),
            ("lora", NONE, ["--s2_scales", "28,56"]),
        ],
    )
    def test_equals_the_step_run_for_real(self, tmp_path, method, recomputation, extra):
        argv = [*write_configs(tmp_path), "--use_cpu", "True", *METHODS[method], *extra]
        outline, request = request_of(argv)
        request = request.changed(recomputation=recomputation)
        gradients = place(parameter_shapes(build_model(outline, request), request), request).gradients
        geometry = outline.config.image_geometry
        batch = replace(BATCH, length=80, image_size_wh=geometry.largest_size) if ANYRES[0] in extra else BATCH
        traced = trace_step(build_model(outline, request), request, batch, gradients)
        real = run_for_real(build_model(outline, request), request, batch, gradients)
        assert most(traced.peaks) == pytest.approx(real, rel=1e-3)
        assert traced.on_host == 0

    def test_samples_of_one_row_are_read_where_they_are_supervised(self, tmp_path):
        """Joined samples, each with its own positions that the last layer reads: whole numbers are really computed."""
        outline, request = request_of([*write_configs(tmp_path), "--use_cpu", "True", *METHODS["lora"]])
        batch = replace(BATCH, size=1, length=96, is_padded=False)
        traced = trace_step(build_model(outline, request), request, batch, "fresh")
        assert most(traced.peaks) == pytest.approx(
            run_for_real(build_model(outline, request), request, batch, "fresh"), rel=1e-3
        )

    def test_what_the_model_reads_off_its_data_is_looked_at(self, tmp_path):
        """More features than image positions are refused as in training; nothing stands in for what is read."""
        batch = replace(BATCH, size=1, length=24, num_images=2, num_supervised=4)  # room for one image of 16
        with pytest.raises(ValueError, match="32 image features for 24 image positions"):
            trace(write_configs(tmp_path), batch)

    def test_text_alone_needs_no_tower(self, tmp_path):
        traced = trace([*write_configs(tmp_path), *METHODS["lora"]], Batch(2, 48, 0, 20, True)).peaks
        assert VISION not in traced
        assert BACKWARD in traced

    @pytest.mark.parametrize("gradients", ["fresh", "handed over"])
    def test_labels_say_what_memory_is_for(self, tmp_path, gradients):
        argv = [*write_configs(tmp_path), "--use_cpu", "True"]
        outline, request = request_of(argv)
        trained = sum(
            4 * shape.numel for shape in parameter_shapes(build_model(outline, request), request) if shape.is_trained
        )
        traced = trace(argv, Batch(1, 24, 1, 6, False), gradients).peaks
        logits = 6 * 512 * 4
        assert logits < traced["loss"][LOGITS] < 1.5 * logits  # once, and vectors of the width beside them
        assert traced[VISION][VISION] > 0
        kept = traced[BACKWARD].get(GRADIENTS, 0)
        head = 512 * 64 * 4  # its gradient is there when the backward pass begins
        assert trained / 2 < kept <= trained if gradients == "fresh" else kept == head

    def test_a_gpu_keeps_a_smaller_mask_of_dropout(self, tmp_path):
        argv = [*write_configs(tmp_path), *METHODS["lora"], "--fast_lora", "False"]
        totals = [most(trace(argv, LONG, machine=Machine(device)).peaks) for device in ("cpu", "cuda")]
        assert totals[1] < totals[0]

    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_inputs_of_layers_wait_in_the_host_s_memory_of_a_gpu(self, tmp_path, device):
        argv = [*write_configs(tmp_path), *METHODS["lora"]]
        wanted = (FULL, Recomputation("full", offload=True))
        traces = [trace(argv, LONG, machine=Machine(device), recomputation=way) for way in wanted]
        one_input = 2 * 512 * 64 * 4 if device == "cuda" else 0
        assert [trace.on_host for trace in traces] == [0, 2 * one_input]
        at_the_loss = [sum(trace.peaks[LOSS].values()) for trace in traces]
        # The embeddings, which are the first layer's input, are there until the forward pass returns.
        assert at_the_loss[0] - at_the_loss[1] == one_input
