"""The loss in chunks equals cross-entropy over all logits, in value and gradients."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava_ft.constants import IGNORE_INDEX
from llava_ft.models import loss as loss_module
from llava_ft.models.loss import LossHead, mean_loss, supervised_loss, supervised_positions
from llava_ft.models.token_rows import HeadWithNewRows, last_rows

POSITIONS, WIDTH, VOCABULARY = 37, 16, 50


@pytest.fixture(params=[1, 10, 1000], ids=lambda rows: f"{rows} rows a chunk")
def chunks(request, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_CHUNK", request.param * VOCABULARY)


def make_head(*, trained: bool, new_rows: int = 0, dtype: torch.dtype = torch.float32) -> LossHead:
    torch.manual_seed(0)
    head = LossHead(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(trained)
    if new_rows:
        return HeadWithNewRows(head, last_rows(head.weight, new_rows))
    return head


def make_batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = (3 * torch.randn(POSITIONS, WIDTH)).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (POSITIONS,))


def gradients(loss: torch.Tensor, hidden: torch.Tensor, head: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad} | {"hidden": hidden}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("trained", "new_rows"), [(False, 0), (True, 0), (False, 3)])
def test_equals_cross_entropy_of_all_logits(trained, new_rows):
    head, (hidden, targets) = make_head(trained=trained, new_rows=new_rows), make_batch()
    plain = F.cross_entropy(head(hidden), targets, reduction="sum") / 7
    ours = mean_loss(hidden, head, targets, 7)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for name, expected in gradients(plain, hidden, head).items():
        actual = gradients(mean_loss(hidden, head, targets, 7), hidden, head)[name]
        assert ((actual - expected).norm() / expected.norm()).item() < 1e-6, name


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_it_is_as_near_to_float32_as_cross_entropy_is(autocast):
    """Both round the logits to 8 bits; beyond that the gradients may differ by the rounding of their terms."""
    dtype = torch.float32 if autocast else torch.bfloat16
    head, (hidden, targets) = make_head(trained=True, dtype=dtype), make_batch(torch.bfloat16)
    exact = make_head(trained=True)
    exact.load_state_dict({name: value.to(torch.bfloat16) for name, value in head.state_dict().items()})
    hidden32 = hidden.detach().float().requires_grad_()
    reference = F.cross_entropy(exact(hidden32), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = supervised_loss(hidden, head, targets)
        plain = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    expected = gradients(reference, hidden32, exact)
    for name, value in gradients(ours, hidden, head).items():
        assert value.dtype == (hidden if name == "hidden" else head.weight).dtype
        assert ((value.float() - expected[name]).norm() / expected[name].norm()).item() < 0.02, name


def test_no_supervised_position_gives_zero_with_zero_gradients():
    head, (hidden, _) = make_head(trained=True), make_batch()
    loss = mean_loss(hidden[:0], head, torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(loss, hidden, head).values())


@pytest.mark.parametrize("num_items", [None, 4, torch.tensor(4), torch.tensor(0)])
def test_what_the_sum_is_divided_by(num_items):
    head, (hidden, targets) = make_head(trained=False), make_batch()
    total = supervised_loss(hidden, head, targets)
    divisor = len(targets) if num_items is None else max(int(num_items), 1)
    assert mean_loss(hidden, head, targets, num_items).item() == pytest.approx(total.item() / divisor, rel=1e-6)


def test_logits_of_a_whole_batch_are_never_there(monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_CHUNK", 5 * VOCABULARY)
    head, (hidden, targets) = make_head(trained=True), make_batch()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[1:] == (VOCABULARY,) and len(result) != WIDTH:
                largest = max(largest, len(result))
            return result

    with Watch():
        supervised_loss(hidden, head, targets).backward()
    assert largest == 5


def test_evaluation_computes_no_gradient():
    head, (hidden, targets) = make_head(trained=True), make_batch()
    with torch.no_grad():
        loss = supervised_loss(hidden, head, targets)
    assert loss.item() == pytest.approx(F.cross_entropy(head(hidden), targets, reduction="sum").item(), rel=1e-6)
    assert not loss.requires_grad


def test_another_head_gives_all_logits():
    hidden, targets = make_batch()
    head = nn.Sequential(nn.Linear(WIDTH, VOCABULARY))
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    assert torch.equal(supervised_loss(hidden, head, targets), expected)


def test_new_rows_are_part_of_the_logits():
    head, (hidden, _) = make_head(trained=False, new_rows=3), make_batch()
    assert isinstance(head, HeadWithNewRows)
    assert torch.allclose(head(hidden), hidden @ head.weight.T)  # they start from the rows they stand for


def test_positions_are_those_before_a_label():
    labels = torch.tensor([[5, IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 8, IGNORE_INDEX, IGNORE_INDEX]])
    positions = supervised_positions(labels)
    assert positions.tolist() == [1, 2, 4]
    assert labels.flatten()[positions + 1].tolist() == [6, 7, 8]


def test_liger_is_used_on_a_gpu_where_it_is_installed(monkeypatch):
    calls = []

    def fused(hidden, weight, targets, reduction):
        calls.append(reduction)
        return F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = fused
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    head, (hidden, targets) = make_head(trained=False), make_batch()
    on_gpu = SimpleNamespace(is_cuda=True)
    assert loss_module.fused_kernel(on_gpu, head.matrices(), targets) is fused
    assert loss_module.fused_kernel(hidden, head.matrices(), targets) is None  # on a CPU
    assert loss_module.fused_kernel(on_gpu, head.matrices(), targets[:0]) is None
    assert loss_module.fused_kernel(on_gpu, make_head(trained=False, new_rows=2).matrices(), targets) is None


def test_without_liger_the_loss_is_computed_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    head, (_, targets) = make_head(trained=False), make_batch()
    assert loss_module.fused_kernel(SimpleNamespace(is_cuda=True), head.matrices(), targets) is None
