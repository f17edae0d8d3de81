"""Where a restored optimizer finds its count of steps."""

import pytest
import torch

from llava_ft.training.optimizer_state import count_where_it_is_read


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
@pytest.mark.parametrize("step", [torch.tensor(3), torch.tensor(3.0)])
def test_a_fused_optimizer_counts_on_the_device(fused: bool, device: str, step: torch.Tensor):
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], fused=fused)
    state = count_where_it_is_read({"step": step}, optimizer, torch.device("meta"))
    assert state["step"].device.type == device
    assert state["step"].dtype == torch.float32


def test_counts_that_are_plain_numbers_stay():
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    assert count_where_it_is_read({"step": 3}, optimizer, torch.device("meta")) == {"step": 3}


def test_the_fused_optimizer_goes_on_from_the_state_of_the_other():
    """Both keep the same state, so that a checkpoint of one is one of the other."""
    weights = [torch.linspace(-1, 1, 6, requires_grad=True), torch.linspace(-1, 1, 6, requires_grad=True)]
    optimizers = [torch.optim.AdamW([weight], lr=0.1) for weight in weights]
    for step in range(4):
        if step == 2:
            fused = torch.optim.AdamW([weights[1]], lr=0.1, fused=True)
            saved = {"state": optimizers[1].state_dict()["state"], "param_groups": fused.state_dict()["param_groups"]}
            fused.load_state_dict(saved)
            optimizers[1] = fused
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = weight.detach() ** 2 + step
            optimizer.step()
    assert optimizers[1].state[weights[1]]["step"].item() == 4
    torch.testing.assert_close(weights[1], weights[0])
