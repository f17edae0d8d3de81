"""Rows of the table that are written by running something: this program, transformers or PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.names import plain_name
from tests.layouts.hf import Files, Model, Target, load_hf, write_hf, write_hf_adapter, write_native_peft_adapter
from tests.layouts.native import LANGUAGE_MODEL, VISION, Checkpoint, Tensors, llava_state, v15
from tests.training.helpers import prepare

_FROM_TRANSFORMERS = (
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.vision_tower.", f"{VISION}vision_model."),
)


@dataclass(frozen=True)
class OwnRun:
    """A run of this program whose first checkpoint is the row.

    Attributes:
        method: As in `tests.training.helpers`.
        flags: Further flags.
    """

    method: Literal["lora", "projector", "full"]
    flags: Mapping[str, Any] = field(default_factory=dict)

    def start(self, output: Path, **flags: Any) -> None:
        """Train for two steps, writing a checkpoint at each; with `resume_from_checkpoint`, from there."""
        run = self._prepare(output, flags)
        run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        run.trainer.save_model()

    def write(self, path: Path) -> Checkpoint:
        """Train, and return the checkpoint of the first step."""
        output = path.parent / "earlier"
        self.start(output)
        first = output / "checkpoint-1"
        trained = self._prepare(path.parent / "read", {"resume_from_checkpoint": str(first)})
        trained.trainer._load_from_checkpoint(str(first))
        return Checkpoint(first, _state_of(trained.trainer.model), None if self.method == "full" else LANGUAGE_MODEL)

    def _prepare(self, output: Path, flags: Mapping[str, Any]) -> Any:
        small = {"max_steps": 2, "save_steps": 1, "lora_dropout": 0, "group_by_modality_length": None}
        return prepare(output, self.method, **(small | dict(self.flags) | dict(flags)))


def _state_of(model: Any) -> Tensors:
    """Return the tensors of a model in training, with LoRA's product in the weights."""
    state = llava_state()
    values = {plain_name(name): value.detach().clone() for name, value in model.named_parameters()}
    state |= {name: value for name, value in values.items() if "lora_" not in name and value.is_floating_point()}
    for name, a in values.items():
        if ".lora_A." in name:
            weight, b = name.replace(".lora_A.weight", ".weight"), values[name.replace(".lora_A.", ".lora_B.")]
            settings = model.peft_config["default"]
            state[weight] = state[weight] + settings.lora_alpha / settings.r * (b @ a)
    return state


def hf(model: Model, files: Files, num_shards: int = 1):
    """A model of transformers' own layout."""

    def write(path: Path) -> Checkpoint:
        write_hf(path, model, files, num_shards=num_shards)
        _silence_added_tokens(path)
        return Checkpoint(path, _native(load_hf(path).state_dict()))

    return write


def hf_adapter(target: Target):
    """An adapter that PEFT made on a model of transformers' own layout."""

    def write(path: Path) -> Checkpoint:
        base = path.parent / "base"
        write_hf(base)
        write_hf_adapter(path, base, target)
        merged = cast("Any", PeftModel.from_pretrained(load_hf(base), path)).merge_and_unload()
        return Checkpoint(path, _native(merged.state_dict()), base)

    return write


def peft_adapter(**options: Any):
    """An adapter that PEFT made on a whole model of the native layout, without projector beside it."""

    def write(path: Path) -> Checkpoint:
        base = v15(path.parent / "base")
        write_native_peft_adapter(path, base.path, **options)
        state, adapter = dict(base.state), load_file(path / "adapter_model.safetensors")
        for key, a in adapter.items():
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                state[name] = state[name] + 2 * (adapter[key.replace("lora_A", "lora_B")] @ a)
        return Checkpoint(path, state, base.path)

    return write


def _silence_added_tokens(path: Path, num_ordinary: int = 512) -> None:
    """Have the model never answer with `<image>` or `<pad>`, as a trained one: other layouts have no rows for them."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        heads = [name for name in tensors if name.endswith("lm_head.weight")]
        for name in heads:
            tensors[name][num_ordinary:] = 0
        if heads:
            save_file(tensors, file, metadata={"format": "pt"})


def _native(state: Mapping[str, torch.Tensor]) -> Tensors:
    named: Tensors = {}
    for name, value in state.items():
        for theirs, ours in _FROM_TRANSFORMERS:
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        named[name] = value
    return named
