"""What a run's log says of its speed."""

import logging
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_ft.constants import IGNORE_INDEX
from llava_ft.models.flops import Counts, Flops
from llava_ft.training import speed
from llava_ft.training.speed import SpeedMeter, flops_of_run, measure_product_rate
from tests.models.test_flops import NOT_COUNTED_BY_TORCH
from tests.training.helpers import METHODS, prepare, train

CPU = torch.device("cpu")
LORA = {"lora_dropout": "0"}


class Clock:
    """Stands in for the module `time`; moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def batch(num_images: int = 0) -> dict[str, torch.Tensor]:
    """Two rows of 5 positions, 7 of which hold a token and 3 a target."""
    labels = torch.full((2, 5), IGNORE_INDEX)
    labels[0, 2:4], labels[1, 1] = 7, 7
    labels[1, 0] = 7  # no position stands before it
    images = {"pixel_values": torch.zeros(num_images, 3, 4, 4)} if num_images else {}
    return {"input_ids": torch.zeros(2, 5, dtype=torch.long), "labels": labels, **images}


def add(meter: SpeedMeter, **changes: int) -> None:
    meter.add(batch(num_images=1), **{"num_samples": 2, "num_tokens": 7, "num_pairs": 13} | changes)


def test_rates_are_counts_by_the_time_since_the_first_batch_was_asked_for(clock):
    meter = SpeedMeter()
    clock.now += 50.0  # setting up
    list(meter.timed(iter([1, 2])))
    add(meter)
    add(meter)
    clock.now += 4.0
    entry = meter.pop(CPU, 1)
    assert entry["tokens_per_second"] == 3.5
    assert entry["samples_per_second"] == 1.0
    assert entry["images_per_second"] == 0.5
    assert entry["supervised_tokens"] == 6.0
    assert entry["padding"] == 0.3
    clock.now += 2.0
    add(meter)
    assert meter.pop(CPU, 1)["tokens_per_second"] == 3.5
    assert meter.pop(CPU, 1) == {}


def test_model_flops_are_counted_and_compared_with_what_the_device_can_do(clock):
    meter = SpeedMeter(Flops(per_position=2e12, per_supervised=1e12, per_pair=1e11, per_tile=5e11))
    assert "mfu" not in meter.pop(CPU, 1)
    meter.product_rate = 20e12
    add(meter)
    clock.now += 2.0
    entry = meter.pop(CPU, 1)
    assert entry["model_tflops"] == pytest.approx((14 + 3 + 1.3 + 0.5) / 2)
    assert entry["mfu"] == pytest.approx((14 + 3 + 1.3 + 0.5) / 2 / 20)


def test_waiting_for_data_is_told_from_computing(clock):
    def load():
        for number in range(3):
            clock.now += 1.0
            yield number

    meter = SpeedMeter()
    batches = load()
    for _ in range(3):  # as many steps, each of which asks anew
        assert next(meter.timed(batches)) is not None
        clock.now += 3.0
    add(meter)
    assert meter.pop(CPU, 1)["data_wait"] == 0.25
    add(meter)
    clock.now += 1.0
    assert meter.pop(CPU, 1)["data_wait"] == 0.0


def test_saving_and_evaluating_do_not_count(clock):
    meter = SpeedMeter()
    with meter.paused(CPU):  # before the first step
        clock.now += 9.0
    list(meter.timed(iter([1])))
    add(meter)
    clock.now += 1.0
    with meter.paused(CPU):
        clock.now += 9.0
    clock.now += 1.0
    assert meter.pop(CPU, 1)["tokens_per_second"] == 3.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_products_is_measured_without_touching_random_numbers(dtype):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rate = measure_product_rate(CPU, dtype)
    assert rate is not None
    assert 1e7 < rate < 1e14
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.usefixtures("in_recordings")
class TestRun:
    @pytest.mark.parametrize(
        ("method", "extra"),
        [("lora", LORA), ("lora", LORA | {"fast_lora": "False"}), ("full", {}), ("projector", {})],
    )
    def test_flops_are_those_that_torch_counts(self, tmp_path: Path, method, extra):
        changes = {"attn_implementation": "eager", "train_sampling_strategy": "sequential"}
        if "group_by_modality_length" in METHODS[method]:
            changes["group_by_modality_length"] = None
        run = prepare(tmp_path / "out", method, **changes | extra)
        run.stop.release()
        trainer = run.trainer
        flops = flops_of_run(trainer.model, trainer.artifacts.config, runs_tower=True)
        inputs = next(iter(trainer.get_train_dataloader()))
        pairs = len(inputs["input_ids"]) * inputs["input_ids"].shape[1] ** 2  # eager attention computes all pairs
        supervised = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        inputs = trainer._prepare_inputs(inputs)
        tiles = len(inputs.get("pixel_values", []))
        assert tiles == len(inputs.get("tile_index", range(tiles)))
        trainer.model.train()
        with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED_BY_TORCH) as counter:
            trainer.model(**inputs, num_items_in_batch=1).loss.backward()
        counts = Counts(inputs["input_ids"].numel(), supervised, pairs, tiles)
        assert counter.get_total_flops() == pytest.approx(flops.of(counts), rel=1e-9)

    def test_quantised_weights_count_as_the_values_they_stand_for(self, tmp_path: Path):
        found = []
        for bits in ("16", "4"):
            run = prepare(tmp_path / bits, bits=bits)
            run.stop.release()
            found.append(flops_of_run(run.trainer.model, run.trainer.artifacts.config, runs_tower=True))
        assert found[0] == found[1]

    def test_every_entry_of_the_log_has_them(self, tmp_path: Path):
        run = train(tmp_path / "out", max_steps="2", gradient_accumulation_steps="2")
        entries = [entry for entry in run.trainer.state.log_history if "loss" in entry]
        assert len(entries) == 2
        for entry in entries:
            assert 0 < entry["mfu"] < 1
            assert entry["model_tflops"] == pytest.approx(
                entry["mfu"] * run.trainer._speed.product_rate / 1e12, rel=1e-3
            )
            assert 0 <= entry["data_wait"] < 1
            assert 0.05 < entry["peak_memory_gib"] < 16

    def test_a_run_that_waits_for_data_says_so_once(self, tmp_path: Path, caplog):
        run = prepare(tmp_path / "out")
        run.stop.release()
        trainer = run.trainer
        with caplog.at_level(logging.WARNING):
            trainer._say_that_it_waits(0.9)
            assert "waits for data" not in caplog.text  # workers have only started
            trainer.state.global_step = 20
            trainer._say_that_it_waits(0.05)
            assert "waits for data" not in caplog.text
            trainer._say_that_it_waits(0.25)
            trainer._say_that_it_waits(0.25)
        assert caplog.text.count("waits for data 25% of its time. Raise dataloader_num_workers, which is 0") == 1
