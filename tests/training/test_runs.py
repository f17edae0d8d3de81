"""What a run trains, writes, measures and refuses."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.cli import main
from llava_ft.errors import CheckpointError, RunError, UserError
from llava_ft.inference.load import load_model
from tests.conftest import RECORDINGS
from tests.training.helpers import REPOSITORY, fixed_logits, flags, prepare, start, state_of, train, write_records

pytestmark = pytest.mark.usefixtures("in_recordings")


def records() -> list[dict]:
    return json.loads((RECORDINGS / "data/mix.json").read_text())


def test_lora_stays_in_the_language_model_and_the_projector_is_trained_beside_it(tmp_path: Path):
    run = train(tmp_path / "out")
    trained = [name for name, p in run.trainer.model.named_parameters() if p.requires_grad]
    assert len([name for name in trained if "lora_" in name]) == 2 * 7 * 2
    assert [name for name in trained if "mm_projector" in name and "lora" not in name]
    assert not [name for name in trained if "vision_tower" in name or "lm_head" in name]
    adapter = torch.load(tmp_path / "out/adapter_model.bin", weights_only=True)
    beside = torch.load(tmp_path / "out/non_lora_trainables.bin", weights_only=True)
    recorded = load_file("train/lora/llava-tiny-lora/adapter_model.safetensors")
    assert set(adapter) == set(recorded)
    assert set(beside) == set(torch.load("train/lora/llava-tiny-lora/non_lora_trainables.bin", weights_only=True))


def test_the_adapter_config_names_only_the_language_model(tmp_path: Path):
    import re

    train(tmp_path / "out", max_steps=1)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path("ckpt/base-llm").resolve())
    assert config["target_modules"].startswith(r"model\.layers\.")
    pattern = re.compile(config["target_modules"])
    assert pattern.fullmatch("model.layers.31.self_attn.q_proj")
    assert not pattern.fullmatch("model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")
    recorded = json.loads(Path("train/lora/llava-tiny-lora/adapter_config.json").read_text())
    assert set(config) <= set(recorded), "PEFT 0.10 refuses keys that it does not know"


def test_the_table_of_what_is_trained_is_saved_and_true(tmp_path: Path):
    run = train(tmp_path / "out", weight_decay="0.1")
    table = json.loads((tmp_path / "out/checkpoint-3/trainable_parameters.json").read_text())
    by_part: dict[str, int] = {}
    for row in table:
        by_part[row["part"]] = by_part.get(row["part"], 0) + row["parameters"]
        assert row["dtype"] == "float32"
        assert row["learning_rate"] == (1e-4 if row["part"] == "projector" else 1e-3)
    real = {"LoRA": 0, "projector": 0}
    for name, p in run.trainer.model.named_parameters():
        if p.requires_grad:
            real["LoRA" if "lora_" in name else "projector"] += p.numel()
    assert by_part == real
    assert {row["weight_decay"] for row in table if row["part"] == "projector"} == {0.0, 0.1}


@pytest.mark.parametrize("method", ["lora", "projector", "full"])
def test_bf16_keeps_float32_master_weights_and_bf16_frozen_ones(tmp_path: Path, method: str):
    run = train(tmp_path / "out", method, bf16="True")
    for name, p in run.trainer.model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    history = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(loss) for loss in history)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    if method == "full":
        final = WeightFiles.open(tmp_path / "out/model.safetensors").tensors
        resumable = WeightFiles.open(tmp_path / "out/checkpoint-6/model.safetensors").tensors
        assert {info.dtype for info in final.values()} == {torch.bfloat16}
        assert {info.dtype for info in resumable.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, method: str):
    changes = {"lora_dropout": "0"} if method == "lora" else {}
    plain = train(tmp_path / "plain", method, **changes)
    recomputed = train(tmp_path / "recomputed", method, gradient_checkpointing="True", **changes)
    one, other = state_of(plain), state_of(recomputed)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_accumulation_equals_a_larger_batch(tmp_path: Path):
    changes = {"lora_dropout": "0", "train_sampling_strategy": "sequential", "group_by_modality_length": "False"}
    changes |= {"max_steps": "3"}
    large = train(tmp_path / "large", per_device_train_batch_size="4", **changes)
    small = train(tmp_path / "small", per_device_train_batch_size="1", gradient_accumulation_steps="4", **changes)
    one, other = state_of(large), state_of(small)
    # Float32 sums in another order; Adam divides by gradients that may be tiny.
    assert all(torch.allclose(one[name], other[name], atol=2e-4) for name in one)
    losses = [[e["loss"] for e in run.trainer.state.log_history if "loss" in e] for run in (large, small)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_added_tokens_are_trained_saved_restored_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = {"mm_use_im_start_end": "True"}
    train(
        tmp_path / "pretrain",
        "projector",
        pretrain_mm_mlp_adapter=None,
        version="v1",
        data_path="data/mix.json",
        **start,
    )
    pretrained = torch.load(tmp_path / "pretrain/mm_projector.bin", weights_only=True)
    assert pretrained["model.embed_tokens.weight"].shape == (2, 64)
    run = prepare(tmp_path / "lora", pretrain_mm_mlp_adapter=tmp_path / "pretrain/mm_projector.bin", **start)
    rows = dict(run.trainer.model.named_parameters())["base_model.model.model.embed_tokens.new_rows"]
    assert torch.equal(rows.data, pretrained["model.embed_tokens.weight"])
    before = rows.detach().clone()
    run = train(tmp_path / "lora", pretrain_mm_mlp_adapter=tmp_path / "pretrain/mm_projector.bin", **start)
    after = dict(run.trainer.model.named_parameters())["base_model.model.model.embed_tokens.new_rows"].detach()
    assert not torch.equal(before, after)
    beside = torch.load(tmp_path / "lora/checkpoint-3/non_lora_trainables.bin", weights_only=True)
    assert beside["base_model.model.model.embed_tokens.weight"].shape == (514, 64)
    assert beside["base_model.model.lm_head.weight"].shape == (514, 64)

    argv = ["merge", "--model-path", str(tmp_path / "lora"), "--save-model-path", str(tmp_path / "merged")]
    assert main(argv) == 0, capsys.readouterr().err
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"][512:], after)
    assert torch.isfinite(merged["lm_head.weight"]).all()
    loaded = load_model(str(tmp_path / "merged"))
    assert len(loaded.tokenizer) == 514
    assert loaded.model.config.mm_use_im_start_end

    shutil.rmtree(tmp_path / "lora/checkpoint-6")
    resumed = train(tmp_path / "lora", pretrain_mm_mlp_adapter=tmp_path / "pretrain/mm_projector.bin", **start)
    one, other = state_of(run), state_of(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_can_start_from_an_adapter(tmp_path: Path):
    first = train(tmp_path / "first")
    second = prepare(
        tmp_path / "second", lora_weight_path=tmp_path / "first", pretrain_mm_mlp_adapter=None, vision_tower=None
    )
    one, other = state_of(first), {n: p for n, p in second.trainer.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert second.trainer.optimizer is None


def test_an_adapter_on_another_base_is_refused(tmp_path: Path):
    train(tmp_path / "first", max_steps=1)
    other = tmp_path / "other-base"
    shutil.copytree("ckpt/base-llm", other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] *= 1.5
    from safetensors.torch import save_file

    save_file(weights, other / "model.safetensors")
    changes = {"lora_weight_path": tmp_path / "first", "model_name_or_path": other, "pretrain_mm_mlp_adapter": None}
    with pytest.raises(
        CheckpointError, match=r"whose weights differ. Give the original base model, or pass --allow_base"
    ):
        prepare(tmp_path / "second", **changes)
    prepare(tmp_path / "second", allow_base_mismatch="True", **changes)
    with pytest.raises(CheckpointError, match="whose weights differ"):
        load_model(str(tmp_path / "first"), str(other))


def test_files_of_two_runs_are_not_mixed(tmp_path: Path):
    train(tmp_path / "one", max_steps=1)
    train(tmp_path / "two", max_steps=2)
    shutil.copy(tmp_path / "two/non_lora_trainables.bin", tmp_path / "one/non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match="is not the file that was written with this checkpoint"):
        load_model(str(tmp_path / "one"))


@pytest.mark.parametrize("method", ["lora", "projector", "full"])
def test_what_is_written_can_be_used(tmp_path: Path, method: str):
    run = train(tmp_path / "out", method, lora_dropout="0")
    base = "ckpt/base-llm" if method != "full" else None
    loaded = load_model(str(tmp_path / "out"), base)
    run.trainer.model.eval()
    loaded_model, loaded_trained = loaded, run.trainer.model
    expected = fixed_logits(replace(loaded, model=loaded_trained))
    got = fixed_logits(loaded_model)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, got, strict=True))
    assert loaded.template == ("plain" if method == "projector" else "v1")
    if method == "lora":
        beside = fixed_logits(load_model(str(tmp_path / "out/checkpoint-6"), adapter="beside"))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(beside, got, strict=True))


def test_biases_are_trained_saved_and_restored_beside_lora(tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    for file in Path("ckpt/base-llm").iterdir():
        if file.suffix in (".json", ".model") and "index" not in file.name:
            shutil.copy(file, base)
    config = json.loads((base / "config.json").read_text()) | {"attention_bias": True}
    (base / "config.json").write_text(json.dumps(config))
    weights = WeightFiles.open(Path("ckpt/base-llm")).read()
    for name in [name for name in weights if "self_attn" in name and name.endswith("proj.weight")]:
        weights[name.replace("weight", "bias")] = torch.zeros(weights[name].shape[0])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    changes = {"model_name_or_path": base, "lora_bias": "all", "lora_dropout": "0"}

    run = train(tmp_path / "out", **changes)
    biases = {n: p for n, p in run.trainer.model.named_parameters() if n.endswith("q_proj.base_layer.bias")}
    assert all(bias.requires_grad and bias.abs().max() > 0 for bias in biases.values())
    assert torch.load(tmp_path / "out/adapter_model.bin", weights_only=True).keys() >= biases.keys()
    loaded = load_model(str(tmp_path / "out"), str(base))
    expected = fixed_logits(replace(loaded, model=run.trainer.model.eval()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, fixed_logits(loaded), strict=True))
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    one, other = state_of(run), state_of(train(tmp_path / "out", **changes))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "both"])
@pytest.mark.parametrize("method", ["lora", "projector", "full"])
def test_formats(tmp_path: Path, method: str, kind: str):
    run = train(tmp_path / "out", method, weights_format=kind, max_steps=3)
    stem = {"lora": "adapter_model", "projector": "mm_projector", "full": "*model"}[method]
    found = {path.suffix for path in (tmp_path / "out").glob(f"{stem}.*") if path.suffix in (".bin", ".safetensors")}
    assert found == {"bin": {".bin"}, "safetensors": {".safetensors"}, "both": {".bin", ".safetensors"}}[kind]
    resumed = prepare(tmp_path / "out", method, weights_format=kind, max_steps=4)
    resumed.trainer.train(resume_from_checkpoint=str(resumed.checkpoint))
    assert run.trainer.state.global_step == 3


def test_validation_and_the_best_checkpoint_with_its_projector(tmp_path: Path):
    run = train(
        tmp_path / "out",
        validation_fraction="0.3",
        eval_strategy="steps",
        eval_steps="1",
        save_steps="1",
        load_best_model_at_end="True",
        metric_for_best_model="loss",
        learning_rate="0.05",
        mm_projector_lr="0.05",
        max_steps="5",
        save_total_limit=None,
    )
    losses = {e["step"]: e["eval_loss"] for e in run.trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert Path(run.trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    at_best = torch.load(tmp_path / f"out/checkpoint-{best}/non_lora_trainables.bin", weights_only=True)
    result = torch.load(tmp_path / "out/non_lora_trainables.bin", weights_only=True)
    assert all(torch.equal(at_best[key], result[key]) for key in at_best)


def test_the_evaluation_loss_is_a_mean_over_tokens(tmp_path: Path):
    one_by_one = train(tmp_path / "a", max_steps=1, validation_data_path="data/mix.json", per_device_eval_batch_size=1)
    together = train(tmp_path / "b", max_steps=1, validation_data_path="data/mix.json", per_device_eval_batch_size=14)
    losses = [run.trainer.evaluate()["eval_loss"] for run in (one_by_one, together)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_rates_are_logged(tmp_path: Path):
    run = train(tmp_path / "out")
    entry = next(entry for entry in run.trainer.state.log_history if "loss" in entry)
    rates = {"tokens_per_second", "samples_per_second", "images_per_second", "supervised_tokens", "padding"}
    rates |= {"model_tflops", "mfu", "data_wait", "peak_memory_gib"}
    assert set(entry) >= rates | {"loss", "grad_norm", "learning_rate", "mm_projector_lr", "epoch", "step"}


def test_a_non_finite_loss_names_the_step_and_the_records(tmp_path: Path):
    run = prepare(tmp_path / "out", train_sampling_strategy="sequential", group_by_modality_length="False")
    projector = dict(run.trainer.model.named_parameters())["base_model.model.model.mm_projector.2.bias"]
    projector.data[0] = float("nan")
    with pytest.raises(
        RunError, match=r"The loss is nan in step 1\. Records of this step: 0 \(id 'sample-00'\), 1 \(id"
    ):
        run.trainer.train()
    run.stop.release()


def test_a_non_finite_gradient_does_not_reach_the_weights(tmp_path: Path):
    run = prepare(tmp_path / "out")
    name, weight = next((n, p) for n, p in run.trainer.model.named_parameters() if "lora_B" in n)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weight.detach().clone()
    with pytest.raises(RunError, match=r"The gradient norm is (nan|inf) in step 1"):
        run.trainer.train()
    run.stop.release()
    assert torch.equal(weight, before), name


def test_an_image_that_breaks_during_the_run_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    images = tmp_path / "images"
    shutil.copytree("images/src", images)
    run = prepare(tmp_path / "out", image_folder=images, num_train_epochs="1", max_steps="-1")
    (images / "rgba.png").write_bytes(b"")
    run.trainer.train()
    assert [error.sample_id for error in run.trainer.bad_samples] == ["sample-03"]
    assert "Not trained on: Sample 3 (id 'sample-03')" in caplog.text
    assert run.trainer.state.log_history[-2]["bad_samples"] == 1


def test_a_run_whose_images_are_gone_ends(tmp_path: Path):
    images = tmp_path / "images"
    shutil.copytree("images/src", images)
    run = prepare(tmp_path / "out", image_folder=images, max_steps=30)
    shutil.rmtree(images)
    with pytest.raises(RunError, match=r"more than bad_sample_limit allows.*Is the image folder still there"):
        run.trainer.train()
    run.stop.release()


def test_bad_records_stop_the_start_or_are_skipped(tmp_path: Path):
    broken = [*records(), {"id": "broken", "image": "nowhere.png", "conversations": records()[0]["conversations"]}]
    data = write_records(tmp_path / "data.json", broken)
    with pytest.raises(UserError, match=r"nowhere\.png"):
        prepare(tmp_path / "out", data_path=data)
    run = prepare(tmp_path / "out", data_path=data, on_bad_sample="skip")
    assert len(run.datasets.train) == len(records())


def test_a_text_only_model_is_trained(tmp_path: Path):
    run = train(
        tmp_path / "out",
        data_path="data/text.json",
        vision_tower=None,
        pretrain_mm_mlp_adapter=None,
        mm_projector_type=None,
        mm_vision_select_layer=None,
        image_folder=None,
        mm_projector_lr=None,
    )
    assert not run.trainer.model.config.mm_vision_config
    load_model(str(tmp_path / "out"))


REFUSED = [
    ({"vision_tower": None, "pretrain_mm_mlp_adapter": None}, "image"),
    ({"version": "vicuna"}, "version|template"),
    ({"data_path": "nowhere.json"}, r"nowhere\.json"),
    ({"model_name_or_path": "ckpt/none"}, "ckpt/none"),
    ({"lora_target_modules": "query"}, "lora_target_modules names query"),
    ({"lora_weight_path": "ckpt/base-llm"}, "not a LoRA adapter"),
    ({"model_max_length": "30"}, "30"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_request_that_cannot_work_ends_with_one_message(
    tmp_path: Path, change: dict, message: str, capsys: pytest.CaptureFixture[str]
):
    import re

    assert main(["train", *flags(tmp_path / "out", **change)]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors)
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_the_command_trains_resumes_and_ends_with_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = flags(tmp_path / "out", max_steps=3)
    assert main(["train", *argv]) == 0
    first = capsys.readouterr()
    assert first.out == ""
    assert "What is trained" in first.err
    assert "Done. The result is in" in first.err
    assert main(["train", *flags(tmp_path / "out", max_steps=5)]) == 0
    assert f"Resuming from {tmp_path}/out/checkpoint-3" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_finished_run_that_is_started_again_trains_no_further(tmp_path: Path, method: str):
    first = train(tmp_path / "out", method, max_steps=4, lr_scheduler_type="constant")
    again = train(tmp_path / "out", method, max_steps=4, lr_scheduler_type="constant")
    assert again.trainer.state.global_step == 4
    one, other = state_of(first), state_of(again)
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("optimizer"))


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_3_writes_whole_tensors(tmp_path: Path):
    """Parameters that ZeRO-3 divides among ranks have no elements of their own; what is saved must be whole."""
    zero = json.loads((REPOSITORY / "configs/zero3.json").read_text())
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero))
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    process = start(flags(tmp_path / "out", deepspeed=tmp_path / "zero3.json", max_steps=3), **rank)
    _, log = process.communicate(timeout=400)
    assert process.returncode == 0, log
    recorded = load_file("train/lora/llava-tiny-lora/adapter_model.safetensors")
    for directory in (tmp_path / "out", tmp_path / "out/checkpoint-3"):
        adapter = torch.load(directory / "adapter_model.bin", weights_only=True)
        assert set(adapter) == set(recorded)
        assert all(tensor.numel() > 0 and torch.isfinite(tensor).all() for tensor in adapter.values())
        beside = torch.load(directory / "non_lora_trainables.bin", weights_only=True)
        assert {key: tuple(tensor.shape) for key, tensor in beside.items()} == {
            "base_model.model.model.mm_projector.0.weight": (64, 32),
            "base_model.model.model.mm_projector.0.bias": (64,),
            "base_model.model.model.mm_projector.2.weight": (64, 64),
            "base_model.model.model.mm_projector.2.bias": (64,),
        }
    load_model(str(tmp_path / "out"))


def test_a_text_only_run_is_merged_and_used(tmp_path: Path):
    without = dict.fromkeys(("vision_tower", "pretrain_mm_mlp_adapter", "mm_projector_type", "mm_vision_select_layer"))
    changes = without | {"image_aspect_ratio": None, "mm_projector_lr": None, "group_by_modality_length": None}
    train(tmp_path / "out", data_path="data/text.json", max_steps=1, **changes)
    assert main(["merge", "--model-path", str(tmp_path / "out"), "--save-model-path", str(tmp_path / "merged")]) == 0
    added, merged = (fixed_logits(load_model(str(tmp_path / name), device="cpu")) for name in ("out", "merged"))
    assert all(torch.equal(a, m) for a, m in zip(added, merged, strict=True))
