"""Stage 0 in half precision steps the optimizer as often as the other stages do."""

import json
import subprocess
import sys

import pytest

from tests.training.helpers import REPOSITORY

pytest.importorskip("deepspeed")

TWO_STEPS = """
import json, sys
import torch, deepspeed, deepspeed.ops
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from llava_ft.training.deepspeed_defects import leave_out_idle_step

deepspeed.ops.__compatible_ops__ = {ShareMemCommBuilder.NAME: False}
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

def run(stage):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    engine, wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(2):
        loss = engine(torch.ones(1, 4, dtype=torch.bfloat16)).square().mean()
        engine.backward(loss)
        engine.step()
    (state,) = wrapped.optimizer.state.values()
    return {"steps": float(state["step"]), "weights": engine.module.weight.flatten().tolist()}

before = run(0)
leave_out_idle_step()
print("RESULT" + json.dumps([before, run(0), run(1)]))
"""


def test_the_idle_step():
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_STEPS],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"} | rank,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain, without, divided = json.loads(done.stdout.partition("RESULT")[2])
    assert plain["steps"] == 3, "DeepSpeed no longer makes the step: deepspeed_defects.py can go"
    assert without["steps"] == divided["steps"] == 2
    assert without["weights"] == divided["weights"] != plain["weights"]
