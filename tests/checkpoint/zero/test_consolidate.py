"""`llava-ft consolidate`: what a run trained, out of DeepSpeed's files alone, as the run itself would have written it.

The tensors are those that original LLaVA recorded; the shards around them are written from their structure.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_ft import cli
from llava_ft.args import parse_args
from llava_ft.args.flags import all_flags
from llava_ft.checkpoint.names import native_name
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.checkpoint.zero.consolidate import Consolidation, consolidate, next_commands
from llava_ft.cli import main
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.load import load_model
from llava_ft.training.run import prepare_run
from tests.checkpoint.zero.shards import Step
from tests.conftest import RECORDINGS
from tests.training.helpers import flags

pytestmark = pytest.mark.usefixtures("in_recordings")

RUN = Path("train/lora/llava-tiny-lora")
PREFIX = "base_model.model."
CONFIGURATION = """\
model_name_or_path: ckpt/base-llm
version: v1
vision_tower: ckpt/clip-tiny
mm_projector_type: mlp2x_gelu
mm_vision_select_layer: -2
image_aspect_ratio: pad
lora_enable: true
lora_r: 8
lora_alpha: 16
"""


def adapter() -> dict[str, torch.Tensor]:
    return load_file(RECORDINGS / RUN / "adapter_model.safetensors")


def beside() -> dict[str, torch.Tensor]:
    return torch.load(RECORDINGS / RUN / "non_lora_trainables.bin", weights_only=True)


def base_weights() -> dict[str, torch.Tensor]:
    return load_file(RECORDINGS / "ckpt/base-llm/model.safetensors")


def lora_step(**changes) -> Step:
    """A LoRA run as original LLaVA has it in memory: LoRA matrices in one group, the projector in two."""
    lora = {re.sub(r"(lora_[AB])\.", r"\1.default.", name): value.float() for name, value in adapter().items()}
    projector = {name: value.float() for name, value in beside().items()}
    matrices = {name: value for name, value in projector.items() if value.dim() > 1}
    vectors = {name: value for name, value in projector.items() if value.dim() == 1}
    frozen = {PREFIX + name: value for name, value in base_weights().items()}
    return Step([lora, matrices, vectors], frozen, **({"stage": 3, "step": 5} | changes))


def full_step(**changes) -> Step:
    projector = {name.removeprefix(PREFIX): value.float() for name, value in beside().items()}
    trained = {name: value.float() for name, value in base_weights().items()} | projector
    tower = {
        f"model.vision_tower.vision_tower.{name}": value
        for name, value in load_file(RECORDINGS / "ckpt/clip-tiny/model.safetensors").items()
        if not name.endswith("position_ids")
    }
    return Step([trained], tower, **changes)


def run(checkpoint: Path, **options) -> Consolidation:
    return consolidate(checkpoint, **options)


def assert_recorded(directory: Path) -> None:
    """The files hold the tensors that the original's own files hold."""
    for ours, recorded in (("adapter_model.bin", adapter()), ("non_lora_trainables.bin", beside())):
        tensors = torch.load(directory / ours, weights_only=True)
        assert set(tensors) == set(recorded)
        assert all(torch.equal(tensors[name], value.float()) for name, value in recorded.items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_of_the_original_gets_its_projector_back(tmp_path: Path, stage: int):
    checkpoint = tmp_path / "run/checkpoint-5"
    shutil.copytree(RUN / "checkpoint-5", checkpoint)
    lora_step(stage=stage).write(checkpoint / "global_step5")
    (checkpoint / "latest").write_text("global_step5")
    with pytest.raises(CheckpointError, match=r"has an adapter but no non_lora_trainables.bin"):
        load_model(str(checkpoint))
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    result = run(checkpoint, config_file=tmp_path / "run.yaml")
    assert result.output == tmp_path / "run/checkpoint-5-consolidated"
    assert_recorded(result.output)
    before, after = (json.loads((path / "adapter_config.json").read_text()) for path in (checkpoint, result.output))
    assert before == after
    recorded, ours = (load_model(str(path), "ckpt/base-llm").model.state_dict() for path in (RUN, result.output))
    assert all(torch.equal(ours[name], value) for name, value in recorded.items())


def test_only_the_step_is_left(tmp_path: Path):
    step = lora_step().write(tmp_path / "global_step5")
    with pytest.raises(UserError, match=r"lora_alpha, the scale.* The adapter's rank is 8. Give .*--lora-alpha N"):
        run(step)
    assert not (tmp_path / "global_step5-consolidated").exists()
    result = run(step, lora_alpha=16, model_base="ckpt/base-llm")
    assert_recorded(result.output)
    inferred = json.loads((result.output / "adapter_config.json").read_text())
    assert (inferred["r"], inferred["lora_alpha"]) == (8, 16)
    assert inferred["base_model_name_or_path"] == str(RECORDINGS / "ckpt/base-llm")
    recorded = json.loads((RUN / "adapter_config.json").read_text())
    assert set(inferred) == set(recorded), "PEFT 0.10 refuses a key that it does not know"
    assert not result.is_usable
    assert "config.json is left out" in result.notes[-1]
    assert not any("merge" in command for command in next_commands(result))


def test_the_configuration_of_the_run_says_everything_else(tmp_path: Path):
    lora_step().write(tmp_path / "global_step5")
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    result = run(tmp_path, output=tmp_path / "out", config_file=tmp_path / "run.yaml")
    config = json.loads((result.output / "config.json").read_text())
    recorded = json.loads((RUN / "config.json").read_text())
    described = [key for key in recorded if key.startswith("mm_") and key != "mm_projector_lr"]
    assert {key: config[key] for key in described} == {key: recorded[key] for key in described}
    ours, theirs = (load_model(str(path), "ckpt/base-llm").model for path in (result.output, RUN))
    ids = torch.tensor([[1, *[-200] * 16, 40, 41, 42]])
    pixels = torch.ones(1, 3, 56, 56)
    assert torch.equal(ours(ids, pixel_values=pixels).logits, theirs(ids, pixel_values=pixels).logits)


def test_settings_are_taken_from_another_checkpoint_of_the_run(tmp_path: Path):
    lora_step().write(tmp_path / "run/checkpoint-5/global_step5")
    shutil.copytree(RUN, tmp_path / "run/checkpoint-4", ignore=shutil.ignore_patterns("checkpoint-*"))
    result = run(tmp_path / "run/checkpoint-5", output=tmp_path / "out")
    assert result.is_usable
    assert_recorded(result.output)
    assert (result.output / "config.json").read_bytes().strip()
    assert result.base == "ckpt/base-llm"


def test_what_contradicts_the_shards_is_refused(tmp_path: Path):
    step = lora_step().write(tmp_path / "global_step5")
    (tmp_path / "other.yaml").write_text("lora_r: 64\nlora_alpha: 16\n")
    with pytest.raises(UserError, match=r"lora_r is 64 .*other.yaml\), but the adapter's rank is 8"):
        run(step, config_file=tmp_path / "other.yaml")
    fields = json.loads((RUN / "adapter_config.json").read_text())
    (step / "adapter_config.json").write_text(json.dumps(fields | {"r": 4}))
    with pytest.raises(CheckpointError, match=r"adapter_config.json describes an adapter of rank 4, but .* has 8"):
        run(step)
    (step / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"--lora-alpha is 8, but .*adapter_config.json says 16"):
        run(step, lora_alpha=8)


def test_an_adapter_on_some_layers_names_them_all(tmp_path: Path):
    step = lora_step()
    step.groups = [{name: value for name, value in step.trained.items() if "layers.1.mlp.up_proj" not in name}]
    result = run(step.write(tmp_path / "step"), lora_alpha=16)
    targets = json.loads((result.output / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 13
    assert "model.layers.0.mlp.up_proj" in targets


def test_rows_of_added_tokens(tmp_path: Path):
    rows = {f"{PREFIX}{name}.new_rows": torch.randn(2, 64) for name in ("model.embed_tokens", "lm_head")}
    step = lora_step(stage=2, dtype=torch.float32)
    step.groups = [*step.groups, rows]
    result = run(step.write(tmp_path / "step"), lora_alpha=16)
    written = torch.load(result.output / "non_lora_trainables.bin", weights_only=True)
    for name, value in rows.items():
        assert torch.equal(written[name], value)
        whole = written[name.replace("new_rows", "weight")]
        assert torch.equal(whole[-2:], value)
        assert torch.equal(whole[:-2], step.frozen[name.replace("new_rows", "weight")][:-2])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_projector(tmp_path: Path, stage: int):
    trained = {name.removeprefix(PREFIX): value.float() for name, value in beside().items()}
    step = Step([trained], base_weights(), stage=stage, dtype=torch.float32)
    result = run(step.write(tmp_path / "step"), model_base="ckpt/base-llm")
    written = torch.load(result.output / "mm_projector.bin", weights_only=True)
    assert {name: value.tolist() for name, value in written.items()} == {n: v.tolist() for n, v in trained.items()}
    assert str(result.output / "mm_projector.bin") in next_commands(result)[-1]


def test_a_projector_with_the_embeddings_that_the_original_trains_beside_it(tmp_path: Path):
    trained = {name.removeprefix(PREFIX): value.float() for name, value in beside().items()}
    trained["model.embed_tokens.weight"] = torch.randn(514, 64)
    result = run(Step([trained], {}).write(tmp_path / "step"))
    assert result.kind == "projector"
    assert set(torch.load(result.output / "mm_projector.bin", weights_only=True)) == set(trained)


@pytest.mark.parametrize(("stage", "weights_format"), [(0, "bin"), (1, "safetensors"), (2, "safetensors"), (3, "bin")])
def test_a_whole_model(tmp_path: Path, stage: int, weights_format: str):
    step = full_step(stage=stage, dtype=torch.float32)
    checkpoint = tmp_path / "checkpoint-7"
    step.write(checkpoint / "global_step7")
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(Path("ckpt/llava15-tiny", name), checkpoint)
    result = run(checkpoint, weights_format=weights_format, max_shard_bytes=100_000)
    assert result.kind == "full"
    written = WeightFiles.open(result.output).read()
    assert set(written) == {native_name(name) for name in (*step.trained, *step.frozen)}
    assert all(torch.equal(written[native_name(n)], v.float()) for n, v in (step.trained | step.frozen).items())
    if stage == 2:
        loaded = load_model(str(result.output)).model
        assert torch.equal(loaded.lm_head.weight, step.trained["lm_head.weight"])
        reduced = run(checkpoint, dtype=torch.bfloat16)
        assert {info.dtype for info in WeightFiles.open(reduced.output).tensors.values()} == {torch.bfloat16}
        assert json.loads((reduced.output / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_whole_model_without_anything_else_takes_its_base_s_configuration(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    step = full_step().write(tmp_path / "step")
    for known in ({}, {"model_base": "ckpt/base-llm"}):
        result = run(step, **known)
        assert not (result.output / "config.json").exists()
        assert "give the run's configuration with --config and the directory of its base" in result.notes[-1]
        assert next_commands(result) == []
    result = run(step, config_file=tmp_path / "run.yaml")
    loaded = load_model(str(result.output), vision_tower="ckpt/clip-tiny")
    assert loaded.model.config.mm_vision_select_layer == -2
    assert len(loaded.tokenizer) == 512


def test_stage_0_does_not_guess_what_was_trained(tmp_path: Path):
    result = run(lora_step(stage=0, dtype=torch.float32).write(tmp_path / "a"), lora_alpha=16)
    assert_recorded(result.output)
    step = lora_step(stage=0)
    step.groups = [*step.groups, {f"{PREFIX}model.norm.weight": torch.ones(64)}]
    with pytest.raises(CheckpointError, match=r"By their names 32 parameters are LoRA .* optimizer had 33"):
        run(step.write(tmp_path / "b"), lora_alpha=16)


def test_lost_optimizer_files(tmp_path: Path):
    step = lora_step(stage=2)
    directory = step.write(tmp_path / "step")
    (directory / step.optimizer_file(0)).unlink()
    result = run(directory, lora_alpha=16, from_model_states=True)
    written = torch.load(result.output / "adapter_model.bin", weights_only=True)
    assert all(torch.equal(written[name], value.bfloat16().float()) for name, value in adapter().items())
    assert "precision the run computed in" in result.notes[0]


def test_an_output_that_holds_something_else_is_not_replaced(tmp_path: Path):
    checkpoint = tmp_path / "run/checkpoint-5"
    step = lora_step().write(checkpoint / "global_step5")
    for output in (step, checkpoint, tmp_path / "run"):
        with pytest.raises(UserError, match=r"holds the shards themselves"):
            run(checkpoint, output=output, lora_alpha=16)
    other = tmp_path / "other"
    other.mkdir()
    (other / "llava_ft.json").touch()
    with pytest.raises(UserError, match=r"other is there already and is no earlier consolidation"):
        run(checkpoint, output=other, lora_alpha=16)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"is a file"):
        run(checkpoint, output=tmp_path / "file", lora_alpha=16)
    for _ in range(2):
        assert_recorded(run(checkpoint, lora_alpha=16).output)
    assert step.is_dir()


def test_the_record_says_what_it_was_made_from(tmp_path: Path):
    result = run(lora_step(ranks=3).write(tmp_path / "global_step5"), lora_alpha=16)
    record = json.loads((result.output / "consolidated.json").read_text())
    assert record["shards"] == str(tmp_path / "global_step5")
    assert (record["zero_stage"], record["ranks"], record["step"], record["tensors"]) == (3, 3, 5, 32)
    manifest = json.loads((result.output / "llava_ft.json").read_text())
    assert (manifest["kind"], manifest["step"]) == ("lora", 5)
    assert "xxh3_128" in manifest["files"]["non_lora_trainables.bin"]


def test_the_command_and_what_it_says_to_run_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora_step().write(tmp_path / "checkpoint-5/global_step5")
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    argv = ["consolidate", str(tmp_path / "checkpoint-5"), "--config", str(tmp_path / "run.yaml")]
    assert main([*argv, "--format", "safetensors"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "The adapter and what was trained beside it of step 5: 32 tensors" in said.err
    assert (tmp_path / "checkpoint-5-consolidated/non_lora_trainables.safetensors").is_file()
    merge, train = (line.strip() for line in said.err.rpartition("Next, one of:\n")[2].splitlines())
    assert main([*shlex.split(merge)[1:], "--model-base", "ckpt/base-llm"]) == 0
    assert "max |difference of logits|" in capsys.readouterr().err
    start = shlex.split(train)[shlex.split(train).index("--lora_weight_path") :][:2]
    args = parse_args([*flags(tmp_path / "new", lora_r=8, lora_alpha=16), *start])
    prepared = prepare_run(args)
    prepared.stop.release()
    weights = {name: value for name, value in prepared.trainer.model.named_parameters() if value.requires_grad}
    assert all(torch.equal(weights[name], value) for name, value in lora_step().trained.items())


def test_a_request_that_cannot_be_carried_out_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    step = str(lora_step().write(tmp_path / "global_step5"))
    (tmp_path / "list.yaml").write_text("- a\n")
    for argv, message in (
        ([str(tmp_path / "none")], "does not exist"),
        ([step], "lora_alpha"),
        ([step, "--config", "none.yaml"], r"--config none.yaml does not exist"),
        ([step, "--config", str(tmp_path / "list.yaml")], r"list.yaml is no configuration"),
        ([step, "--max-shard-size", "big"], "--max-shard-size: 'big' is no size"),
        ([step, "--format", "onnx"], "invalid choice"),
        ([], "CHECKPOINT"),
    ):
        assert main(["consolidate", *argv]) == 2
        said = capsys.readouterr().err
        assert re.search(message, said)
        assert "Traceback" not in said


WITHOUT = ("deepspeed", "bitsandbytes", "mpi4py", "wandb", "datasets")


def test_neither_deepspeed_nor_a_gpu_is_needed(tmp_path: Path):
    step = lora_step().write(tmp_path / "global_step5")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({WITHOUT}));"
        "import torch; torch.cuda.is_available = lambda: False;"
        "from llava_ft.cli import main;"
        f"sys.exit(main(['consolidate', {str(step)!r}, '--lora-alpha', '16']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=RECORDINGS.parents[1], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert_recorded(tmp_path / "global_step5-consolidated")


def test_the_page_names_flags_that_exist(capsys: pytest.CaptureFixture[str]):
    page = (RECORDINGS.parents[1] / "docs/how-to/consolidate.md").read_text()
    for command in (cli.consolidate, cli.merge):
        with pytest.raises(SystemExit):
            command(["--help"])
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    known |= {f"--{name}" for name in all_flags()}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page)) <= known
