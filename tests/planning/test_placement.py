"""What a rank holds, in numbers that were worked out by hand."""

from collections.abc import Sequence
from typing import Literal

import pytest
import torch

from llava_ft.planning.model import ParameterShape
from llava_ft.planning.placement import KINDS, TEMPORARIES, Placement, optimizer_kind, place
from llava_ft.planning.request import Machine, PlanRequest, ZeroSettings
from llava_ft.tuning.plan import PartPlan, TuningPlan
from llava_ft.tuning.recompute import Recomputation
from tests.planning.helpers import plan_of, write_configs

F32, BF16 = torch.float32, torch.bfloat16
TRAINED, FROZEN = 1_000_000, 4_000_000


def shapes(dtype: torch.dtype) -> list[ParameterShape]:
    return [
        ParameterShape("mm_projector.weight", "projector", (1000, 1000), True, F32),
        ParameterShape("b", "language model", (2000, 2000), False, dtype),
    ]


def placed(
    dtype: torch.dtype,
    zero: ZeroSettings | None,
    gpus: int = 1,
    optimizer: str = "adamw_torch",
    *,
    device: Literal["cuda", "cpu"] = "cuda",
    accumulation: int = 1,
    projector_has_own_rate: bool = False,
    more: Sequence[ParameterShape] = (),
) -> Placement:
    request = PlanRequest(
        machine=Machine(device, gpus),
        tuning=TuningPlan({"projector": PartPlan("full", learning_rate=1e-5 if projector_has_own_rate else None)}),
        lora=None,
        quantization=None,
        compute_dtype=dtype,
        attention="sdpa",
        recomputation=Recomputation(),
        batch_size=1,
        accumulation=accumulation,
        optimizer=optimizer,
        zero=zero,
    )
    return place([*shapes(dtype), *more], request)


class TestWithoutDeepSpeed:
    def test_what_is_trained_is_float32(self):
        found = placed(BF16, None)
        assert found.weights == 4 * TRAINED + 2 * FROZEN
        assert found.optimizer == 8 * TRAINED
        assert found.step_gradients == 4 * TRAINED
        assert found.buckets == 0

    def test_several_ranks_have_a_second_set_of_gradients(self):
        assert placed(BF16, None, gpus=2).buckets == 4 * TRAINED


class TestStages:
    def test_stage_2_divides_optimizer_and_gradients(self):
        found = placed(BF16, ZeroSettings(2, reduce_bucket_size=1000, overlap_comm=True), gpus=4)
        assert found.weights == 2 * (TRAINED + FROZEN)
        assert found.optimizer == (4 + 8) * TRAINED // 4
        assert found.backward_gradients == 2 * TRAINED // 4
        assert found.backward_buckets == 2 * 1000 * 2 + 2 * 1000
        assert found.gradients == "handed over"

    def test_stage_2_keeps_what_accumulates_beside_what_arrives(self):
        found = placed(BF16, ZeroSettings(2), gpus=4, accumulation=2)
        assert found.backward_gradients == 2 * 2 * TRAINED // 4
        assert placed(BF16, ZeroSettings(1), gpus=4, accumulation=2).gradients == "accumulated"

    def test_parameters_with_a_rate_of_their_own_are_updated_apart(self):
        more = [ParameterShape("c", "LoRA", (500, 500), True, F32)]
        for has_own_rate, together in ((False, TRAINED + 250_000), (True, TRAINED)):
            found = placed(BF16, ZeroSettings(2), projector_has_own_rate=has_own_rate, more=more)
            assert found.step_gradients == 2 * (TRAINED + 250_000) + 4 * together

    def test_stage_1_keeps_gradients_whole(self):
        assert placed(BF16, ZeroSettings(1), gpus=4).gradients == "fresh"

    def test_stage_3_divides_everything(self):
        zero = ZeroSettings(3, reduce_bucket_size=1000, param_persistence_threshold=10)
        found = placed(BF16, zero, gpus=4)
        assert found.weights == 2 * (TRAINED + FROZEN) // 4
        assert found.optimizer == (4 + 8) * TRAINED // 4
        assert found.gathered == 2 * (TRAINED + FROZEN + FROZEN)  # all within the reuse distance, the largest twice

    def test_stage_3_gathers_less_with_a_shorter_distance(self):
        short = {"prefetch_bucket_size": 100, "param_persistence_threshold": 10}
        zero = ZeroSettings(3, max_reuse_distance=2 * FROZEN, **short)
        assert placed(BF16, zero, gpus=4).gathered == 2 * (FROZEN + 100 + FROZEN)
        zero = ZeroSettings(3, max_reuse_distance=200, **short)
        assert placed(BF16, zero, gpus=4).gathered == 2 * (FROZEN + FROZEN)  # what arrives, and its copy

    def test_small_parameters_stay_whole(self):
        zero = ZeroSettings(3, param_persistence_threshold=TRAINED + 1)
        assert placed(BF16, zero, gpus=4).weights == 2 * (TRAINED + FROZEN) // 4 + 2 * TRAINED

    def test_one_rank_gathers_nothing(self):
        assert placed(BF16, ZeroSettings(3)).gathered == 0

    def test_offload_moves_the_optimizer_to_the_host(self):
        found = placed(BF16, ZeroSettings(2, offload_optimizer=True), gpus=4)
        assert found.optimizer == found.step_gradients == 0
        share = TRAINED // 4
        assert found.host == {
            "master weights": 4 * share,
            "optimizer state": 8 * share,
            "gradients": 4 * share,
            "buffers": 2 * share,
        }

    @pytest.mark.parametrize(("stage", "values"), [(2, TRAINED // 4), (3, 1000)])
    def test_where_there_is_no_gpu_an_offloaded_step_takes_room_on_the_host(self, stage, values):
        zero = ZeroSettings(stage, offload_optimizer=True, sub_group_size=1000)
        assert TEMPORARIES not in placed(BF16, zero, gpus=4).host
        assert placed(BF16, zero, gpus=4, device="cpu").host[TEMPORARIES] == 4 * 2 * values

    def test_offload_of_weights(self):
        zero = ZeroSettings(3, offload_optimizer=True, offload_param=True, param_persistence_threshold=10)
        found = placed(BF16, zero, gpus=4)
        assert found.weights == 0
        assert found.host["weights"] == 2 * (TRAINED + FROZEN) // 4

    def test_float32_has_master_weights_too(self):
        assert placed(F32, ZeroSettings(2), gpus=2).optimizer == (4 + 8) * TRAINED // 2


class TestOptimizers:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("adamw_torch", 8 * TRAINED),
            ("sgd", 0),
            ("adafactor", 4 * 2000),
            ("lion_32bit", 4 * TRAINED),
            ("adamw_8bit", 2 * (TRAINED + 4 * 3907)),
            ("paged_adamw_8bit", 2 * (TRAINED + 4 * 3907)),
        ],
    )
    def test_state(self, name, expected):
        assert placed(BF16, None, optimizer=name).optimizer == expected

    def test_small_parameters_have_32_bit_state(self):
        assert KINDS["adamw_8bit"].state_bytes([(4095,)]) == 8 * 4095
        assert KINDS["adamw_8bit"].state_bytes([(4096,)]) == 2 * (4096 + 4 * 16)

    def test_an_unknown_one_is_counted_like_adamw_and_said(self, tmp_path):
        assert optimizer_kind("schedule_free_adamw").state_bytes([(10,)]) == 80
        plan = plan_of([*write_configs(tmp_path), "--optim", "galore_adamw"])
        assert "optim galore_adamw is not known" in plan.notes[-1]

    @pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adagrad", "rmsprop"])
    def test_torch_keeps_as_much(self, name):
        classes = {"adamw_torch": "AdamW", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop"}
        parameter = torch.nn.Parameter(torch.ones(64, 32))
        optimizer = getattr(torch.optim, classes[name])([parameter], lr=0.1)
        parameter.grad = torch.ones(64, 32)
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        assert sum(value.nbytes for value in state if value.dim()) == KINDS[name].state_bytes([(64, 32)])

    @pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
    def test_bitsandbytes_keeps_as_much(self, name):
        bnb = pytest.importorskip("bitsandbytes")
        classes = {"adamw_8bit": bnb.optim.AdamW8bit, "lion_8bit": bnb.optim.Lion8bit}
        parameter = torch.nn.Parameter(torch.ones(128, 65))
        optimizer = classes[name]([parameter], lr=0.1)
        parameter.grad = torch.ones(128, 65)
        optimizer.step()
        state = {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        kept = sum(value.nbytes for key, value in state.items() if not key.startswith("qmap"))
        assert kept == KINDS[name].state_bytes([(128, 65)])


class TestSettings:
    def test_auto_becomes_what_transformers_makes_of_it(self):
        config = {
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
        }
        settings = ZeroSettings.from_config(config, hidden_size=4096)
        assert settings.reduce_bucket_size == 4096 * 4096
        assert settings.prefetch_bucket_size == int(0.9 * 4096 * 4096)
        assert settings.overlap_comm

    def test_defaults_are_those_of_deepspeed(self):
        config = pytest.importorskip("deepspeed.runtime.zero.config")
        for stage in (2, 3):
            theirs = config.DeepSpeedZeroConfig(stage=stage)
            ours = ZeroSettings.from_config({"zero_optimization": {"stage": stage}}, hidden_size=64)
            for name in (
                *("reduce_bucket_size", "overlap_comm", "prefetch_bucket_size", "param_persistence_threshold"),
                *("max_live_parameters", "max_reuse_distance", "sub_group_size"),
            ):
                assert getattr(ours, name) == getattr(theirs, name), name

    def test_a_size_that_is_no_number(self):
        with pytest.raises(ValueError, match=r"reduce_bucket_size .* is 'big'.*whole number of values, or auto"):
            ZeroSettings.from_config({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, hidden_size=64)
