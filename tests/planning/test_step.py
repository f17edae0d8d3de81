"""A step traced without memory equals the same step run for real."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.planning.placement import place
from llava_ft.planning.shapes import build_model, native_model, parameter_shapes
from llava_ft.planning.step import BACKWARD, GRADIENTS, LOGITS, LOSS, VISION, Batch, StepSettings, trace_step
from llava_ft.planning.tracker import MemoryTracker
from llava_ft.tuning.recompute import Recomputation, recompute_activations
from tests.planning.helpers import request_of, write_configs

BF16 = torch.bfloat16
NONE, FULL, SELECTIVE = (Recomputation(mode) for mode in ("none", "full", "selective"))
BATCH = Batch(size=2, length=48, num_images=2, num_supervised=20, is_padded=True)
METHODS = {
    "full": [],
    "lora": ["--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0.1"],
    "projector": ["--tune_mm_mlp_adapter", "True"],
}
ANYRES = ["--image_aspect_ratio", "anyres", "--image_grid_pinpoints", "(1x2),(2x1)"]


def real_inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """A batch with as many images and supervised positions as `batch` says."""
    geometry = native_model(model).config.image_geometry
    assert geometry is not None
    ids = torch.randint(3, 500, (batch.size, batch.length))
    if batch.num_images:
        ids[:, 1 : 1 + geometry.num_tokens(batch.image_size_wh)] = IMAGE_TOKEN_INDEX
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -batch.num_supervised // batch.size :] = 5
    mask = torch.ones_like(ids, dtype=torch.bool)
    if batch.is_padded:
        mask[-1, -1] = False
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if batch.num_images:
        num_tiles = batch.num_images * geometry.num_tiles(batch.image_size_wh)
        inputs["pixel_values"] = torch.randn(num_tiles, 3, geometry.input_size, geometry.input_size)
        if batch.image_size_wh is not None:
            inputs["image_sizes"] = torch.tensor([batch.image_size_wh] * batch.num_images)
    return inputs


def run_for_real(model: nn.Module, dtypes: dict[str, torch.dtype], settings: StepSettings) -> int:
    """Give a skeleton random weights, run the step, and return the peak beside the weights."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.randn(parameter.shape, dtype=dtypes[prefix + leaf]) * 0.02
                module._parameters[leaf] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    recompute_activations(model, settings.recomputation, options={"preserve_rng_state": False})
    if settings.gradients == "accumulated":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    inputs = real_inputs(model, settings.batch)
    model.train()
    with MemoryTracker() as tracker:
        tracker.ignore([*model.parameters(), *model.buffers()])
        tracker.hold([p.grad for p in model.parameters() if p.grad is not None], "gradients")
        tracker.hold(inputs.values(), "inputs")
        with torch.autocast("cpu", settings.autocast_dtype, enabled=settings.autocast_dtype is not None):
            loss = model(**inputs, num_items_in_batch=1).loss
        loss.backward()
    return max(peak.total for peak in tracker.peaks.values())


class TestTraceStep:
    @pytest.mark.parametrize(
        ("method", "recomputation", "autocast", "extra"),
        [
            ("full", NONE, None, []),
            ("full", FULL, BF16, ["--bf16", "True"]),
            ("full", SELECTIVE, BF16, ["--bf16", "True"]),
            ("full", Recomputation("full", 2), None, []),
            ("full", NONE, None, ["--gradient_accumulation_steps", "2"]),
            ("lora", NONE, BF16, ["--bf16", "True"]),
            ("lora", FULL, None, []),
            ("lora", SELECTIVE, None, []),
            ("lora", SELECTIVE, BF16, ["--bf16", "True", "--fast_lora", "False"]),
            ("lora", Recomputation("selective", 2), None, ["--fast_lora", "False"]),
            ("lora", NONE, None, ["--attn_implementation", "eager"]),
            ("lora", SELECTIVE, None, ["--attn_implementation", "eager", "--fast_lora", "False"]),
            ("lora", NONE, None, ["--mm_use_im_start_end", "True"]),
            ("projector", NONE, None, []),
            ("projector", SELECTIVE, None, []),
            ("projector", FULL, BF16, ["--bf16", "True", "--mm_use_im_start_end", "True"]),
            ("lora", NONE, None, [*ANYRES, "--mm_patch_merge_type", "flat"]),
            ("full", NONE, None, [*ANYRES, "--mm_patch_merge_type", "spatial_unpad"]),
            ("projector", NONE, BF16, [*ANYRES, "--mm_patch_merge_type", "spatial_unpad", "--bf16", "True"]),
            ("lora", NONE, None, ["--s2_scales", "28,56"]),
        ],
    )
    def test_equals_the_step_run_for_real(self, tmp_path, method, recomputation, autocast, extra):
        planned, request = request_of([*write_configs(tmp_path), *METHODS[method], *extra])
        gradients = place(parameter_shapes(build_model(planned, request), request), request).gradients
        geometry = planned.config.image_geometry
        batch = replace(BATCH, length=80, image_size_wh=geometry.largest_size) if ANYRES[0] in extra else BATCH
        settings = StepSettings(batch, autocast, recomputation, gradients, on_gpu=False)
        dtypes = {
            name: request.tuning.dtype_of(name, request.compute_dtype)
            for name, _ in build_model(planned, request).named_parameters(remove_duplicate=False)
        }
        traced = trace_step(build_model(planned, request), dtypes, settings)
        real = run_for_real(build_model(planned, request), dtypes, settings)
        assert traced.most == pytest.approx(real, rel=1e-3)
        assert traced.on_host == 0

    def test_text_alone_needs_no_tower(self, tmp_path):
        planned, request = request_of([*write_configs(tmp_path), *METHODS["lora"]])
        settings = StepSettings(Batch(2, 48, 0, 20, True), None, NONE, "fresh", False)
        model = build_model(planned, request)
        dtypes = {name: torch.float32 for name, _ in model.named_parameters()}
        traced = trace_step(model, dtypes, settings).peaks
        assert traced[VISION].total == 0
        assert traced[BACKWARD].total > 0

    @pytest.mark.parametrize("gradients", ["fresh", "handed over"])
    def test_labels_say_what_memory_is_for(self, tmp_path, gradients):
        planned, request = request_of(write_configs(tmp_path))
        model = build_model(planned, request)
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        settings = StepSettings(Batch(1, 24, 1, 6, False), None, NONE, gradients, on_gpu=False)
        dtypes = {name: torch.float32 for name, _ in model.named_parameters()}
        traced = trace_step(model, dtypes, settings).peaks
        logits = 6 * 512 * 4
        assert logits < traced["loss"].by_label[LOGITS] < 1.5 * logits  # once, and vectors of the width beside them
        assert traced[VISION].by_label[VISION] > 0
        kept = traced[BACKWARD].by_label.get(GRADIENTS, 0)
        head = 512 * 64 * 4  # its gradient is there when the backward pass begins
        assert trained / 2 < kept <= trained if gradients == "fresh" else kept == head

    def test_a_gpu_keeps_a_smaller_mask_of_dropout(self, tmp_path):
        planned, request = request_of([*write_configs(tmp_path), *METHODS["lora"], "--fast_lora", "False"])
        totals = []
        for on_gpu in (False, True):
            model = build_model(planned, request)
            dtypes = {name: torch.float32 for name, _ in model.named_parameters()}
            settings = StepSettings(Batch(2, 512, 2, 200, True), None, NONE, "fresh", on_gpu)
            totals.append(trace_step(model, dtypes, settings).most)
        assert totals[1] < totals[0]

    @pytest.mark.parametrize("on_gpu", [True, False])
    def test_inputs_of_layers_wait_in_the_host_s_memory_of_a_gpu(self, tmp_path, on_gpu):
        planned, request = request_of([*write_configs(tmp_path), *METHODS["lora"]])
        traces = []
        for recomputation in (FULL, Recomputation("full", offload=True)):
            model = build_model(planned, request)
            dtypes = {name: torch.float32 for name, _ in model.named_parameters()}
            settings = StepSettings(Batch(2, 512, 2, 200, True), None, recomputation, "fresh", on_gpu)
            traces.append(trace_step(model, dtypes, settings))
        one_input = 2 * 512 * 64 * 4
        assert [trace.on_host for trace in traces] == [0, 2 * one_input if on_gpu else 0]
        at_the_loss = [trace.peaks[LOSS].total for trace in traces]
        # The embeddings, which are the first layer's input, are there until the forward pass returns.
        assert at_the_loss[0] - at_the_loss[1] == (one_input if on_gpu else 0)
