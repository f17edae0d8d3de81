"""Runs on tiled images: LLaVA-1.6 checkpoints, `image_newline`, and S2, from training to the merged model's answer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.names import IMAGE_NEWLINE
from llava_ft.convert.merge import MergeOptions, compare_merged, merge
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.generate import prepare_inputs
from llava_ft.inference.load import load_model
from tests.training.helpers import fixed_logits, prepare, state_of, train

pytestmark = pytest.mark.usefixtures("in_recordings")

ON_LLAVA_16 = {"model_name_or_path": "ckpt/llava16-tiny-anyres", "pretrain_mm_mlp_adapter": None}
ON_LLAVA_16 |= dict.fromkeys(["mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio"])
ON_LLAMA = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
S2 = {"s2_scales": "56,112", "pretrain_mm_mlp_adapter": None}
SHORT = {"max_steps": 2, "save_steps": 2}
FILES = {"lora": "non_lora_trainables.bin", "projector": "mm_projector.bin", "full": "model.safetensors"}
NEWLINE_KEYS = {"lora": f"base_model.model.{IMAGE_NEWLINE}", "projector": IMAGE_NEWLINE, "full": IMAGE_NEWLINE}


def newline_in(directory: Path, method: str) -> torch.Tensor:
    """Read the saved `image_newline` from the file that the method writes."""
    file = directory / FILES[method]
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return tensors[NEWLINE_KEYS[method]]


@pytest.mark.parametrize("method", list(FILES))
def test_a_llava_1_6_checkpoint_is_trained_resumed_and_used(tmp_path: Path, method: str):
    before = load_file("ckpt/llava16-tiny-anyres/model.safetensors")[IMAGE_NEWLINE]
    straight = train(tmp_path / "straight", method, **ON_LLAVA_16)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    resumed = train(tmp_path / "stopped", method, **ON_LLAVA_16)
    expected, got = state_of(straight), state_of(resumed)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert [name for name in expected if "image_newline" in name]
    for directory in (tmp_path / "straight", tmp_path / "straight/checkpoint-6"):
        saved = newline_in(directory, method)
        assert saved.shape == before.shape
        assert not torch.equal(saved, before)
        config = json.loads((directory / "config.json").read_text())
        assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
        assert config["image_grid_pinpoints"] == [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    straight.trainer.model.eval()
    loaded = load_model(str(tmp_path / "straight"), "ckpt/llava16-tiny-anyres" if method != "full" else None)
    trained = replace(loaded, model=straight.trainer.model)
    for one, other in zip(fixed_logits(trained), fixed_logits(loaded), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["lora", "projector"])
def test_a_new_newline_is_trained_saved_and_merged(tmp_path: Path, method: str):
    run = train(tmp_path / "out", method, **ON_LLAMA, **SHORT)
    (name,) = [name for name, p in run.trainer.model.named_parameters() if "image_newline" in name and p.requires_grad]
    trained = dict(run.trainer.model.named_parameters())[name]
    assert 0.3 < trained.norm() < 3  # of randn / sqrt(width): about 1
    assert torch.equal(newline_in(tmp_path / "out", method), trained)
    (row,) = [row for row in run.trainer.artifacts.table if row["part"] == "image newline"]
    assert (row["learning_rate"], row["weight_decay"]) == (1e-3, 0.0)

    directory = identify(tmp_path / "out")
    base = "ckpt/base-llm"
    merge([(1.0, directory)], base, tmp_path / "merged", MergeOptions(verify=False))
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")[IMAGE_NEWLINE], trained)
    compare_merged(tmp_path / "merged", [(1.0, identify(tmp_path / "out"))], base)
    loaded = load_model(str(tmp_path / "merged"))
    for image, num_tiles in (("panorama.png", 4), ("one_px_wide.png", 3)):
        inputs = prepare_inputs(loaded, "<image>\nWhat?", [f"images/src/{image}"])
        assert inputs["pixel_values"].shape[0] == num_tiles
        assert loaded.model.generate(**inputs, do_sample=False, max_new_tokens=3).shape[0] == 1


def test_a_tower_in_the_checkpoint_stays_with_the_model(tmp_path: Path):
    """LLaVA-1.6's tower was trained: it is another than the one that the configuration names."""
    shutil.copytree("ckpt/llava16-tiny-anyres", tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tower = [name for name in tensors if "vision_tower" in name]
    tensors |= {name: tensors[name] + 0.01 for name in tower}
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    start = ON_LLAVA_16 | {"model_name_or_path": tmp_path / "base"}
    train(tmp_path / "full", "full", **start, **SHORT)
    train(tmp_path / "lora", **start, **SHORT)
    merge([(1.0, identify(tmp_path / "lora"))], None, tmp_path / "merged", MergeOptions(verify=False))
    for directory in ("full", "full/checkpoint-2", "merged", "lora"):
        loaded = load_model(str(tmp_path / directory))
        assert all(torch.equal(loaded.model.get_parameter(name), tensors[name]) for name in tower), directory


def test_a_new_newline_depends_on_the_seed_alone(tmp_path: Path):
    def newline(directory: str, seed: int) -> torch.Tensor:
        model = prepare(tmp_path / directory, **ON_LLAMA, seed=seed).trainer.model
        return next(p.detach() for name, p in model.named_parameters() if "image_newline" in name)

    assert torch.equal(newline("a", 3), newline("b", 3))
    assert not torch.equal(newline("a", 3), newline("c", 4))


def test_a_frozen_projector_keeps_the_newline_as_it_is(tmp_path: Path):
    before = load_file("ckpt/llava16-tiny-anyres/model.safetensors")[IMAGE_NEWLINE]
    run = train(tmp_path / "out", freeze_mm_mlp_adapter="True", mm_projector_lr=None, **ON_LLAVA_16, **SHORT)
    parameters = {name: p for name, p in run.trainer.model.named_parameters() if "image_newline" in name}
    assert all(torch.equal(p, before) and not p.requires_grad for p in parameters.values())
    loaded = load_model(str(tmp_path / "out"), "ckpt/llava16-tiny-anyres")
    assert torch.equal(loaded.model.get_parameter(IMAGE_NEWLINE), before)


def test_stages_hand_the_newline_on(tmp_path: Path):
    """Pretraining's is where LoRA starts, and LoRA's where the next LoRA run starts."""
    train(tmp_path / "pretrain", "projector", **ON_LLAMA, **SHORT)
    file = tmp_path / "pretrain/mm_projector.bin"
    first = prepare(tmp_path / "first", pretrain_mm_mlp_adapter=file, **ON_LLAMA)
    newline = next(p for name, p in first.trainer.model.named_parameters() if "image_newline" in name)
    assert torch.equal(newline, newline_in(tmp_path / "pretrain", "projector"))
    train(tmp_path / "lora", pretrain_mm_mlp_adapter=file, **ON_LLAMA, **SHORT)
    second = prepare(tmp_path / "second", lora_weight_path=tmp_path / "lora", pretrain_mm_mlp_adapter=None)
    newline = next(p for name, p in second.trainer.model.named_parameters() if "image_newline" in name)
    assert torch.equal(newline, newline_in(tmp_path / "lora", "lora"))


def test_text_alone_gives_the_newline_a_gradient_of_zero(tmp_path: Path):
    records = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}] * 4
    (tmp_path / "text.json").write_text(json.dumps(records))
    changes = {**ON_LLAVA_16, **SHORT, "data_path": tmp_path / "text.json"}
    run = train(tmp_path / "out", "full", **changes)
    before = load_file("ckpt/llava16-tiny-anyres/model.safetensors")[IMAGE_NEWLINE]
    assert torch.equal(newline_in(tmp_path / "out", "full"), before)
    assert [name for name, _ in run.trainer.model.named_parameters() if name == IMAGE_NEWLINE]


def test_a_llava_1_6_checkpoint_is_trained_on_padded_images(tmp_path: Path):
    before = load_file("ckpt/llava16-tiny-anyres/model.safetensors")[IMAGE_NEWLINE]
    train(tmp_path / "out", "full", **ON_LLAVA_16 | {"image_aspect_ratio": "pad"}, **SHORT)
    assert torch.equal(newline_in(tmp_path / "out", "full"), before)  # no rows end, so nothing is learnt of it


@pytest.mark.parametrize("method", ["lora", "projector"])
def test_a_newline_that_is_nowhere_is_refused(tmp_path: Path, method: str):
    train(tmp_path / "out", method, **ON_LLAMA, **SHORT)
    file = tmp_path / "out" / FILES[method]
    tensors = torch.load(file, weights_only=True)
    del tensors[NEWLINE_KEYS[method]]
    torch.save(tensors, file)
    (tmp_path / "out/llava_ft.json").unlink()  # as the original leaves such a directory
    with pytest.raises(CheckpointError, match=r"needs model\.image_newline, but neither its files nor .* hold it"):
        load_model(str(tmp_path / "out"), "ckpt/base-llm")


def test_s2_is_trained_resumed_merged_and_used(tmp_path: Path):
    straight = train(tmp_path / "straight", **S2)
    assert straight.trainer.model.get_parameter("base_model.model.model.mm_projector.0.weight").shape == (64, 64)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    expected, got = state_of(straight), state_of(train(tmp_path / "stopped", **S2))
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    config = json.loads((tmp_path / "straight/config.json").read_text())
    assert (config["s2"], config["s2_scales"], config["mm_hidden_size"]) == (True, "56,112", 64)
    merge([(1.0, identify(tmp_path / "straight"))], "ckpt/base-llm", tmp_path / "merged", MergeOptions(verify=False))
    compare_merged(tmp_path / "merged", [(1.0, identify(tmp_path / "straight"))], "ckpt/base-llm")
    loaded = load_model(str(tmp_path / "merged"))
    inputs = prepare_inputs(loaded, "<image>\nWhat?", ["images/src/landscape.jpg"])
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)
    assert int((inputs["input_ids"] < 0).sum()) == 16
    assert loaded.model.generate(**inputs, do_sample=False, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"s2_scales": "56,112", "image_aspect_ratio": "anyres"},
            "s2_scales=56,112 and image_aspect_ratio=anyres",
        ),
        ({"s2_scales": "112,224"}, "must start with 56"),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[[100, 100]]"},
            "image_grid_pinpoints holds 100 x 100",
        ),
        ({"image_aspect_ratio": "anyres_max_4"}, "needs mm_patch_merge_type=spatial_unpad, which is flat"),
    ],
)
def test_contradictions_are_refused_before_weights_are_read(tmp_path: Path, changes: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", **changes)
