"""Training under ZeRO gives what training in one process gives, on one rank and on two."""

import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.manifest import what_is_incomplete
from llava_ft.checkpoint.weights import WeightFiles
from tests.conftest import RECORDINGS
from tests.distributed import tasks
from tests.distributed.matrix import TOLERANCES, Pools, Setting, difference
from tests.distributed.pool import Pool
from tests.training.helpers import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("in_recordings")]

ALONE = Setting("none", 1)


@pytest.fixture(scope="module")
def references(pools: Pools, tmp_path_factory: pytest.TempPathFactory):
    """Runs in one process without DeepSpeed, by method and dtype."""
    made: dict[tuple[str, str], tasks.Result] = {}

    def reference(method: str, dtype: str) -> tasks.Result:
        if (method, dtype) not in made:
            made[method, dtype] = pools.train(tmp_path_factory.mktemp("alone"), method, ALONE, dtype)
        return made[method, dtype]

    return reference


@pytest.mark.parametrize(
    ("method", "stage", "dtype"),
    [
        ("lora", "none", "float32"),
        ("lora", "zero0", "float32"),
        ("lora", "zero1", "float32"),
        ("lora", "zero2", "float32"),
        ("lora", "zero3", "float32"),
        ("lora", "zero3_offload", "float32"),
        ("lora", "zero2", "bfloat16"),
        ("lora", "zero3", "bfloat16"),
        ("full", "zero2_offload", "float32"),
        ("full", "zero3", "float32"),
        ("full", "zero2", "bfloat16"),
        ("projector", "zero3", "float32"),
        ("lora + im_start_end", "zero2", "float32"),
        ("lora + im_start_end", "zero3", "float32"),
    ],
)
def test_two_ranks_give_what_one_process_gives(
    pools: Pools, references, tmp_path: Path, method: str, stage: str, dtype: str
):
    """Records are in random order, so ranks often have a batch with images beside one without."""
    expected = references(method, dtype)
    result = pools.train(tmp_path, method, Setting(stage, 2), dtype)
    assert difference(expected, result) <= TOLERANCES[dtype]
    assert tasks.checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert what_is_incomplete(tmp_path) is None
    if dtype == "float32":
        assert set(result.weights) == set(expected.weights)
        # Adam divides a gradient by its size: where it is rounding error alone, the update is any size.
        differ = sum(
            int((value - result.weights[name]).abs().gt(1e-5).sum()) for name, value in expected.weights.items()
        )
        assert differ <= 1e-4 * sum(value.numel() for value in expected.weights.values())


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_the_projectors_own_rate_reaches_its_weights_and_biases(pools: Pools, tmp_path: Path, stage: str):
    """At a rate of 0 the projector stays what it was, and at one it moves; the adapter moves in both."""
    before = WeightFiles.open(RECORDINGS / "ckpt/mm_projector.bin").read()
    for rate in (0.0, 1e-3):
        result = pools.train(tmp_path / str(rate), "lora", Setting(stage, 2), "float32", mm_projector_lr=rate)
        for name, value in before.items():
            assert torch.equal(result.weights[name], value.float()) == (rate == 0.0), name
        moved = [name for name, value in result.weights.items() if "lora_B" in name and bool(value.any())]
        assert len(moved) == 14


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_lora_checkpoint_holds_no_frozen_weights(pools: Pools, tmp_path: Path, stage: str):
    result = pools.train(tmp_path, "lora", Setting(stage, 2), "float32")
    trained_bytes = sum(4 * value.numel() for value in result.weights.values())
    shards = list((tmp_path / "checkpoint-3/global_step3").iterdir())
    state = sum(path.stat().st_size for path in shards if "optim_states" in path.name)
    assert state < 3 * trained_bytes + 20_000 * 2
    for path in shards:
        if "model_states" in path.name:
            held = torch.load(path, weights_only=True)
            assert {key for key in held["module"] if "lora_" not in key and "mm_projector" not in key} == set()
            assert not held["frozen_param_fragments"]
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert names >= {
        "adapter_model.bin",
        "non_lora_trainables.bin",
        "scheduler.pt",
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_checkpoints_keep_float32_where_the_model_computes_in_bfloat16(pools: Pools, tmp_path: Path):
    for stage in ("zero2", "zero3"):
        result = pools.train(tmp_path / stage, "lora", Setting(stage, 2), "bfloat16", max_steps=3)
        saved = WeightFiles.open(tmp_path / stage / "checkpoint-3/adapter_model.bin").read()
        some = next(value for key, value in saved.items() if "lora_A" in key)
        assert some.dtype == torch.float32
        assert not torch.equal(some, some.bfloat16().float()), "the master values, not the rounded ones"
        assert any(torch.equal(some, value) for value in result.weights.values())


def test_a_llava_base_with_another_projector_is_trained_under_zero_3(pools: Pools, tmp_path: Path):
    """Original LLaVA fails here with a size mismatch."""
    changes = {"model_name_or_path": "ckpt/llava15-tiny", "mm_projector_lr": 0.0, "vision_tower": None}
    result = pools.train(tmp_path, "lora", Setting("zero3", 2), "float32", **changes)
    expected = WeightFiles.open(RECORDINGS / "ckpt/mm_projector.bin").read()
    assert all(torch.equal(result.weights[name], value.float()) for name, value in expected.items())


@pytest.mark.parametrize("stage", ["none", "zero2", "zero3"])
def test_validation_counts_each_record_once(pools: Pools, tmp_path: Path, stage: str):
    """14 records in batches of 4 on two ranks: the last batches are filled up, and one rank's has no image."""
    changes = {"validation_data_path": "data/mix.json", "eval_strategy": "steps", "eval_steps": 3}
    changes |= {"per_device_eval_batch_size": 4, "save_strategy": "no", "max_steps": 3}
    expected = pools.train(tmp_path / "1", "lora", ALONE, "float32", **changes).eval_losses
    got = pools.train(tmp_path / "2", "lora", Setting(stage, 2), "float32", **changes).eval_losses
    assert got == pytest.approx(expected, abs=1e-5)
    assert list(got) == [3]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_under_zero_2_and_resumed_elsewhere(pools: Pools, tmp_path: Path, bits: int):
    expected = pools.train(tmp_path / "1", "lora", ALONE, "float32", bits=bits)
    got = pools.train(tmp_path / "2", "lora", Setting("zero2", 2), "float32", bits=bits)
    assert difference(expected, got) <= TOLERANCES["float32"]
    shutil.rmtree(tmp_path / "2/checkpoint-6")
    resumed = pools.train(tmp_path / "2", "lora", ALONE, "float32", bits=bits)
    assert resumed.resumed == "checkpoint-3"
    assert difference(got, resumed, first_step=4) <= TOLERANCES["float32"]


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


def test_memory_is_left_as_it_was_found(pools: Pools, tmp_path: Path):
    """DeepSpeed leaves buffers of 66 MB a rank in shared memory when its own reduction is loaded."""
    before = set(Path("/dev/shm").glob("deepspeed*"))
    pools.train(tmp_path, "lora", Setting("zero2", 2), "float32", max_steps=1)
    assert set(Path("/dev/shm").glob("deepspeed*")) == before


def test_without_deepspeed_state_the_message_says_what_to_do(pools: Pools, tmp_path: Path):
    pools.train(tmp_path, "lora", Setting("zero2", 2), "float32")
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-3/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    (tmp_path / "checkpoint-3/llava_ft.json").unlink()
    argv = pools.command(
        tmp_path, "lora", Setting("zero2", 2), "float32", resume_from_checkpoint=tmp_path / "checkpoint-3"
    )
    logging.getLogger("llava_ft").setLevel(logging.CRITICAL)
    with pytest.raises(AssertionError, match=r"rank_1_.* is missing: of 2 optimizer files"):
        pools.of(2).run(tasks.train, argv)
