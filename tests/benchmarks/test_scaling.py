"""The computed time of a step follows from the stated model, and the page's tables are the script's."""

import json

import numpy as np
import pytest
from scaling import GPUS, LINK_EFFICIENCY, PAGE, Fabric, Samples, Tables, collectives, draw_balance, put_into, run

from llava_ft.models.flops import Counts, Flops
from llava_ft.planning.model import build_model, parameter_shapes
from tests.planning.helpers import request_of, write_configs
from tests.planning.test_step import METHODS

BY_POSITION = Flops(per_position=1.0)
SAMPLES = Samples(*(np.array(values) for values in ([100, 200, 300, 400] * 50, [1] * 200, [1] * 200)))


def test_a_ring_sends_what_zero_s_paper_says():
    fabric = Fabric(8, 2, link=450e9, network=50e9)
    sent = [fabric.sent_bytes(kind, 1600) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
    assert sent == [1500, 1500, 3000]


def test_all_adapters_of_a_machine_carry_a_ring():
    rates = [Fabric(gpus, nodes, 450e9, 50e9).bus_rate for gpus, nodes in ((8, 1), (8, 2), (1, 2))]
    assert rates == [LINK_EFFICIENCY * rate for rate in (450e9, 400e9, 50e9)]


def test_large_collectives_cost_bandwidth_and_small_ones_latency():
    fabric = Fabric(8, 16, 450e9, 50e9)
    assert fabric.seconds("all-gather", 1e12, 1) == pytest.approx(1e12 * 127 / 128 / (0.8 * 400e9), rel=1e-3)
    hops = 8.4 + 16 * 7 * 3.4 + 15 * 9.6
    assert fabric.seconds("all-gather", 1, 3) == pytest.approx(3 * hops * 1e-6, rel=1e-3)
    assert fabric.seconds("all-reduce", 1, 1) == pytest.approx((4.4 + 2 * (7 * 1.2 + 4 * 8.5)) * 1e-6, rel=1e-3)


def test_under_zero_3_frozen_weights_travel_too(tmp_path):
    file = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = {"zero_optimization": zero | {"reduce_bucket_size": 10**6}, "bf16": {"enabled": "auto"}}
    file.write_text(json.dumps(config | {"train_micro_batch_size_per_gpu": "auto"}))
    argv = [*write_configs(tmp_path), "--bf16", "True", *METHODS["lora"], "--deepspeed", str(file)]
    outline, request = request_of(argv, gpus=4)
    shapes = parameter_shapes(build_model(outline, request), request)
    by_part = {part: sum(s.numel for s in shapes if s.part == part) for part in {s.part for s in shapes}}
    last_of_tower = sum(s.numel for s in shapes if s.part == "vision tower" and "layers.1." in s.name)
    forward, backward, gradients = collectives(outline, shapes, request)
    assert forward.num_bytes == 2 * (sum(by_part.values()) - last_of_tower)
    assert backward.num_bytes == 2 * (sum(by_part.values()) - by_part["vision tower"] - by_part["embeddings"])
    assert gradients.num_bytes == 2 * (by_part["LoRA"] + by_part["projector"])


def test_the_slowest_of_two_random_ranks():
    """The mean of the larger of two of 100, 200, 300 and 400 is 312.5, that of one is 250."""
    assert draw_balance(SAMPLES, "random", "padded", 1, 2, BY_POSITION).waiting == pytest.approx(1.25, rel=0.12)


def test_order_by_length_leaves_little_to_wait_for():
    waiting = {
        order: draw_balance(SAMPLES, order, "padded", 1, 4, BY_POSITION).waiting for order in ("random", "length")
    }
    assert waiting["length"] - 1 < 0.2 * (waiting["random"] - 1)


def test_padding_is_computed_but_not_useful():
    padded, joined = (draw_balance(SAMPLES, "random", rows, 4, 1, BY_POSITION) for rows in ("padded", "joined"))
    assert padded.computed.positions > 1.2 * padded.useful.positions
    assert joined.computed == joined.useful == padded.useful


def test_samples_that_are_alike_wait_for_nothing():
    alike = Samples(*(np.full(64, value) for value in (763, 90, 1)))
    balance = draw_balance(alike, "random", "padded", 16, 8, BY_POSITION)
    assert balance.waiting == 1
    assert balance.computed == balance.useful == Counts(16 * 763, 16 * 90, 16 * 763 * 764 / 2, 16)


@pytest.mark.slow
def test_the_page_has_the_script_s_tables():
    """One of each kind of cell; the others are made by the same function from the same steps."""
    page, tables = PAGE.read_text(encoding="utf-8"), Tables(GPUS["H200"], 0.4)
    for name, table in (
        ("flops", tables.flops()),
        ("fixed, 7B", tables.scaling("7B", {8: 16, 16: 8, 32: 4, 64: 2, 128: 1})),
    ):
        assert put_into(page, name, table) == page
    time, (_, shapes, _) = tables.step("7B", "full, ZeRO-3", 8, 16), run("7B", "full, ZeRO-3")
    assert time.computation == pytest.approx(16 * time.model_flops / time.samples / (0.4 * 989e12), rel=0.01)
    trained = sum(shape.numel for shape in shapes if shape.is_trained)
    assert time.optimizer == pytest.approx(trained / 8 * (32 + 2) / (0.8 * 4.8e12))
