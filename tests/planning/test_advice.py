"""Which way to recompute is chosen and which changes are named, on memory that is made up."""

from dataclasses import replace

import pytest

from llava_ft.args import parse_args
from llava_ft.planning.advice import WAYS, Way, advise, find_ways
from llava_ft.planning.memory import RankMemory
from llava_ft.planning.model import build_model, parameter_shapes
from llava_ft.planning.request import PlanRequest
from llava_ft.planning.step import Batch
from llava_ft.planning.workload import find_workload
from llava_ft.resolve import RunModel
from llava_ft.tuning.recompute import Recomputation
from tests.planning.helpers import request_of, write_configs

BATCH = Batch(size=2, length=64, num_images=2, num_supervised=40, is_padded=False)
NEEDED = dict(zip(WAYS, (100, 60, 80, 70, 40, 30), strict=True))
"""`selective` computes no product again but takes more than recomputing every layer."""

PEFT = ["--lora_enable", "True", "--lora_r", "4", "--fast_lora", "False"]
FAST = ["--lora_enable", "True", "--lora_r", "4"]


class Planner:
    """Stands in for `MemoryPlanner`."""

    def __init__(self, outline: RunModel):
        self.run = outline
        self.planned_ways: list[Recomputation] = []

    def shapes(self, request: PlanRequest):
        return parameter_shapes(build_model(self.run, request), request)

    def plan(self, request: PlanRequest, batch: Batch) -> RankMemory:
        assert batch == BATCH
        self.planned_ways.append(request.recomputation)
        return RankMemory({"start": {"weights": NEEDED[request.recomputation]}}, {}, {})


@pytest.fixture
def configs(tmp_path) -> list[str]:
    argv = write_configs(tmp_path)
    config = tmp_path / "llm" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 8'))
    return argv


def ways(argv: list[str], capacity: int, *, on_cpu: bool = False) -> list[Way]:
    outline, request = request_of(argv)
    if on_cpu:
        request = request.changed(machine=replace(request.machine, device="cpu"))
    planner = Planner(outline)
    found = find_ways(planner, request, BATCH, capacity)  # type: ignore[arg-type]
    assert planner.planned_ways == [way.recomputation for way in found]
    return found


@pytest.mark.parametrize(
    ("capacity", "expected"), [(100, WAYS[:1]), (99, WAYS[:2]), (59, WAYS[:5]), (39, WAYS), (1, WAYS)]
)
def test_ways_are_tried_until_one_fits(configs, capacity, expected):
    assert [way.recomputation for way in ways(configs, capacity)] == list(expected)


def test_what_is_computed_again_grows(configs):
    shares = {way.recomputation.flags: way.share for way in ways(configs, 1)}
    none, selective, fourth, second, full, offloaded = shares.values()
    assert (none, selective) == (0, 0)
    assert 0 < fourth < second < full < 1 / 3
    assert full == offloaded
    assert second == pytest.approx(2 * fourth, rel=0.2)


def test_peft_s_low_rank_products_are_counted(configs):
    shares = {way.recomputation.mode: way.share for way in ways([*configs, *PEFT], 99)}
    assert 0 < shares["selective"] < 0.05


def test_adapted_layers_that_keep_little_make_no_use_of_selective(configs):
    assert [way.recomputation for way in ways([*configs, *FAST], 1)] == [WAYS[0], *WAYS[2:]]


def test_on_a_cpu_there_is_no_other_memory_to_go_to(configs):
    assert [way.recomputation for way in ways(configs, 1, on_cpu=True)] == list(WAYS[:-1])


def test_a_full_run_is_told_of_lora_last(configs):
    class OnlyLoraHelps:
        def plan(self, request: PlanRequest, batch: Batch) -> RankMemory:
            return RankMemory({"start": {"weights": 1 if request.lora else 100}}, {}, {})

    outline, request = request_of(configs)
    workload = find_workload(parse_args(configs, required=("model_name_or_path",)), outline)
    *others, last = advise(OnlyLoraHelps(), request, workload, 10)  # type: ignore[arg-type]
    assert last.flags == "--lora_enable True --lora_r 64 --lora_alpha 128"
    assert (last.alone.total, last.together.total) == (1, 1)
    assert {change.alone.total for change in others} == {100}
