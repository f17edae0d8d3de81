"""The loader: one pass, a ledger, and no weight that nobody asked for."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.fingerprint import language_model_fingerprint
from llava_ft.checkpoint.model import find_model, load_base
from llava_ft.errors import CheckpointError, UserError
from tests.conftest import RECORDINGS

pytestmark = pytest.mark.usefixtures("in_recordings")

WISHES = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}


def load(path, **options):
    wishes = options.pop("wishes", None)
    grown = options.pop("num_new_rows", 0)
    base = find_model(str(path), wishes=wishes, **options)
    return load_base(base, num_new_rows=grown, dtype_of=lambda name: torch.float32)


def test_three_sources_make_one_model(caplog: pytest.LogCaptureFixture):
    model, ledger = load(
        "ckpt/base-llm", vision_tower="ckpt/clip-tiny", projector_file="ckpt/mm_projector.bin", wishes=WISHES
    )
    assert ledger.loaded == {
        ("head", "base model ckpt/base-llm"): 1,
        ("embeddings", "base model ckpt/base-llm"): 1,
        ("language model", "base model ckpt/base-llm"): 19,
        ("vision tower", "vision tower ckpt/clip-tiny"): 55,
        ("projector", "projector ckpt/mm_projector.bin"): 4,
    }
    whole = load_file("ckpt/llava15-tiny/model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[name]), name
    with caplog.at_level(logging.INFO):
        ledger.log()
    assert "Weights: projector: 4 tensors" in caplog.text


def test_a_language_model_without_a_tower_is_text_only():
    model, _ = load("ckpt/base-llm")
    assert not model.has_vision
    assert model(input_ids=torch.tensor([[1, 5, 9]])).logits.shape == (1, 3, 512)


def test_a_projector_that_nobody_gave_is_new_and_depends_on_the_seed_alone():
    torch.manual_seed(3)
    first, ledger = load("ckpt/base-llm", vision_tower="ckpt/clip-tiny", wishes=WISHES)
    torch.manual_seed(3)
    second, _ = load("ckpt/base-llm", vision_tower="ckpt/clip-tiny", wishes=WISHES)
    assert set(ledger.initialised) == {f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    assert torch.equal(first.model.mm_projector[0].weight, second.model.mm_projector[0].weight)
    assert first.model.mm_projector[0].weight.std() > 0.01


def test_a_projector_file_wins_over_the_checkpoint(tmp_path: Path):
    other = {key: value + 1 for key, value in torch.load("ckpt/mm_projector.bin", weights_only=True).items()}
    torch.save(other, tmp_path / "mm_projector.bin")
    model, _ = load("ckpt/llava15-tiny", projector_file=str(tmp_path / "mm_projector.bin"))
    assert torch.equal(model.model.mm_projector[0].bias, other["model.mm_projector.0.bias"])


def test_new_rows_start_from_the_mean():
    model, ledger = load("ckpt/base-llm", num_new_rows=2)
    weight = model.get_input_embeddings().weight
    assert weight.shape == (514, 64)
    torch.testing.assert_close(weight[512:], weight[:512].mean(dim=0).expand(2, -1))
    assert ledger.grown == {"model.embed_tokens.weight": 2, "lm_head.weight": 2}


def test_the_whole_clip_directory_may_be_there(tmp_path: Path):
    tower = tmp_path / "clip"
    shutil.copytree("ckpt/clip-tiny", tower)
    weights = load_file(tower / "model.safetensors")
    save_file(
        weights | {"text_model.final_layer_norm.bias": torch.ones(4), "logit_scale": torch.ones(1)},
        tower / "model.safetensors",
    )
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config, "text_config": {}}))
    model, ledger = load("ckpt/base-llm", vision_tower=str(tower), wishes=WISHES)
    assert model.has_vision
    assert not ledger.unexpected


def corrupt(tmp_path: Path, change) -> Path:
    directory = tmp_path / "broken"
    shutil.copytree("ckpt/llava15-tiny", directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")
    return directory


def test_a_missing_weight_is_an_error_never_a_warning(tmp_path: Path):
    directory = corrupt(tmp_path, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 weights of the model are in none of its files: model\.norm\.weight"):
        load(directory)


def test_a_shape_that_does_not_fit_is_named(tmp_path: Path):
    directory = corrupt(tmp_path, lambda weights: weights.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in .* is 63, but the model needs 64"):
        load(directory)


def test_what_has_no_place_is_noted(tmp_path: Path):
    directory = corrupt(tmp_path, lambda weights: weights.update({"model.extra.weight": torch.ones(3)}))
    _, ledger = load(directory)
    assert list(ledger.unexpected.values()) == [["model.extra.weight"]]


def test_a_projector_of_another_depth_is_refused():
    with pytest.raises(CheckpointError, match="for which the model has no place"):
        load(
            "ckpt/base-llm",
            vision_tower="ckpt/clip-tiny",
            projector_file="ckpt/mm_projector.bin",
            wishes={"mm_projector_type": "linear"},
        )


def test_a_projector_for_another_tower_is_refused(tmp_path: Path):
    file = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.weight": torch.ones(64, 48), "model.mm_projector.bias": torch.ones(64)}, file)
    with pytest.raises(CheckpointError, match="is 64 x 48, but the model needs 64 x 32"):
        load("ckpt/base-llm", vision_tower="ckpt/clip-tiny", projector_file=str(file))


REFUSED = [
    ("ckpt/nowhere/at/all", {}, "The model directory ckpt/nowhere/at/all does not exist"),
    ("ckpt/clip-tiny", {}, "holds a vision tower and no language model. Give it with --vision_tower"),
    ("train/lora/llava-tiny-lora", {}, "holds a LoRA adapter and no language model"),
    ("train/pretrain_vt32/llava-tiny-pretrain", {}, "holds a projector and no language model"),
    ("data", {}, "is not a model directory"),
    (
        "ckpt/base-llm",
        {"projector_file": "ckpt/mm_projector.bin"},
        "no use to a text-only model. Add --vision_tower",
    ),
    (
        "ckpt/base-llm",
        {"vision_tower": "ckpt/base-llm"},
        "is a 'llama' model. Supported vision towers: clip_vision_model",
    ),
    (
        "ckpt/base-llm",
        {"vision_tower": "ckpt/clip-tiny", "projector_file": "none.bin"},
        "none.bin does not exist",
    ),
    (
        "ckpt/base-llm",
        {"vision_tower": "ckpt/clip-tiny", "projector_file": "ckpt/base-llm/model.safetensors"},
        "holds no projector",
    ),
    (
        "ckpt/llava15-tiny",
        {"wishes": {"mm_projector_type": "linear"}},
        "but the projector in ckpt/llava15-tiny is 'mlp2x_gelu'",
    ),
    (
        "ckpt/llava15-tiny",
        {"wishes": {"mm_vision_select_layer": -5}},
        "the vision tower has 3 layers: allowed are -4 to 3",
    ),
    ("ckpt/llava15-tiny", {"wishes": {"mm_vision_select_feature": "cls"}}, "allowed are patch and cls_patch"),
    (
        "ckpt/base-llm",
        {"vision_tower": "ckpt/clip-tiny", "wishes": {"mm_projector_type": "mlp0x_gelu"}},
        "unknown projector. Allowed: linear",
    ),
    (
        "ckpt/base-llm",
        {"vision_tower": "ckpt/clip-tiny", "wishes": {"mm_projector_type": "identity"}},
        "32 wide and the language model 64",
    ),
]


@pytest.mark.parametrize(("path", "options", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_a_request_that_cannot_work_is_refused_before_weights_are_read(path: str, options: dict, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        find_model(path, **options)


def test_a_hub_name_that_cannot_be_fetched_says_so():
    with pytest.raises(CheckpointError, match=r"could not be fetched from the Hugging Face hub \(offline mode is on\)"):
        find_model("lmsys/vicuna-7b-v1.5")


def test_the_fingerprint_knows_the_weights_and_not_the_files(tmp_path: Path):
    def fingerprint(path):
        return language_model_fingerprint(find_model(str(path), vision_tower="ckpt/clip-tiny").sources)

    same = {fingerprint(f"ckpt/{name}") for name in ("base-llm", "llava15-tiny", "llava1-tiny-linear")}
    assert len(same) == 1
    other = corrupt(tmp_path, lambda weights: weights["lm_head.weight"].mul_(1.01))
    assert fingerprint(other) not in same


PEAK = """
import sys, torch
from llava_ft.checkpoint.model import find_model, load_base

def peak():  # ru_maxrss would begin with that of the parent process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

base = find_model(sys.argv[1])
before = peak()
model, _ = load_base(base, dtype_of=lambda name: getattr(torch, sys.argv[2]))
print((peak() - before) * 1024 / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("safetensors", "float32"), ("bin", "float16")])
def test_loading_peaks_at_a_quarter_above_the_weights(tmp_path: Path, layout: str, dtype: str):
    config = json.loads((RECORDINGS / "ckpt/base-llm/config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {}
    shapes = {
        "self_attn.q_proj": (1024, 1024),
        "self_attn.k_proj": (1024, 1024),
        "self_attn.v_proj": (1024, 1024),
    }
    shapes |= {"self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024)}
    shapes |= {"mlp.down_proj": (1024, 4096)}
    for layer in range(24):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = torch.zeros(shape, dtype=torch.float16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(1024, dtype=torch.float16)
    weights |= {
        name: torch.zeros(4096, 1024, dtype=torch.float16) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    weights["model.norm.weight"] = torch.ones(1024, dtype=torch.float16)
    if layout == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    del weights
    ratio = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    assert float(ratio.stdout) <= 1.25
