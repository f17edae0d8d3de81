"""Every kind of adapter gives the weights that PEFT gives; what is no low-rank change of linear layers is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.adapter import LoraAdapter, merged
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.merge import MergeOptions, compare_merged, merge
from llava_ft.convert.proof import ConversionReport
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.load import load_model
from llava_ft.tuning.quant import Quantization
from tests.checkpoint.adapters import (
    BASE,
    DECODER,
    merged_by_peft,
    model_with_biases,
    peft_adapter,
    rewrite,
    set_fields,
)
from tests.training.helpers import fixed_logits

pytestmark = [
    pytest.mark.usefixtures("in_recordings"),
    # PEFT says that lora_bias cannot be merged where a layer has no bias, and that rsLoRA goes with patterns.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
        "alpha_pattern": {r"layers\.0\..*": 3, "q_proj": 16},
    },
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 5}},
    "some layers": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    "head and projector": {"target_modules": rf"{DECODER}|lm_head|model\.mm_projector\.[02]"},
    "vision tower too": {"target_modules": ["q_proj", "v_proj"]},
}


def merge_adapter(tmp_path: Path, **options: Any) -> ConversionReport:
    shares = [(1.0, identify(tmp_path / "adapter"))]
    return merge(shares, None, tmp_path / "merged", MergeOptions(verify=False, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_peft_s(tmp_path: Path, kind: str):
    expected = merged_by_peft(peft_adapter(tmp_path / "adapter", **KINDS[kind]))
    report = merge(
        [(1.0, identify(tmp_path / "adapter"))],
        None,
        tmp_path / "merged",
        MergeOptions(verify=False, save_vision_tower=True),
    )
    got = WeightFiles.open(tmp_path / "merged").read()
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    before = load_file(f"{BASE}/model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, got[name])}
    assert {change["name"] for change in report.changed} - changed == set()
    proven = compare_merged(tmp_path / "merged", [(1.0, identify(tmp_path / "adapter"))], None)
    assert all(entry["max_difference"] < 1e-5 * entry["scale"] for entry in proven.logits)
    assert all(answer["equal"] for answer in proven.answers)


def test_lora_bias_is_added_to_the_bias(tmp_path: Path):
    base = model_with_biases(tmp_path / "base")
    target = r".*layers\.\d+\.self_attn\.[qkvo]_proj"
    expected = merged_by_peft(peft_adapter(tmp_path / "adapter", base, lora_bias=True, target_modules=target))
    merge_adapter(tmp_path)
    got = WeightFiles.open(tmp_path / "merged").read()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(got[name], load_file(f"{base}/model.safetensors")[name])
    proven = compare_merged(tmp_path / "merged", [(1.0, identify(tmp_path / "adapter"))], None)
    assert all(entry["max_difference"] < 1e-5 * entry["scale"] for entry in proven.logits)


def test_dora_answers_the_same_added_beside_and_merged(tmp_path: Path):
    peft_adapter(tmp_path / "adapter", use_dora=True)
    logits = [
        fixed_logits(load_model(str(tmp_path / "adapter"), device="cpu", adapter=adapter))
        for adapter in ("added", "beside")
    ]
    plain = fixed_logits(load_model(BASE, device="cpu"))
    for added, beside, without in zip(*logits, plain, strict=True):
        torch.testing.assert_close(added, beside, atol=1e-4, rtol=1e-5)
        assert (added - without).abs().max() > 0.1


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"])
def test_other_spellings_of_the_magnitude(tmp_path: Path, spelling: str):
    peft_adapter(tmp_path / "adapter", use_dora=True)
    before = LoraAdapter.read(identify(tmp_path / "adapter"))
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = {key.replace("lora_magnitude_vector", spelling): value for key, value in load_file(file).items()}
    assert any(spelling in key for key in weights)
    save_file(weights, file)
    after = LoraAdapter.read(identify(tmp_path / "adapter"))
    assert before.magnitudes.keys() == after.magnitudes.keys()
    assert all(torch.equal(before.magnitudes[name], after.magnitudes[name]) for name in before.magnitudes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_there_is_one_rounding(tmp_path: Path, kind: str, dtype: torch.dtype):
    peft_adapter(tmp_path / "adapter", **KINDS[kind])
    adapter = LoraAdapter.read(identify(tmp_path / "adapter"))
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(f"{BASE}/model.safetensors")[name].to(dtype)
    a, b = (matrix.double() for matrix in adapter.factors[name])
    exact = weight.double() + adapter.scales[name] * (b @ a)
    if kind == "dora":
        exact *= (adapter.magnitudes[name].double() / exact.norm(dim=1))[:, None]
    rounded = merged(name, weight, [(1.0, adapter)], dtype)
    # Half a unit in the last place, and float32's own error where the exact value is next to the middle of two.
    assert (rounded.double() - exact).abs().max() <= 0.5001 * torch.finfo(dtype).eps * exact.abs().max()
    assert ((rounded.double() - exact).abs() <= 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


def test_biases_that_were_trained_beside_replace_the_base_s(tmp_path: Path):
    base = model_with_biases(tmp_path / "base")
    peft_adapter(tmp_path / "adapter", base)
    key = "base_model.model.model.layers.0.self_attn.q_proj.bias"
    rewrite(tmp_path / "adapter", lambda weights: weights.update({key: torch.full((64,), 0.5)}))
    merge_adapter(tmp_path)
    got = WeightFiles.open(tmp_path / "merged").read(["model.layers.0.self_attn.q_proj.bias"])
    assert all(bool((tensor == 0.5).all()) for tensor in got.values())


REFUSED = [
    ({}, {"peft_type": "LOHA"}, "an adapter of the kind LOHA; only LoRA, rsLoRA and DoRA are supported"),
    ({}, {"fan_in_fan_out": True}, "fan_in_fan_out=True, with which its matrices are no plain change"),
    ({}, {"layer_replication": [[0, 2]]}, "layer_replication="),
    ({}, {"trainable_token_indices": [3]}, "trainable_token_indices="),
    ({}, {"init_lora_weights": "pissa_niter_4"}, "training began by changing the base's weights"),
    ({}, {"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    ({}, {"use_dora": True}, "use_dora is True, but 0 of 14 modules have a lora_magnitude_vector"),
    ({"use_dora": True}, {"use_dora": False}, "use_dora is False, but 14 of 14 modules have"),
    ({"use_dora": True}, {"lora_bias": True}, "use_dora and lora_bias, whose bias PEFT scales"),
    ({"lora_bias": True}, {}, "adds to the layers' biases, but model.layers.0.*have none to hold the sum"),
    ({"target_modules": ["embed_tokens", "q_proj"]}, {}, "LoRA on the embeddings. Only linear layers are merged"),
]


@pytest.mark.parametrize(("made_with", "settings", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_what_is_no_change_of_linear_layers_is_refused(tmp_path: Path, made_with: dict, settings: dict, message: str):
    peft_adapter(tmp_path / "adapter", **made_with)
    set_fields(tmp_path / "adapter/adapter_config.json", **settings)
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path / "adapter"), device="cpu")
    assert not (tmp_path / "merged").exists()


def test_matrices_that_do_not_fit_each_other_are_refused(tmp_path: Path):
    peft_adapter(tmp_path / "adapter")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    rewrite(tmp_path / "adapter", lambda weights: weights.update({key: torch.ones(3, 64)}))
    with pytest.raises(CheckpointError, match=r"the two LoRA matrices of model\.layers\.0\.mlp\.up_proj do not fit"):
        LoraAdapter.read(identify(tmp_path / "adapter"))


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path: Path):
    peft_adapter(tmp_path / "adapter")
    key = "base_model.model.model.mm_projector.9.weight"
    rewrite(tmp_path / "adapter", lambda weights: weights.update({key: torch.ones(3)}))
    with pytest.raises(CheckpointError, match="for which the model has no place"):
        merge_adapter(tmp_path)


def test_dora_on_quantised_weights(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    peft_adapter(tmp_path / "adapter", use_dora=True)
    quantization = Quantization(4)
    merge_adapter(tmp_path, quantization=quantization)
    proven = compare_merged(
        tmp_path / "merged", [(1.0, identify(tmp_path / "adapter"))], None, MergeOptions(quantization=quantization)
    )
    assert all(entry["max_difference"] < 1e-5 * entry["scale"] for entry in proven.logits)
    with pytest.raises(UserError, match="beside weights in 8 bits PEFT loses their scales on a CPU"):
        load_model(str(tmp_path / "adapter"), device="cpu", quantization=Quantization(8))
