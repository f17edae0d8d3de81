"""Frozen weights are in the compute dtype from the file on: no float32 copy is made, in setting up or in a step."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_ft.checkpoint.weights import WeightFiles
from tests.training.helpers import prepare

pytestmark = pytest.mark.usefixtures("in_recordings")
METHODS = {
    "lora": ("lora", {}),
    "PEFT's lora": ("lora", {"fast_lora": "False"}),
    "recomputed": ("lora", {"fast_lora": "False", "gradient_checkpointing": "full"}),
    "selective": ("lora", {"fast_lora": "False", "gradient_checkpointing": "selective"}),
    "nf4": ("lora", {"bits": "4"}),
    "projector": ("projector", {}),
}


class Watch(TorchDispatchMode):
    """Notes each float32 tensor that has the shape of a frozen weight, or is made of one as a whole."""

    def __init__(self, shapes: set[torch.Size], frozen: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.shapes = shapes
        self.storages = {tensor.untyped_storage()._cdata: tensor.numel() for tensor in frozen}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [self.storages.get(t.untyped_storage()._cdata, -1) for t in tree_leaves(args) if torch.is_tensor(t)]
        for tensor in tree_leaves(result):
            if not torch.is_tensor(tensor) or tensor.dtype != torch.float32 or tensor.device.type == "meta":
                continue
            is_written = func is not torch.ops.aten.empty.memory_format
            if is_written and (tensor.shape in self.shapes or tensor.numel() in sizes):
                self.found.append(f"{func} {tuple(tensor.shape)}")
        return result


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The language model with a file in bfloat16, as published models have it."""
    source, target = Path("ckpt/base-llm"), tmp_path / "base"
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".model"):
            (target / file.name).write_bytes(file.read_bytes())
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    weights = {name: value.bfloat16() for name, value in WeightFiles.open(source).read().items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    return target


def test_the_watch_sees_a_copy():
    weight = torch.zeros(6, 4, dtype=torch.bfloat16)
    for shapes, frozen in ((set(), [weight]), ({weight.shape}, [])):
        with Watch(shapes, frozen) as watch:
            weight.float()
            torch.empty(6, 4)
        assert watch.found == ["aten._to_copy.default (6, 4)"]
    with Watch(set(), [weight]) as watch:
        torch.empty(4, 6).copy_(weight.T)
    assert watch.found == ["aten.copy_.default (4, 6)"]


@pytest.mark.parametrize("method", METHODS)
def test_no_float32_copy_is_made(tmp_path: Path, base: Path, method: str):
    name, changes = METHODS[method]
    shapes = {torch.Size(info.shape) for info in WeightFiles.open(base).tensors.values() if len(info.shape) == 2}
    with Watch(shapes - {torch.Size((64, 64))}) as watch:  # the projector, which is trained, has matrices of that shape
        run = prepare(tmp_path / "out", name, bf16="True", model_name_or_path=base, **changes)
    assert watch.found == []
    trainer = run.trainer
    parameters = dict(trainer.model.named_parameters())
    assert {p.dtype for p in parameters.values() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters.values() if not p.requires_grad} <= {torch.bfloat16, torch.uint8}
    frozen = [p for p in parameters.values() if not p.requires_grad and p.dim() == 2]
    with Watch(set(), frozen) as watch:
        trainer.args.max_steps = 1
        trainer.train()
    run.stop.release()
    assert trainer.state.global_step == 1
    assert watch.found == []
