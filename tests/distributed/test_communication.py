"""What two ranks send under DeepSpeed is what docs/internals/scaling.md is computed from.

Collectives are counted where Python hands them to torch's process group. DDP is not among them: its buckets go from
C++ to the backend.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_ft.args import parse_args
from llava_ft.planning.model import build_model, parameter_shapes
from llava_ft.planning.request import Machine, plan_request
from llava_ft.resolve import resolve_model
from tests.benchmarks.conftest import BENCHMARKS
from tests.distributed import tasks
from tests.distributed.matrix import Pools, Setting
from tests.training.helpers import REPOSITORY

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("in_recordings")]

KINDS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "reduce": "reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
    "allgather_coalesced": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
}


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.itemsize
    return sum(map(_bytes_of, argument)) if isinstance(argument, (list, tuple)) else 0


def train_and_count(argv: list[str]) -> list[dict[str, int]]:
    """Train as one rank; returns the bytes of whole buffers sent by the end of each step, by kind of collective."""
    from transformers import TrainerCallback

    group = torch.distributed.ProcessGroup
    # What the class holds: a function looked up on it is another object, which put back would not take `self`.
    originals = {name: vars(group)[name] for name in KINDS}
    functions = {name: getattr(group, name) for name in KINDS}
    counted = dict.fromkeys(KINDS.values(), 0)
    after_steps = []

    class ReadCounters(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            after_steps.append(dict(counted))

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[KINDS[name]] += max(map(_bytes_of, (*args, *kwargs.values())))
            return functions[name](*args, **kwargs)

        return call

    for name in KINDS:
        setattr(group, name, counting(name))
    try:
        tasks.train(argv, [ReadCounters()])
    finally:
        for name, original in originals.items():
            setattr(group, name, original)
    return after_steps


def computed_bytes(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from scaling import collectives

    outline = resolve_model(parse_args(argv), need="config")
    request = plan_request(outline, Machine("cpu", 2))
    totals = dict.fromkeys(KINDS.values(), 0)
    for collective in collectives(outline, parameter_shapes(build_model(outline, request), request), request):
        totals[collective.kind] += collective.num_bytes
    return totals


@pytest.mark.parametrize(
    ("method", "stage", "dtype"),
    [
        ("lora", 1, "float32"),
        ("lora", 2, "float32"),
        ("lora", 3, "float32"),
        ("lora, kept whole", 3, "float32"),
        ("full", 2, "bfloat16"),
        ("full", 3, "bfloat16"),
    ],
)
def test_is_what_two_ranks_send(
    pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stage: int, dtype: str
):
    """One micro-batch a step. The second step is counted: what it takes to start is over."""
    config = json.loads((REPOSITORY / f"configs/zero{stage}.json").read_text())
    zero = config["zero_optimization"]
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if stage == 3 and not method.endswith("kept whole"):  # as if the model were large: no weight is soon needed again
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(config))
    changes = {"deepspeed": file, "max_steps": 2, "save_steps": 100, "group_by_modality_length": None}
    changes["gradient_accumulation_steps"] = 1
    argv = pools.command(tmp_path / "out", method.split(",")[0], Setting("zero2", 2), dtype, **changes)
    first, second = pools.of(2).run(train_and_count, argv)[0]
    sent = {kind: second[kind] - first[kind] for kind in first}
    expected = computed_bytes(argv, monkeypatch)
    for kind, num_bytes in expected.items():
        assert sent[kind] == pytest.approx(num_bytes, rel=0.02, abs=1024), (kind, sent, expected)
