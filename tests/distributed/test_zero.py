"""Training under ZeRO gives what training in one process gives, on one rank and on two."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.manifest import what_is_incomplete
from llava_ft.checkpoint.weights import WeightFiles
from tests.conftest import RECORDINGS
from tests.distributed import tasks
from tests.distributed.matrix import ALONE, SHORT, TOLERANCES, Pools, Setting, difference
from tests.distributed.pool import Pool
from tests.training.helpers import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]


@pytest.mark.parametrize(
    ("method", "stage", "dtype"),
    [
        ("lora", "none", "float32"),
        ("lora", "zero1", "bfloat16"),
        ("lora", "zero2", "float32"),
        ("lora", "zero3", "float32"),
        ("lora", "zero3", "bfloat16"),
        ("lora", "zero3_offload", "float32"),
        ("full", "zero2", "bfloat16"),
        ("full", "zero3", "float32"),
        ("projector", "zero3", "float32"),
        ("lora + im_start_end", "zero2", "float32"),
        ("lora + im_start_end", "zero3", "float32"),
    ],
)
def test_two_ranks_give_what_one_process_gives(pools: Pools, method: str, stage: str, dtype: str):
    """Records are in random order, so ranks often have a batch with images beside one without."""
    expected = pools.straight(method, ALONE, dtype).result
    straight = pools.straight(method, Setting(stage, 2), dtype)
    result = straight.result
    assert difference(expected, result) <= TOLERANCES[dtype]
    assert tasks.checkpoints(straight.path) == ["checkpoint-3", "checkpoint-6"]
    assert what_is_incomplete(straight.path) is None
    if dtype == "float32":
        assert set(result.weights) == set(expected.weights)
        # Adam divides a gradient by its size: where it is rounding error alone, the update is any size.
        differ = sum(
            int((value - result.weights[name]).abs().gt(1e-5).sum()) for name, value in expected.weights.items()
        )
        assert differ <= 1e-4 * sum(value.numel() for value in expected.weights.values())


@pytest.mark.parametrize(("stage", "base"), [("zero2", "ckpt/base-llm"), ("zero3", "ckpt/llava15-tiny")])
def test_the_projectors_own_rate_reaches_its_weights_and_biases(pools: Pools, tmp_path: Path, stage: str, base: str):
    """At a rate of 0 the projector stays what it was, and at one it moves; the adapter moves in both.

    Where the base has a projector of its own, another one than is trained, original LLaVA fails under ZeRO-3 with a
    size mismatch.
    """
    before = WeightFiles.open(RECORDINGS / "ckpt/mm_projector.bin").read()
    changes = {"model_name_or_path": base, "mm_projector_lr": 0.0}
    if base != "ckpt/base-llm":
        changes["vision_tower"] = None
    still = pools.train(tmp_path, "lora", Setting(stage, 2), "float32", **changes).weights
    moving = pools.straight("lora", Setting(stage, 2), "float32").result.weights
    for name, value in before.items():
        assert torch.equal(still[name], value.float()), name
        assert not torch.equal(moving[name], value.float()), name
    for weights in (still, moving):
        assert len([name for name, value in weights.items() if "lora_B" in name and bool(value.any())]) == 14


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_lora_checkpoint_holds_no_frozen_weights(pools: Pools, stage: str):
    straight = pools.straight("lora", Setting(stage, 2), "float32")
    checkpoint = straight.path / "checkpoint-3"
    trained_bytes = sum(4 * value.numel() for value in straight.result.weights.values())
    shards = list((checkpoint / "global_step3").iterdir())
    state = sum(path.stat().st_size for path in shards if "optim_states" in path.name)
    assert state < 3 * trained_bytes + 20_000 * 2
    for path in shards:
        if "model_states" in path.name:
            held = torch.load(path, weights_only=True)
            assert {key for key in held["module"] if "lora_" not in key and "mm_projector" not in key} == set()
            assert not held["frozen_param_fragments"]
    names = {path.name for path in checkpoint.iterdir()}
    assert names >= {
        "adapter_model.bin",
        "non_lora_trainables.bin",
        "scheduler.pt",
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_checkpoints_keep_float32_where_the_model_computes_in_bfloat16(pools: Pools, stage: str):
    straight = pools.straight("lora", Setting(stage, 2), "bfloat16")
    saved = WeightFiles.open(straight.path / "checkpoint-6/adapter_model.bin").read()
    some = next(value for key, value in saved.items() if "lora_A" in key)
    assert some.dtype == torch.float32
    assert not torch.equal(some, some.bfloat16().float()), "the master values, not the rounded ones"
    assert any(torch.equal(some, value) for value in straight.result.weights.values())


@pytest.mark.parametrize("stage", ["none", "zero3"])
def test_validation_counts_each_record_once(pools: Pools, tmp_path: Path, stage: str):
    """14 records in batches of 4 on two ranks: the last batches are filled up, and one rank's has no image."""
    changes = {"validation_data_path": "data/mix.json", "eval_strategy": "steps", "eval_steps": 3}
    changes |= {"per_device_eval_batch_size": 4, **SHORT}
    expected = pools.straight("lora", ALONE, "float32", **changes).result.eval_losses
    got = pools.train(tmp_path, "lora", Setting(stage, 2), "float32", **changes).eval_losses
    assert got == pytest.approx(expected, abs=1e-5)
    assert list(got) == [3]


def test_weights_in_4_bits_under_zero_2_and_resumed_elsewhere(pools: Pools, tmp_path: Path):
    expected = pools.straight("lora", ALONE, "float32", bits=4).result
    got = pools.straight("lora", Setting("zero2", 2), "float32", bits=4)
    assert difference(expected, got.result) <= TOLERANCES["float32"]
    resumed = pools.resume(got, tmp_path, "lora", ALONE, "float32", bits=4)
    assert difference(got.result, resumed, first_step=4) <= TOLERANCES["float32"]


def test_weights_in_8_bits_under_zero_2(pools: Pools, tmp_path: Path):
    expected = pools.train(tmp_path / "1", "lora", ALONE, "float32", bits=8, **SHORT)
    got = pools.train(tmp_path / "2", "lora", Setting("zero2", 2), "float32", bits=8, **SHORT)
    assert difference(expected, got) <= TOLERANCES["float32"]


def test_no_rank_holds_the_whole_model_while_it_is_loaded(tmp_path: Path):
    config = json.loads((RECORDINGS / "ckpt/base-llm/config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = {f"self_attn.{name}_proj": (1024, 1024) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024), "mlp.down_proj": (1024, 4096)}
    layer |= {"input_layernorm": (1024,), "post_attention_layernorm": (1024,)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(8) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (1024,), "model.embed_tokens.weight": (4096, 1024), "lm_head.weight": (4096, 1024)}
    torch.save({name: torch.ones(shape, dtype=torch.float16) for name, shape in shapes.items()}, tmp_path / "model.bin")
    (tmp_path / "model.bin").rename(tmp_path / "pytorch_model.bin")
    with contextlib.closing(Pool(2)) as pool:  # ranks that have done nothing else keep no memory of it
        answers = pool.run(tasks.peak_of_loading, str(tmp_path), str(REPOSITORY / "configs/zero3.json"))
    for whole, peak in answers:
        assert whole > 500 * 2**20
        assert peak < 0.7 * whole, "half of the model, and one tensor whole"


def test_memory_is_left_as_it_was_found(pools: Pools):
    """DeepSpeed leaves buffers of 66 MB a rank in shared memory when its own reduction is loaded."""
    pools.straight("lora", Setting("zero2", 2), "float32")
    assert list(Path("/dev/shm").glob("deepspeed*")) == []


def test_without_deepspeed_state_the_message_says_what_to_do(pools: Pools, tmp_path: Path):
    setting = Setting("zero2", 2)
    pools.straight("lora", setting, "float32").copy(tmp_path)
    (tmp_path / "checkpoint-3/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    (tmp_path / "checkpoint-3/llava_ft.json").unlink()
    argv = pools.command(tmp_path, "lora", setting, "float32", resume_from_checkpoint=tmp_path / "checkpoint-3")
    with pytest.raises(AssertionError, match=r"rank_1_.* is missing: of 2 optimizer files"):
        pools.of(2).run(tasks.train, argv)
