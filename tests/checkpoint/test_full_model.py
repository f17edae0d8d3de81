"""A model as a stream: what comes, in which order and type, and how much memory a merge takes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.full_model import open_full_model
from llava_ft.checkpoint.save import ShardWriter
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.cli import main
from llava_ft.convert.merge import MergeOptions, merge
from llava_ft.inference.load import load_model
from tests.checkpoint.adapters import peft_adapter
from tests.conftest import RECORDINGS
from tests.training.helpers import fixed_logits, train

pytestmark = pytest.mark.usefixtures("in_recordings")

LORA = Path("train/lora/llava-tiny-lora")


@pytest.mark.parametrize("with_tower", [False, True])
@pytest.mark.parametrize("path", [LORA, Path("ckpt/llava1-tiny-linear")])
def test_names_and_layout_are_those_of_the_stream(path: Path, with_tower: bool):
    whole = open_full_model(identify(path), "ckpt/base-llm" if path == LORA else None)
    pieces = list(whole.stream(with_tower=with_tower))
    layout = whole.layout(with_tower=with_tower)
    assert [piece.name for piece in pieces] == whole.names(with_tower=with_tower) == list(layout)
    assert [(tuple(piece.value.shape), piece.value.dtype) for piece in pieces] == list(layout.values())
    assert any(piece.origin == "tower" for piece in pieces) == (with_tower and path == LORA)


def test_every_piece_says_where_it_comes_from():
    whole = open_full_model(identify(LORA), "ckpt/base-llm")
    origins = {piece.name: piece.origin for piece in whole.stream(with_tower=True)}
    assert {origin: list(origins.values()).count(origin) for origin in ("frozen", "changed", "replaced", "tower")} == {
        "frozen": 7,
        "changed": 14,
        "replaced": 4,
        "tower": 55,
    }
    assert origins["model.embed_tokens.weight"] == "frozen"
    assert origins["model.layers.0.mlp.up_proj.weight"] == "changed"
    assert origins["model.mm_projector.0.bias"] == "replaced"


def test_the_type_of_a_frozen_tensor_is_kept_unless_another_is_asked_for(tmp_path: Path):
    shutil.copytree("ckpt/base-llm", tmp_path / "base")
    weights = load_file("ckpt/base-llm/model.safetensors")
    mixed = {name: value if "norm" in name else value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(mixed, tmp_path / "base/model.safetensors")
    whole = open_full_model(identify(LORA), str(tmp_path / "base"))
    assert whole.dtype == torch.bfloat16
    for piece in whole.stream(with_tower=False):
        assert piece.value.dtype == (torch.float32 if "norm" in piece.name else torch.bfloat16), piece.name
    assert {piece.value.dtype for piece in whole.stream(torch.float16, with_tower=True)} == {torch.float16}


def test_a_merge_of_mixed_types_keeps_them_and_is_proven(tmp_path: Path):
    shutil.copytree("ckpt/base-llm", tmp_path / "base")
    weights = load_file("ckpt/base-llm/model.safetensors")
    mixed = {name: value if "norm" in name else value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(mixed, tmp_path / "base/model.safetensors")
    report = merge([(1.0, identify(LORA))], str(tmp_path / "base"), tmp_path / "merged", MergeOptions(verify=False))
    assert report.frozen == {"tensors": 7, "bit_identical": True}


def test_rows_of_added_tokens_of_a_projector_run_are_merged(tmp_path: Path):
    changes = {"mm_use_im_start_end": "True", "learning_rate": "0.1", "save_strategy": "no", "max_steps": "2"}
    train(tmp_path / "out", "projector", **changes)
    argv = ["merge", "--model-path", str(tmp_path / "out"), "--model-base", "ckpt/base-llm"]
    assert main([*argv, "--save-model-path", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    merged = WeightFiles.open(tmp_path / "merged").read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    rows = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)["model.embed_tokens.weight"]
    assert merged.shape == (514, 64)
    torch.testing.assert_close(merged[-2:], rows[-2:].float())
    beside = fixed_logits(load_model(str(tmp_path / "out"), "ckpt/base-llm", device="cpu"))
    for one, other in zip(beside, fixed_logits(load_model(str(tmp_path / "merged"), device="cpu")), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_tower_that_an_adapter_changes_is_part_of_the_result(tmp_path: Path):
    peft_adapter(tmp_path / "adapter", "ckpt/llava15-tiny", target_modules=["q_proj"])
    whole = open_full_model(identify(tmp_path / "adapter"), "ckpt/llava15-tiny")
    assert any("vision_tower" in name for name in whole.names(with_tower=False))


def test_the_base_s_value_is_the_file_s():
    whole = open_full_model(identify(LORA), "ckpt/base-llm")
    name = "model.layers.1.mlp.down_proj.weight"
    before = whole.before(name)
    assert before is not None
    assert torch.equal(before, load_file("ckpt/base-llm/model.safetensors")[name])
    assert whole.before("model.mm_projector.0.bias") is None


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300])
def test_shards_are_the_library_s_byte_for_byte(tmp_path: Path, max_shard_bytes: int):
    torch.manual_seed(0)
    tensors = {
        "b.weight": torch.randn(5, 7).to(torch.bfloat16),
        "a.weight": torch.randn(3, 3),
        "ä": torch.randn(9).to(torch.float16),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "c.weight": torch.randn(20, 20).T,
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False]),
    }
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    (tmp_path / "ours").mkdir()
    writer = ShardWriter(tmp_path / "ours", layout, max_shard_bytes=max_shard_bytes)
    for name in reversed(tensors):
        writer.add(name, tensors[name])
    writer.finish()
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) == (1 if max_shard_bytes == 10**9 else 3)
    for file in files:
        held = load_file(file)
        save_file({name: tensors[name].contiguous() for name in held}, tmp_path / "library", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "library").read_bytes()
    read = WeightFiles.open(tmp_path / "ours").read()
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


PEAK = """
import sys
from llava_ft.cli import main

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def merge(adapter, base, target, *more):
    assert main(["merge", "--model-path", adapter, "--model-base", base, "--save-model-path", target, *more]) == 0

merge("train/lora/llava-tiny-lora", "ckpt/base-llm", sys.argv[3] + "-first", "--no-verify")  # loads all libraries
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
merge(*sys.argv[1:], "--no-verify")
print(memory("VmHWM") - before)
"""


def write_large_model(directory: Path, layout: str) -> int:
    """Write a language model of some 300 MB in bfloat16, and return the size of an adapter beside it."""
    directory.mkdir()
    config = json.loads((RECORDINGS / "ckpt/base-llm/config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "vocab_size": 4096}
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(RECORDINGS / "ckpt/base-llm" / name, directory)
    shapes = {f"self_attn.{name}_proj": (1024, 1024) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024), "mlp.down_proj": (1024, 4096)}
    weights, adapter = {}, {}
    for layer in range(9):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = torch.full(shape, 0.01, dtype=torch.bfloat16)
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            adapter[f"{prefix}.lora_A.weight"] = torch.full((16, shape[1]), 0.01)
            adapter[f"{prefix}.lora_B.weight"] = torch.full((shape[0], 16), 0.01)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(1024, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.full((4096, 1024), 0.01, dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(1024, dtype=torch.bfloat16)
    if layout == "bin":
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        save_file(weights, directory / "model.safetensors")
    (directory / "adapter").mkdir()
    save_file(adapter, directory / "adapter/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
    (directory / "adapter/adapter_config.json").write_text(json.dumps(settings))
    return sum(tensor.nbytes for tensor in adapter.values())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["safetensors", "bin"])
def test_a_merge_peaks_at_a_quarter_above_its_largest_shard(tmp_path: Path, source: str):
    adapter_bytes = write_large_model(tmp_path / "base", source)
    argv = [str(tmp_path / "base/adapter"), str(tmp_path / "base"), str(tmp_path / "merged")]
    child = subprocess.run([sys.executable, "-c", PEAK, *argv], capture_output=True, text=True, check=True)
    largest = max(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors"))
    assert largest > 300 * 10**6
    assert int(child.stdout) <= 1.25 * largest + adapter_bytes
