"""Training on quantised weights: what is trained and written, resuming, merging, using."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_ft.checkpoint.quantized import quantization_in_training
from llava_ft.cli import main
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.load import choose_quantization, load_model, load_pretrained_model
from llava_ft.training.run import Run
from llava_ft.tuning.quant import Quantization
from tests.training.helpers import fixed_logits, flags, prepare, start, train

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("in_recordings")

IDS = torch.tensor([[1, 5, 9, 300, 17]])
KINDS = {
    "nf4": {"bits": 4},
    "fp4": {"bits": 4, "quant_type": "fp4", "double_quant": "False"},
    "int8": {"bits": 8},
}


def losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


def flat_state(run: Run) -> dict[str, torch.Tensor]:
    """Everything that a step changes; bitsandbytes puts what is quantised of its state into a dictionary of its own."""
    state = {name: p.detach().clone() for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    for index, entry in run.trainer.optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            for inner, tensor in value.items() if isinstance(value, dict) else [("", value)]:
                state[f"optimizer {index} {key} {inner}"] = torch.as_tensor(tensor).clone()
    return state


@pytest.mark.parametrize("bf16", ["True", "False"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_and_projector_are_trained_on_frozen_bytes(tmp_path: Path, kind: str, bf16: str):
    run = prepare(tmp_path / "out", bf16=bf16, gradient_checkpointing="True", max_steps=3, **KINDS[kind])
    packed = {n: p.detach().clone() for n, p in run.trainer.model.named_parameters() if not p.is_floating_point()}
    before = {n: p.detach().clone() for n, p in run.trainer.model.named_parameters() if p.requires_grad}
    run.trainer.train()
    assert len(packed) == 14
    after = dict(run.trainer.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in packed.items())
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []
    compute_dtype = torch.bfloat16 if bf16 == "True" else torch.float32
    for name, p in after.items():
        if name not in packed:
            assert p.dtype == (torch.float32 if p.requires_grad else compute_dtype), name
    assert all(math.isfinite(loss) for loss in losses(run))


def test_the_files_are_those_of_a_lora_run(tmp_path: Path):
    train(tmp_path / "lora", max_steps=1)
    train(tmp_path / "qlora", max_steps=1, bits=4)
    names = [{p.name for p in (tmp_path / run).iterdir()} for run in ("lora", "qlora")]
    assert names[0] == names[1]
    for file in ("adapter_config.json", "config.json"):
        one, other = (json.loads((tmp_path / run / file).read_text()) for run in ("lora", "qlora"))
        assert one == other, file
    for file in ("adapter_model.bin", "non_lora_trainables.bin"):
        one, other = (torch.load(tmp_path / run / file, weights_only=True) for run in ("lora", "qlora"))
        assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}
    one, other = (json.loads((tmp_path / run / "llava_ft.json").read_text()) for run in ("lora", "qlora"))
    assert one["base_fingerprint"] == other["base_fingerprint"]


def test_the_table_lists_what_is_quantised(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="llava_ft")
    run = train(tmp_path / "out", max_steps=1, bits=4, bf16="True")
    rows = json.loads((tmp_path / "out/trainable_parameters.json").read_text())
    keys = {"part", "tensors", "parameters", "dtype", "learning_rate", "weight_decay", "bytes", "trained"}
    assert all(set(row) == keys for row in rows)
    trained = [row for row in rows if row["trained"]]
    assert {(row["part"], row["dtype"]) for row in trained} == {("LoRA", "float32"), ("projector", "float32")}
    frozen = {(row["part"], row["dtype"]): row for row in rows if not row["trained"]}
    assert set(frozen) == {
        ("embeddings", "bfloat16"),
        ("language model", "nf4 (double-quantised)"),
        ("language model", "bfloat16"),
        ("vision tower", "bfloat16"),
        ("head", "bfloat16"),
    }
    values = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    quantised = frozen["language model", "nf4 (double-quantised)"]
    assert (quantised["tensors"], quantised["parameters"]) == (14, values)
    assert values / 2 < quantised["bytes"] < 0.55 * values
    assert re.search(r"language model +14 +81,920 +nf4 \(double-quantised\) +\S+ +frozen", caplog.text)
    of_16_bits = prepare(tmp_path / "lora")
    whole = sum(p.numel() for p in of_16_bits.trainer.model.parameters())
    assert f"of {whole:,} parameters" in caplog.text
    assert sum(row["parameters"] for row in trained) == sum(
        p.numel() for p in run.trainer.model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, kind: str):
    options = {"lora_dropout": "0", "max_steps": 3, **KINDS[kind]}
    plain = train(tmp_path / "plain", **options)
    recomputed = train(tmp_path / "recomputed", gradient_checkpointing="True", **options)
    one, other = flat_state(plain), flat_state(recomputed)
    assert losses(plain) == pytest.approx(losses(recomputed), abs=1e-6)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


RESUMED = [
    ("lora", {"bits": 4, "optim": "adamw_torch"}),
    ("lora", {"bits": 4, "optim": "paged_adamw_8bit", "lora_r": 64, "bf16": "True"}),
    ("lora", {"bits": 4, "optim": "paged_adamw_32bit", "validation_fraction": "0.3", "eval_steps": 1}),
    ("lora", {"bits": 8, "optim": "adamw_8bit", "lora_r": 64}),
    ("projector", {"bits": 4, "optim": "adamw_bnb_8bit"}),
]


@pytest.mark.parametrize(("method", "changes"), RESUMED, ids=[f"{m}-{c['bits']}-{c['optim']}" for m, c in RESUMED])
def test_three_steps_and_three_more_are_six(tmp_path: Path, method: str, changes: dict):
    if "eval_steps" in changes:
        changes = {**changes, "eval_strategy": "steps"}
    straight = train(tmp_path / "straight", method, **changes)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    resumed = train(tmp_path / "stopped", method, **changes)
    assert resumed.checkpoint == tmp_path / "stopped/checkpoint-3"
    expected, got = flat_state(straight), flat_state(resumed)
    assert set(expected) == set(got)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert losses(straight) == losses(resumed)
    dtypes = {tensor.dtype for name, tensor in expected.items() if "state1" in name}
    if "lora_r" in changes:
        assert dtypes == {torch.uint8, torch.float32}, "tensors of fewer than 4096 values stay in 32 bits"


def test_a_checkpoint_of_other_bits_is_refused(tmp_path: Path):
    train(tmp_path / "out", max_steps=3, bits=4)
    assert quantization_in_training(tmp_path / "out/checkpoint-3") == Quantization(4)
    for change, name in (({}, "16 bits"), ({"bits": 8}, "int8"), ({"bits": 4, "quant_type": "fp4"}, "fp4")):
        with pytest.raises(UserError, match=rf"was trained .* in nf4 \(double-quantised\), .* asks for {name}"):
            prepare(tmp_path / "out", max_steps=6, **change)
    other = prepare(tmp_path / "new", lora_weight_path=tmp_path / "out", pretrain_mm_mlp_adapter=None, bits=8)
    trained = torch.load(tmp_path / "out/adapter_model.bin", weights_only=True)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
    assert torch.equal(other.trainer.model.get_parameter(name), trained[name.replace(".default", "")])


def test_a_damaged_configuration_is_named(tmp_path: Path):
    assert quantization_in_training(tmp_path) is None
    (tmp_path / "run_config.yaml").write_text("bits: 5")
    with pytest.raises(CheckpointError, match=r"run_config\.yaml cannot be read as a run's configuration \(bits is 5"):
        quantization_in_training(tmp_path)


def test_what_cannot_work_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    nowhere = {"model_name_or_path": "ckpt/none"}
    process = start(flags(tmp_path, bits=4, deepspeed="zero3.json", **nowhere))  # it opens a process group
    _, log = process.communicate(timeout=400)
    assert process.returncode == 2, log
    assert "bits=4 does not work with ZeRO stage 3" in log
    assert main(["train", *flags(tmp_path, "full", bits=4, freeze_backbone="True", **nowhere)]) == 2
    assert "bits=4: a run with freeze_backbone writes the whole model" in capsys.readouterr().err


def test_the_validation_loss_is_that_of_the_model_trained(tmp_path: Path):
    run = train(
        tmp_path / "out",
        bits=4,
        max_steps=3,
        validation_data_path="data/mix.json",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end="True",
        metric_for_best_model="loss",
    )
    evaluations = [entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry]
    assert run.trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), abs=1e-6)
    quantization = choose_quantization(str(tmp_path / "out"), 4)
    loaded = load_model(str(tmp_path / "out"), quantization=quantization)
    expected = fixed_logits(replace(loaded, model=run.trainer.model.eval()))
    for trained, asked in zip(expected, fixed_logits(loaded), strict=True):  # --fast_lora rounds in another order
        torch.testing.assert_close(asked, trained, rtol=0, atol=2e-6 * trained.abs().max().item())


def test_added_tokens(tmp_path: Path):
    changes = {"bits": 4, "mm_use_im_start_end": "True", "max_steps": 3}
    run = train(tmp_path / "out", **changes)
    parameters = dict(run.trainer.model.named_parameters())
    for name in ("model.embed_tokens", "lm_head"):
        rows = parameters[f"base_model.model.{name}.new_rows"]
        assert rows.requires_grad
        assert rows.dtype == torch.float32
    loaded = load_model(str(tmp_path / "out"), quantization=Quantization(4))
    expected = fixed_logits(replace(loaded, model=run.trainer.model.eval()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, fixed_logits(loaded), strict=True))


def test_train_resume_evaluate_merge_and_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, image = tmp_path / "out", "images/src/square.png"
    changes = {"bits": 4, "bf16": "True", "optim": "paged_adamw_8bit", "gradient_checkpointing": "True"}
    changes |= {"validation_fraction": "0.3", "eval_strategy": "steps", "eval_steps": 3, "lora_r": 64}
    assert main(["train", *flags(out, max_steps=3, **changes)]) == 0, capsys.readouterr().err
    assert main(["train", *flags(out, max_steps=6, **changes)]) == 0
    log = capsys.readouterr().err
    assert "optim=paged_adamw_8bit is replaced by adamw_8bit: there is no GPU." in log
    assert f"Resuming from {out / 'checkpoint-3'}." in log
    assert "nf4 (double-quantised)" in log
    assert "eval_loss" in log

    merged = {name: tmp_path / name for name in ("own", "trained")}
    for name, more in (("own", []), ("trained", ["--base-as-trained"])):
        argv = ["merge", "--model-path", str(out), "--save-model-path", str(merged[name]), *more]
        assert main(argv) == 0, capsys.readouterr().err
        log = capsys.readouterr().err
        assert "text: max |difference of logits|" in log
        assert f"adapter {out}" in log
        assert ("changed by being quantised as nf4" in log) == (name == "trained")
        assert ("--base-as-trained merges into the weights it was trained on" in log) == (name == "own")
        assert "quantization" not in json.dumps(json.loads((merged[name] / "config.json").read_text()))

    answers = {}
    ask = ["generate", "--image-file", image, "--query", "What is it?", "--max-new-tokens", "8", "--model-path"]
    for path in (out, *merged.values()):
        for bits in ("4", "8", "16"):
            assert main([*ask, str(path), "--bits", bits]) == 0, capsys.readouterr().err
            answers[path.name, bits] = capsys.readouterr().out
    assert answers["out", "4"] == answers["trained", "16"]
    assert answers["out", "16"] == answers["own", "16"]


def test_merged_as_trained_is_the_model_that_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for kind, changes in KINDS.items():
        out = tmp_path / kind
        train(out, max_steps=2, learning_rate="0.01", **changes)
        trained_on = quantization_in_training(out)
        assert trained_on is not None
        quantised = fixed_logits(load_model(str(out), quantization=trained_on))
        scale = max(float(logits.abs().max()) for logits in quantised)
        distance = {}
        for name, more in (("own", []), ("as-trained", ["--base-as-trained"])):
            target = tmp_path / f"{kind}-{name}"
            argv = ["merge", "--model-path", str(out), "--save-model-path", str(target), "--dtype", "float32"]
            assert main([*argv, *more]) == 0, capsys.readouterr().err
            got = fixed_logits(load_model(str(target)))
            distance[name] = max(float((a - b).abs().max()) for a, b in zip(quantised, got, strict=True)) / scale
        # 8-bit layers round their inputs when they are not trained.
        assert distance["as-trained"] < (0.06 if kind == "int8" else 1e-5)
        assert distance["as-trained"] < distance["own"]


def test_merging_as_trained_needs_to_know_how_it_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tmp_path / "out", max_steps=1)
    argv = ["merge", "--model-path", str(tmp_path / "out"), "--save-model-path", str(tmp_path / "merged")]
    assert main([*argv, "--base-as-trained"]) == 2
    assert "was not trained on quantised weights, or its run_config.yaml is gone" in capsys.readouterr().err


def test_an_adapter_stays_beside_quantised_weights(tmp_path: Path):
    train(tmp_path / "out", max_steps=2)
    for bits in (4, 8):
        flag = {f"load_{bits}bit": True}
        _, model, _, _ = load_pretrained_model(str(tmp_path / "out"), **flag)
        beside = load_model(str(tmp_path / "out"), quantization=Quantization(bits), adapter="beside").model
        assert type(model).__name__ == "LlavaLlamaForCausalLM"
        assert torch.equal(model(input_ids=IDS).logits, beside(input_ids=IDS).logits)
        assert model.generate(IDS, do_sample=False, max_new_tokens=4, min_new_tokens=4).shape == (1, 4)
    with pytest.raises(UserError, match="load_8bit and load_4bit exclude each other"):
        load_pretrained_model(str(tmp_path / "out"), load_8bit=True, load_4bit=True)


def test_bits_are_those_of_the_training_where_they_agree(tmp_path: Path):
    train(tmp_path / "out", max_steps=1, bits=4, quant_type="fp4", double_quant="False")
    assert choose_quantization(str(tmp_path / "out"), 4) == Quantization(4, "fp4", False)
    assert choose_quantization(str(tmp_path / "out"), 8) == Quantization(8)
    assert choose_quantization(str(tmp_path / "out"), 16) is None
    assert choose_quantization("ckpt/llava15-tiny", 4) == Quantization(4)


PUBLISHED = Path("cli.json")


@pytest.mark.slow
@pytest.mark.distributed
def test_under_zero_2_an_8_bit_optimizer_resumes_bit_for_bit(tmp_path: Path):
    changes = {"bits": 4, "bf16": "True", "optim": "paged_adamw_8bit", "lora_r": 64, "deepspeed": "zero2.json"}

    def run(output_dir: Path) -> str:
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
        process = start(flags(output_dir, **changes), **rank)
        _, log = process.communicate(timeout=400)
        assert process.returncode == 0, log
        return log

    run(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    assert f"Resuming from {tmp_path / 'stopped/checkpoint-3'}." in run(tmp_path / "stopped")
    for file in ("adapter_model.bin", "non_lora_trainables.bin"):
        one, other = (torch.load(tmp_path / run / file, weights_only=True) for run in ("straight", "stopped"))
        assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.mark.slow
@pytest.mark.distributed
def test_the_published_command_line_runs_its_course(tmp_path: Path):
    """Only paths are changed: model, tower, projector, data, output."""
    values = dict(json.loads(PUBLISHED.read_text())["scripts"]["scripts/finetune_qlora.sh"]["flags"])
    assert values["bits"] == "4"
    values |= {
        "model_name_or_path": "ckpt/base-llm",
        "version": "v1",
        "data_path": "data/mix.json",
        "image_folder": "images/src",
        "vision_tower": "ckpt/clip-tiny",
        "pretrain_mm_mlp_adapter": "ckpt/mm_projector_linear.bin",
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
    }
    argv = [word for name, value in values.items() for word in (f"--{name}", value)]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    process = start(argv, **rank)
    _, log = process.communicate(timeout=400)
    assert process.returncode == 0, log
    assert "nf4 (double-quantised)" in log
    adapter = torch.load(tmp_path / "out/adapter_model.bin", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())
    loaded = load_model(str(tmp_path / "out"), quantization=choose_quantization(str(tmp_path / "out"), 4))
    assert all(torch.isfinite(logits).all() for logits in fixed_logits(loaded))
