"""Small runs on the recorded checkpoints, in this process or in one of their own."""

import json
import os
from pathlib import Path

import torch

from llava_ft.args import parse_args
from llava_ft.convert.verify import NativeSpeaker, fixed_questions
from llava_ft.inference.load import LoadedModel
from llava_ft.training.run import Run, prepare_run
from tests.conftest import RECORDINGS
from tests.training.warm_start import REPOSITORY, Program

COMMON = {
    "model_name_or_path": "ckpt/base-llm",
    "version": "v1",
    "data_path": "data/mix.json",
    "image_folder": "images/src",
    "vision_tower": "ckpt/clip-tiny",
    "pretrain_mm_mlp_adapter": "ckpt/mm_projector.bin",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": "-2",
    "image_aspect_ratio": "pad",
    "model_max_length": "2048",
    "per_device_train_batch_size": "2",
    "learning_rate": "1e-3",
    "lr_scheduler_type": "cosine",
    "logging_steps": "1",
    "save_strategy": "steps",
    "save_steps": "3",
    "max_steps": "6",
    "use_cpu": "True",
    "seed": "7",
}
METHODS = {
    "lora": {
        "lora_enable": "True",
        "lora_r": "4",
        "lora_alpha": "8",
        "lora_dropout": "0.1",
        "mm_projector_lr": "1e-4",
        "group_by_modality_length": "True",
    },
    "projector": {"tune_mm_mlp_adapter": "True", "version": "plain", "data_path": "data/pretrain.json"},
    "full": {"weight_decay": "0.1"},
}


def flags(output_dir: Path, method: str = "lora", **changes: object) -> list[str]:
    """Return the command line of a small run; a change of None leaves a flag out."""
    values = COMMON | METHODS[method] | {"output_dir": str(output_dir)} | changes
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def prepare(output_dir: Path, method: str = "lora", **changes: object) -> Run:
    """Set up a small run in this process."""
    return prepare_run(parse_args(flags(output_dir, method, **changes)))


def train(output_dir: Path, method: str = "lora", **changes: object) -> Run:
    """Train a small run in this process, resuming if there is something to resume."""
    run = prepare(output_dir, method, **changes)
    try:
        run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    finally:
        run.stop.release()
    run.trainer.save_model()
    return run


def start(argv: list[str], **environment: str) -> Program:
    """Start `train.py` in a process of its own."""
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment
    return Program(argv, RECORDINGS, variables)


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Everything that a step changes: trained tensors and optimizer state, by name."""
    state = {name: p.detach().clone() for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    for index, entry in run.trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer {index} {key}": torch.as_tensor(value).clone() for key, value in entry.items()}
    return state


def write_records(path: Path, records: list[object]) -> Path:
    """Write a data file."""
    path.write_text(json.dumps(records))
    return path


def fixed_logits(loaded: LoadedModel) -> list[torch.Tensor]:
    """Return a model's logits on the fixed questions, `(T, V)` each."""
    return [NativeSpeaker(loaded).logits(question) for question in fixed_questions(loaded)]
