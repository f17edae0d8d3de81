"""The switches that make a step fast or small, their combinations, and one run's losses and gradients."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from llava_ft.training.run import Run
from tests.training.helpers import prepare

Flags = Mapping[str, str]
Combination = dict[str, str]

NUM_STEPS = 2
METHODS: Mapping[str, str] = {"lora": "lora", "qlora": "lora", "full": "full", "projector": "projector"}
SWITCHES: Mapping[str, Mapping[str, Flags]] = {
    "method": {
        "lora": {"lora_dropout": "0", "mm_projector_lr": "1e-3", "group_by_modality_length": "False"},
        "qlora": {
            "lora_dropout": "0",
            "mm_projector_lr": "1e-3",
            "group_by_modality_length": "False",
            "bits": "4",
        },
        "full": {"weight_decay": "0"},
        "projector": {},
    },
    "attention": {"eager": {"attn_implementation": "eager"}, "sdpa": {"attn_implementation": "sdpa"}},
    "rows": {"padded": {}, "packed": {"packing": "True"}, "joined": {"padding_free": "True"}},
    "recomputed": {
        "none": {"gradient_checkpointing": "none"},
        "full": {"gradient_checkpointing": "full"},
        "every second layer": {"gradient_checkpointing": "full", "gradient_checkpointing_every": "2"},
        "selective": {"gradient_checkpointing": "selective"},
        "offloaded": {"gradient_checkpointing": "full", "activation_offload": "True"},
    },
    "adapters": {"PEFT's": {"fast_lora": "False"}, "own": {"fast_lora": "True"}},
    "compiled": {"no": {}, "by layer": {"torch_compile": "True", "torch_compile_backend": "aot_eager"}},
    "images": {"encoded": {}, "cached": {"vision_cache": "CACHE"}},
    "loss": {"one chunk": {}, "chunks of 3": {}},
}
PLAIN: Combination = {name: next(iter(values)) for name, values in SWITCHES.items()}
"""The way without any switch; its loss is computed from the logits of all positions."""

COMMON: Flags = {
    "max_steps": str(NUM_STEPS),
    "per_device_train_batch_size": "14",
    "save_strategy": "no",
    "model_max_length": "512",
    "optim": "sgd",
    "learning_rate": "1e-2",
    "lr_scheduler_type": "constant",
    "max_grad_norm": "0",
}


def is_allowed(combination: Combination) -> bool:
    """Whether a combination says something: only LoRA has adapters, and compiled layers keep what they like."""
    if combination["compiled"] != "no" and combination["recomputed"] == "selective":
        return False
    return combination["method"] in ("lora", "qlora") or combination["adapters"] == "PEFT's"


def all_combinations(switches: Mapping[str, Iterable[str]] = SWITCHES) -> Iterator[Combination]:
    """Every allowed combination."""
    for values in itertools.product(*switches.values()):
        combination = dict(zip(switches, values, strict=True))
        if is_allowed(combination):
            yield combination


def pairs_of(combination: Combination) -> set[tuple[tuple[str, str], ...]]:
    """All pairs of settings in a combination."""
    return set(itertools.combinations(combination.items(), 2))


def pairwise(combinations: Iterable[Combination]) -> list[Combination]:
    """Choose few combinations in which every pair of settings occurs that occurs in any.

    Of those that add as many pairs, one without compiling is taken, which takes a tenth of the time.
    """
    places: dict[Any, int] = {}
    left: dict[int, int] = {}  # by number of the combination, its pairs as bits
    candidates = list(combinations)
    for number, combination in enumerate(candidates):
        bits = (1 << places.setdefault(pair, len(places)) for pair in itertools.combinations(combination.items(), 2))
        left[number] = sum(bits)
    uncovered = (1 << len(places)) - 1
    chosen: list[Combination] = []
    while uncovered:
        best = max(left, key=lambda at: ((left[at] & uncovered).bit_count(), candidates[at]["compiled"] == "no", at))
        uncovered &= ~left.pop(best)
        chosen.append(candidates[best])
    return chosen


@dataclass
class Observed:
    """What a run's steps gave.

    Attributes:
        losses: The loss of each step.
        gradients: For each step the gradient of every trained parameter.
    """

    losses: Sequence[float]
    gradients: Sequence[Mapping[str, torch.Tensor]]


class _Watch(TrainerCallback):
    """Copies gradients before each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def observe(combination: Combination, folder: Path, cache: Path, patch: pytest.MonkeyPatch) -> Observed:
    """Train `NUM_STEPS` steps, each on all records, and say what they gave.

    Args:
        combination: A setting for each of `SWITCHES`.
        folder: Output directory.
        cache: Directory of the vision cache.
        patch: Sets the size of the loss's chunks, which no flag does.
    """
    values: dict[str, str] = dict(COMMON)
    for name, setting in combination.items():
        values |= SWITCHES[name][setting]
    if "vision_cache" in values:
        values["vision_cache"] = str(cache)
    if combination["loss"] == "chunks of 3":
        patch.setattr("llava_ft.models.loss.CPU_CHUNK", 3 * 512)
    run = prepare(folder, METHODS[combination["method"]], **values)
    randomize_adapters(run.trainer.model)
    if combination == PLAIN | {"method": combination["method"]}:
        _compute_all_logits(run, patch)
    watch = _Watch()
    run.trainer.add_callback(watch)
    try:
        run.trainer.train()
    finally:
        run.stop.release()
        patch.undo()
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    return Observed(losses, watch.gradients)


def randomize_adapters(model: torch.nn.Module) -> None:
    """Give the adapters' second matrices values from their names: at zero, the gradients of the first ones are too."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _compute_all_logits(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Let a run compute the loss as a textbook does: logits everywhere, one cross-entropy."""

    def loss_of(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        labels = inputs["labels"]
        taken = ("input_ids", "attention_mask", "pixel_values", "tile_index", "image_sizes")
        logits = model(**{key: inputs[key] for key in taken if key in inputs}).logits
        targets = labels[:, 1:].flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)

    patch.setattr(run.trainer, "compute_loss", loss_of)
