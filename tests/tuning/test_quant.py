"""Quantised weights: which they are, what they are worth, and what they take."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from llava_ft.checkpoint.model import find_model, load_base
from llava_ft.errors import RunError, UserError
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.models.parts import language_model_linears
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.quant import (
    Quantization,
    check_quantization,
    check_quantized,
    dtype_name,
    is_quantized,
    size_in_memory,
)
from tests.conftest import RECORDINGS

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("in_recordings")

NF4 = Quantization(4)
KINDS = [NF4, Quantization(4, "nf4", False), Quantization(4, "fp4", True), Quantization(8)]
kinds = pytest.mark.parametrize("quantization", KINDS, ids=str)
IDS = torch.tensor([[1, 5, 9, 300, 17, 42, 7, 11]])


def load(
    quantization: Quantization | None, dtype: torch.dtype = torch.float32, path: str = "ckpt/llava15-tiny"
) -> LlavaForCausalLM:
    base = find_model(path, vision_tower="ckpt/clip-tiny" if "llava" in path else None)
    return load_base(base, dtype_of=lambda name: dtype, quantization=quantization)[0]


def dequantized(quantization: Quantization) -> LlavaForCausalLM:
    """The model in float32, with the values that its linear layers have after quantisation."""
    model = load(None)
    for name in language_model_linears(model):
        linear = model.get_submodule(name)
        linear.weight.data = quantization.round_trip(linear.weight.data)
    return model


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder_s_linear_layers_are_quantised_and_nothing_else(quantization: Quantization, dtype: torch.dtype):
    model = load(quantization, dtype)
    packed = {name.removesuffix(".weight") for name, p in model.named_parameters() if not p.is_floating_point()}
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    leaves += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert packed == {f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in leaves}
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    assert not any(p.requires_grad for p in model.parameters())


@kinds
def test_the_weights_are_those_that_transformers_makes(quantization: Quantization):
    theirs = LlamaForCausalLM.from_pretrained(
        "ckpt/base-llm",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=quantization.bits == 4,
            load_in_8bit=quantization.bits == 8,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.double_quant,
        ),
    )
    ours = load(quantization, path="ckpt/base-llm")
    for name in language_model_linears(ours):
        a, b = ours.get_submodule(name).weight, theirs.get_submodule(name).weight
        assert torch.equal(a.data, b.data), name
        if quantization.bits == 8:
            assert torch.equal(a.SCB, b.SCB)
        else:
            assert torch.equal(a.quant_state.absmax, b.quant_state.absmax)
            assert a.quant_state.nested == b.quant_state.nested == quantization.double_quant


@kinds
def test_a_layer_computes_with_the_round_trip_of_its_weight(quantization: Quantization):
    """While training on a CPU 8-bit layers do not round their inputs, so all kinds are exact."""
    model, reference = load(quantization).train(), dequantized(quantization).train()
    with torch.no_grad():
        expected, got = reference(input_ids=IDS).logits, model(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-5 if quantization.bits == 8 else 0, rtol=0)
    assert not torch.allclose(expected, load(None)(input_ids=IDS).logits, atol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_depend_on_the_files_and_not_on_the_compute_dtype(bits):
    one, other = load(Quantization(bits)), load(Quantization(bits), torch.bfloat16)
    for name in language_model_linears(one):
        assert torch.equal(one.get_submodule(name).weight.data, other.get_submodule(name).weight.data)


@pytest.mark.parametrize("disk", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_on_disk_can_be_quantised(tmp_path: Path, disk: torch.dtype):
    weights = {name: value.to(disk) for name, value in load_file("ckpt/base-llm/model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(Path("ckpt/base-llm/config.json").read_text())
    model = load(NF4, path=str(tmp_path))
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert state.dtype == torch.float32
    assert torch.isfinite(model(input_ids=IDS).logits).all()


@kinds
def test_an_evaluation_between_two_steps_changes_nothing(quantization: Quantization):
    """The kernels that bitsandbytes has for evaluating on some CPUs repack the weights, and have no gradient."""
    model = add_lora(load(quantization), r=4, alpha=8, dropout=0.0)
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name}

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in trained.items()}

    before = gradients()
    weights = {name: p.data.clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    after = gradients()
    assert all(torch.count_nonzero(g) > 0 for g in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(weights[name], model.get_parameter(name).data) for name in weights)


@pytest.mark.parametrize("bits", [4, 8])
def test_peft_uses_its_layers_for_quantised_weights(bits):
    model = add_lora(load(Quantization(bits)), r=4, alpha=8, dropout=0.0)
    layers = {type(m).__module__ for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    assert layers == {"peft.tuners.lora.bnb", "bitsandbytes.nn.modules"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert sum("lora_" in name for name, _ in model.named_parameters()) == 2 * 7 * 2


def test_the_check_finds_a_layer_too_few_and_one_too_many():
    model = load(NF4)
    check_quantized(model, NF4)
    wanted = "should be nf4 .double-quantised. but are not"
    with pytest.raises(RunError, match=r"model\.layers\.0\.mlp\.down_proj.* are quantised"):
        check_quantized(model, None)
    with pytest.raises(RunError, match="should be fp4 but are not"):
        check_quantized(model, Quantization(4, "fp4", False))
    packed = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)
    with pytest.raises(RunError, match=rf"model\.layers\.0\.mlp\.up_proj {wanted}\. Does the installed bitsandbytes"):
        check_quantized(model, NF4)
    model.model.layers[0].mlp.up_proj = packed
    model.lm_head = load(NF4).model.layers[0].self_attn.q_proj
    with pytest.raises(RunError, match="they alone, should be quantised: lm_head are quantised"):
        check_quantized(model, NF4)


def test_sizes_and_names():
    layer = load(NF4).model.layers[0].self_attn.q_proj
    blocks = 64 * 64 // 64
    assert is_quantized(layer)
    assert size_in_memory(layer.weight) == (64 * 64, 64 * 64 // 2 + blocks + 4 + 4)
    layer = load(Quantization(4, "fp4", False)).model.layers[0].self_attn.q_proj
    assert size_in_memory(layer.weight) == (64 * 64, 64 * 64 // 2 + 4 * blocks)
    assert dtype_name(layer.weight) == "fp4"
    layer = load(Quantization(8)).model.layers[0].self_attn.q_proj
    assert size_in_memory(layer.weight) == (64 * 64, 64 * 64 + 4 * 64)
    assert dtype_name(layer.weight) == "int8"
    plain = nn.Linear(3, 5, dtype=torch.bfloat16)
    assert not is_quantized(plain)
    assert size_in_memory(plain.weight) == (15, 30)
    assert dtype_name(plain.weight) == "bfloat16"


def test_flags_become_a_quantisation():
    assert Quantization.from_flags(16, "nf4", True) is None
    assert Quantization.from_flags(8, "fp4", False) == Quantization(8)
    assert str(Quantization.from_flags(4, "nf4", True)) == "nf4 (double-quantised)"
    assert str(Quantization.from_flags(4, "fp4", False)) == "fp4"


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    check_quantization(None, zero_stage=3)
    check_quantization(NF4, zero_stage=2)
    with pytest.raises(UserError, match=r"bits=4 does not work with ZeRO stage 3.*Use stage 2"):
        check_quantization(NF4, zero_stage=3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bits=8: .* not installed\. Install it with pip install llava-ft\[qlora\]"):
        check_quantization(Quantization(8))


PEAK = """
import re, sys, torch
from llava_ft.checkpoint.model import find_model, load_base
from llava_ft.tuning.quant import Quantization, size_in_memory
import bitsandbytes
bitsandbytes.functional.quantize_4bit(torch.ones(64, 64))
bitsandbytes.functional.int8_vectorwise_quant(torch.ones(64, 64, dtype=torch.float16))
small = find_model(sys.argv[3])  # first, so that the code it takes is in memory already
load_base(small, dtype_of=lambda name: torch.bfloat16, quantization=Quantization(int(sys.argv[2])))
base = find_model(sys.argv[1])

def memory(what):  # ru_maxrss would begin with that of the parent process
    return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = memory("VmRSS")
model, _ = load_base(base, dtype_of=lambda name: torch.bfloat16, quantization=Quantization(int(sys.argv[2])))
after = memory("VmRSS") - before
print(memory("VmHWM") - before, after, sum(size_in_memory(p)[1] for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_loading_never_holds_the_16_bit_model(tmp_path: Path, bits: int):
    """The peak is the quantised model, the mapped part of the file and what quantising one tensor takes."""
    config = json.loads((RECORDINGS / "ckpt/base-llm/config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = dict.fromkeys([f"self_attn.{x}_proj" for x in "qkvo"], (1024, 1024))
    shapes |= {"mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024), "mlp.down_proj": (1024, 4096)}
    weights = {"model.norm.weight": torch.ones(1024, dtype=torch.bfloat16)}
    for layer in range(16):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(1024, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.ones(4096, 1024, dtype=torch.bfloat16)
    save_file(weights, tmp_path / "model.safetensors")
    size_on_disk = sum(value.nbytes for value in weights.values())
    del weights
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(bits), str(RECORDINGS / "ckpt/base-llm")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, after, size = map(int, done.stdout.split())
    largest_tensor, mapping = 2 * 4096 * 1024, 128 * 2**20
    assert size < (0.3 if bits == 4 else 0.55) * size_on_disk
    assert after <= size + 64 * 2**20
    assert peak <= size + mapping + 16 * largest_tensor  # 9 to 13 were seen: pages are given back when they are
    assert peak < size_on_disk
