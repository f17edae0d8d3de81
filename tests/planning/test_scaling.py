"""The computed time of a step: its FLOPs are those that torch counts, and its parts follow from the stated model."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llava_ft import cli
from llava_ft.planning.balance import Drawing, Samples, draw_balance
from llava_ft.planning.communication import collectives
from llava_ft.planning.flops import Counts, Flops, StepFlops, step_flops
from llava_ft.planning.hardware import GPUS, LINK_EFFICIENCY, Fabric, gpu_of_device
from llava_ft.planning.scaling import TimePlanner, TimeSettings
from llava_ft.planning.shapes import build_model, parameter_shapes
from llava_ft.planning.step import Batch
from llava_ft.tuning.recompute import recompute_activations
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
    recompute_activations(model, request.recomputation, options={"preserve_rng_state": False})
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


def of_request(argv: list[str]) -> StepFlops:
    planned, request = request_of(argv)
    return step_flops(planned, parameter_shapes(build_model(planned, request), request), request)


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

    @pytest.mark.parametrize("method", METHODS)
    def test_recomputation_of_every_second_layer_is_counted(self, tmp_path, method):
        argv = [*write_configs(tmp_path), *METHODS[method]]
        whole = [*argv, "--gradient_checkpointing", "full"]
        flops = [
            of_request(flags).recomputed for flags in (argv, [*whole, "--gradient_checkpointing_every", "2"], whole)
        ]
        assert flops[0] == Flops()
        assert 0 < flops[1].per_position < flops[2].per_position
        assert flops[1].per_pair == flops[2].per_pair / 2

    @pytest.mark.parametrize(
        ("method", "extra", "again"),
        [("full", [], False), ("projector", [], False), ("lora", [], False), ("lora", ["--fast_lora", "False"], True)],
    )
    def test_selective_computes_low_rank_products_again(self, tmp_path, method, extra, again):
        argv = [*write_configs(tmp_path), *METHODS[method], *extra]
        recomputed = of_request([*argv, "--gradient_checkpointing", "selective"]).recomputed
        lora_up = 2 * 4 * (3 * 64 + 64 + 2 * 160 + 64)
        assert recomputed.per_position == (lora_up + 2 * 4 * 3 * 64 if again else 0)
        assert recomputed.per_supervised == (2 * 4 * (64 + 2 * 160 + 64) if again else 0)
        assert recomputed.per_pair == 0


class TestCollectives:
    def test_a_ring_sends_what_zero_s_paper_says(self):
        fabric = Fabric(8, 2, link=450e9, network=50e9)
        assert fabric.sent_bytes("all-gather", 1600) == 1500
        assert fabric.sent_bytes("reduce-scatter", 1600) == 1500
        assert fabric.sent_bytes("all-reduce", 1600) == 3000

    def test_all_adapters_of_a_machine_carry_a_ring(self):
        assert Fabric(8, 1, 450e9, 50e9).bus_rate == LINK_EFFICIENCY * 450e9
        assert Fabric(8, 2, 450e9, 50e9).bus_rate == LINK_EFFICIENCY * 400e9
        assert Fabric(1, 2, 450e9, 50e9).bus_rate == LINK_EFFICIENCY * 50e9

    def test_large_ones_cost_bandwidth_and_small_ones_latency(self):
        fabric = Fabric(8, 16, 450e9, 50e9)
        assert fabric.seconds("all-gather", 1e12, 1) == pytest.approx(1e12 * 127 / 128 / (0.8 * 400e9), rel=1e-3)
        hops = 8.4 + 16 * 7 * 3.4 + 15 * 9.6
        assert fabric.seconds("all-gather", 1, 3) == pytest.approx(3 * hops * 1e-6, rel=1e-3)
        assert fabric.seconds("all-reduce", 1, 1) == pytest.approx((4.4 + 2 * (7 * 1.2 + 4 * 8.5)) * 1e-6, rel=1e-3)

    def test_one_rank_sends_nothing(self):
        assert Fabric(1, 1, 450e9, 50e9).seconds("all-reduce", 1e9, 4) == 0

    @pytest.mark.parametrize(
        ("stage", "each", "once"),
        [(None, 0, 2 * 4), (0, 0, 2 * 2), (1, 0, 2 * 2 + 2), (2, 2 * 2, 2)],
    )
    def test_bytes_for_each_trained_value(self, tmp_path, stage, each, once):
        argv = [*write_configs(tmp_path), "--bf16", "True", "--gradient_accumulation_steps", "3"]
        argv += ["--deepspeed", f"zero{stage}.json"] if stage is not None else []
        planned, request = request_of(argv, gpus=4)
        shapes = parameter_shapes(build_model(planned, request), request)
        values = sum(shape.numel for shape in shapes if shape.is_trained)
        fabric = Fabric(4, 1, 1e9, 1e9)
        sent = sum(c.rounds * fabric.sent_bytes(c.kind, c.num_bytes) for c in collectives(planned, shapes, request))
        assert sent == pytest.approx(values * (3 * each + once) * 3 / 4)

    def test_under_zero_3_frozen_weights_travel_too(self, tmp_path):
        config = tmp_path / "zero3.json"
        zero = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 10**6,
        }
        config.write_text(
            json.dumps(
                {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
            )
        )
        argv = [*write_configs(tmp_path), "--bf16", "True", *METHODS["lora"], "--deepspeed", str(config)]
        planned, request = request_of(argv, gpus=4)
        shapes = parameter_shapes(build_model(planned, request), request)
        by_part = {shape.part: 0 for shape in shapes}
        for shape in shapes:
            by_part[shape.part] += shape.numel
        last_of_tower = sum(s.numel for s in shapes if s.part == "vision tower" and "layers.1." in s.name)
        assert last_of_tower > 0
        forward, backward, gradients = collectives(planned, shapes, request)
        assert forward.num_bytes == 2 * (sum(by_part.values()) - last_of_tower)
        assert backward.num_bytes == 2 * (sum(by_part.values()) - by_part["vision tower"] - by_part["embeddings"])
        assert gradients.num_bytes == 2 * (by_part["LoRA"] + by_part["projector"])


class TestBalance:
    SAMPLES = Samples(*(np.array(values) for values in ([100, 200, 300, 400] * 50, [1] * 200, [1] * 200)))
    BY_POSITION = Flops(per_position=1.0)

    def drawing(self, **changes: Any) -> Drawing:
        return replace(Drawing("random", "padded", 1, 2, 1, waits_each=True), **changes)

    def test_the_slowest_of_two_random_ranks(self):
        """The mean of the larger of two of 100, 200, 300 and 400 is 312.5, that of one is 250."""
        balance = draw_balance(self.SAMPLES, self.drawing(), self.BY_POSITION)
        assert balance.waiting == pytest.approx(312.5 / 250, rel=0.12)

    def test_order_by_length_leaves_little_to_wait_for(self):
        drawing = self.drawing(ranks=4)
        random = draw_balance(self.SAMPLES, drawing, self.BY_POSITION).waiting
        by_length = draw_balance(self.SAMPLES, replace(drawing, order="length"), self.BY_POSITION).waiting
        assert by_length - 1 < 0.2 * (random - 1)

    def test_accumulation_evens_out_if_ranks_wait_once_a_step(self):
        drawing = self.drawing(ranks=4, accumulation=8)
        each = draw_balance(self.SAMPLES, drawing, self.BY_POSITION).waiting
        once = draw_balance(self.SAMPLES, replace(drawing, waits_each=False), self.BY_POSITION).waiting
        assert once - 1 < 0.6 * (each - 1)

    def test_padding_is_computed_but_not_useful(self):
        drawing = self.drawing(batch_size=4, ranks=1)
        padded = draw_balance(self.SAMPLES, drawing, self.BY_POSITION)
        joined = draw_balance(self.SAMPLES, replace(drawing, rows="joined"), self.BY_POSITION)
        assert padded.computed.positions > 1.2 * padded.useful.positions
        assert joined.computed == joined.useful == padded.useful

    def test_samples_that_are_alike_wait_for_nothing(self):
        balance = draw_balance(Samples.alike(763, 90, 1), self.drawing(batch_size=16, ranks=8), self.BY_POSITION)
        assert balance.waiting == 1
        assert balance.computed == balance.useful == Counts(16 * 763, 16 * 90, 16 * 763 * 764 / 2, 16)

    def test_packed_rows_are_full(self):
        drawing = self.drawing(rows="packed", batch_size=2, row_length=512, samples_per_row=2.0)
        balance = draw_balance(self.SAMPLES, drawing, self.BY_POSITION)
        assert (balance.computed.positions, balance.useful.positions) == (1024, 1000)


class TestStepTime:
    def plan(self, tmp_path, *extra: str, gpus: int = 8, nodes: int = 1, settings: TimeSettings | None = None):
        planned, request = request_of([*write_configs(tmp_path), "--bf16", "True", *extra], gpus=gpus, nodes=nodes)
        shapes = parameter_shapes(build_model(planned, request), request)
        planner = TimePlanner(planned, shapes, Samples.alike(60, 20, 1), Drawing("random", "padded", 1, 1, 1, False))
        return planner.plan(request, settings or TimeSettings(GPUS["H100"]))

    def test_computation_is_flops_by_the_share_of_the_peak(self, tmp_path):
        time = self.plan(tmp_path, gpus=1)
        assert time.parts["computation"] == pytest.approx(time.model_flops / (0.4 * 989e12))
        assert time.parts["communication not hidden"] == 0
        assert time.mfu < 0.4

    def test_the_optimizer_s_step_is_the_bytes_it_moves(self, tmp_path):
        time = self.plan(tmp_path, "--optim", "adamw_torch", gpus=1)
        values = self.trained_values(tmp_path)
        assert time.parts["optimizer step"] == pytest.approx(values * 32 / (0.8 * 3.35e12))

    def trained_values(self, folder) -> int:
        flags = ["--model_name_or_path", str(folder / "llm"), "--vision_tower", str(folder / "clip")]
        planned, request = request_of([*flags, "--mm_projector_type", "mlp2x_gelu", "--bf16", "True"])
        shapes = parameter_shapes(build_model(planned, request), request)
        return sum(shape.numel for shape in shapes if shape.is_trained)

    def test_a_slower_network_takes_longer(self, tmp_path):
        fast = self.plan(tmp_path, "--deepspeed", "zero3.json", nodes=2)
        (tmp_path / "again").mkdir()
        slow = self.plan(
            tmp_path / "again",
            *("--deepspeed", "zero3.json"),
            nodes=2,
            settings=TimeSettings(GPUS["H100"], network=1e6),
        )
        assert slow.seconds > fast.seconds
        assert slow.sent_bytes == fast.sent_bytes


class TestCommand:
    def time(self, argv: list[str], capsys) -> dict[str, Any]:
        assert cli.main(["plan", *argv, "--json"]) == cli.DONE
        return json.loads(capsys.readouterr().out)["time"]

    def test_machines_gpus_and_their_network(self, tmp_path, capsys):
        argv = [*write_configs(tmp_path), "--bf16", "True", "--nodes", "2", "--gpus-per-node", "4", "--gpu", "h200"]
        time = self.time([*argv, "--network", "12.5", "--mfu", "0.5"], capsys)
        assert (time["gpu"], time["network_bytes_per_second"], time["share_of_peak"]) == ("H200", 12.5e9, 0.5)
        assert time["computed_not_measured"] is True
        assert time["step_seconds"] == pytest.approx(sum(time["parts"].values()))

    def test_text_says_that_it_is_computed(self, tmp_path, capsys):
        argv = [*write_configs(tmp_path), "--bf16", "True", "--nodes", "16", "--gpus", "8", "--gpu", "A100-80GB"]
        assert cli.main(["plan", *argv]) == cli.DONE
        out = capsys.readouterr().out
        assert (
            "Time of a step, computed and not measured (A100-80GB, 40% of 312 TFLOP/s, 25 GB/s of network each)" in out
        )
        assert "(data sheet of A100-80GB)" in out

    def test_a_run_on_the_cpu_has_no_time(self, tmp_path, capsys):
        assert self.time([*write_configs(tmp_path), "--use_cpu", "True"], capsys) is None

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--gpu", "B100"], "--gpu is 'B100'. Known are H200, H100, A100-80GB, RTX-4090"),
            (["--mfu", "1.5"], "--mfu is 1.5. Allowed is a share above 0 and up to 1"),
            (["--network", "0"], "--network is 0.0. Allowed are numbers above 0"),
            (["--tokens-per-sample", "100"], "--tokens-per-sample is 100. Allowed are numbers from 1 to"),
        ],
    )
    def test_wrong_requests(self, tmp_path, capsys, flags, message):
        assert cli.main(["plan", *write_configs(tmp_path), *flags]) == cli.WRONG_REQUEST
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("device", "name"),
        [
            ("NVIDIA H200", "H200"),
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
            ("NVIDIA GeForce RTX 4090", "RTX-4090"),
            ("NVIDIA H100 PCIe", None),
            ("NVIDIA A100-SXM4-40GB", None),
        ],
    )
    def test_drivers_names(self, device, name):
        gpu = gpu_of_device(device)
        assert (gpu.name if gpu else None) == name
