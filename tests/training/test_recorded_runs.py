"""Whole training runs of original LLaVA are reproduced step by step."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_ft.args import parse_args
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.training.run import Run, prepare_run
from tests.conftest import RECORDINGS, read_recording

LOSS_TOLERANCE = 1e-4


class Rates(TrainerCallback):
    """Notes the learning rates each step is made with."""

    def __init__(self):
        self.per_step: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.per_step.append([group["lr"] for group in optimizer.param_groups])


def prepare_recorded(name: str, tmp_path: Path, *more: str) -> tuple[Run, dict]:
    """Set up the recorded run, with its records in the recorded order and its weights before the first step."""
    trace = read_recording(f"train/{name}/trace.json")
    argv = trace["argv"]
    flags = dict(zip(argv[::2], argv[1::2], strict=True))
    records = json.loads((RECORDINGS / flags["--data_path"]).read_text())
    data_path = tmp_path / "ordered.json"
    data_path.write_text(json.dumps([records[index] for index in trace["order"]]))
    flags |= {
        "--data_path": str(data_path),
        "--image_folder": "images/src",
        "--output_dir": str(tmp_path / "out"),
        "--group_by_modality_length": "False",
        "--train_sampling_strategy": "sequential",
        "--loss_normalization": "micro_batch",
        "--attn_implementation": "eager",
    }
    run = prepare_run(parse_args([text for item in flags.items() for text in item] + list(more)))
    start = {"lora_ga2_group": "lora_vt32"}.get(name, name)
    init = RECORDINGS / f"train/{start}/init.safetensors"
    if init.exists():
        values = load_file(init)
        trainable = {n: p for n, p in run.trainer.model.named_parameters() if p.requires_grad}
        assert set(values) == set(trainable)
        for parameter_name, value in values.items():
            trainable[parameter_name].data.copy_(value)
    return run, trace


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize("name", ["lora_vt32", "lora_ga2_group", "pretrain_vt32", "full_vt32"])
def test_losses_and_rates_of_each_step(name: str, tmp_path: Path):
    run, trace = prepare_recorded(name, tmp_path)
    rates = Rates()
    run.trainer.add_callback(rates)
    run.trainer.train()

    by_step: dict[int, list[dict]] = {}
    for step in trace["steps"]:
        by_step.setdefault(step["global_step"], []).append(step)
    history = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(history) == len(by_step)
    for entry, steps in zip(history, by_step.values(), strict=True):
        assert entry["loss"] == pytest.approx(sum(step["loss"] for step in steps), abs=LOSS_TOLERANCE)
        assert entry["grad_norm"] == pytest.approx(steps[-1]["accumulated_grad_norm"], rel=1e-3)
    # DeepSpeed drops empty groups; the original makes one, we make none.
    sizes = [len(group["params"]) for group in trace["optimizer"]["groups"]]
    recorded = [[lr for lr, size in zip(steps[0]["lrs"], sizes, strict=True) if size] for steps in by_step.values()]
    assert rates.per_step == recorded


WRITTEN = {
    "lora_vt32": ("adapter_model", "non_lora_trainables"),
    "pretrain_vt32": ("mm_projector",),
    "full_vt32": ("model",),
}


@pytest.mark.usefixtures("in_recordings")
@pytest.mark.parametrize("name", list(WRITTEN))
def test_the_same_keys_are_written(name: str, tmp_path: Path):
    run, _ = prepare_recorded(name, tmp_path, "--save_vision_tower", "True")
    run.trainer.train()
    run.trainer.save_model()
    recorded = read_recording(f"train/{name}/artifacts.json")
    for stem in WRITTEN[name]:
        file = next(file for file in recorded if file.startswith(f"{stem}."))
        expected = {key: (tuple(shape), dtype) for key, (*shape, dtype, _) in _tensors(recorded[file])}
        ours = next((tmp_path / "out").glob(f"{stem}.*[bs]*"))
        written = WeightFiles.open(ours).tensors
        assert {key: (info.shape, str(info.dtype).removeprefix("torch.")) for key, info in written.items()} == expected


def _tensors(recorded: dict):
    for key, (shape, dtype, sha) in recorded.items():
        yield key, (*shape, dtype, sha)
