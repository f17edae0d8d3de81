"""The last layer computed where it is read equals the plain computation."""

import pytest
import torch
from torch import nn

from llava_ft.constants import IGNORE_INDEX
from llava_ft.models.kernels.last_layer import LastDecoderLayer
from llava_ft.models.llava import LlavaForCausalLM
from tests.models.test_forward import load

LENGTHS = (11, 7, 14)
KERNELS = ["eager", "sdpa"]


def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels; some answers in the middle, one sample without any."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, 500, (length,), generator=generator)
        labels = torch.full_like(ids, IGNORE_INDEX)
        if number != 1:
            labels[3:6] = ids[3:6]
            labels[-2:] = ids[-2:]
        found.append((ids, labels))
    return found


def joined() -> dict[str, torch.Tensor]:
    ids, labels = (torch.cat(parts)[None] for parts in zip(*samples(), strict=True))
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
    }


def padded() -> dict[str, torch.Tensor]:
    ids, labels = zip(*samples(), strict=True)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(list(ids), batch_first=True),
        "labels": nn.utils.rnn.pad_sequence(list(labels), batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": mask,
    }


def make_model(kernel: str) -> LlavaForCausalLM:
    model = load("ckpt/llava15-tiny", kernel)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def loss_and_gradients(model: LlavaForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: tuple[float, dict], expected: tuple[float, dict], tolerance: float = 1e-6) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        scale = value.norm().clamp(min=1e-3)
        assert ((actual[1][name] - value).norm() / scale).item() < 10 * tolerance, name


@pytest.mark.usefixtures("in_recordings")
class TestLastLayer:
    @pytest.mark.parametrize("batch", [padded, joined])
    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_loss_and_gradients_are_those_of_the_whole_layer(self, monkeypatch, kernel, batch, checkpointing):
        model = make_model(kernel)
        if checkpointing:
            model.model.gradient_checkpointing = True
            model._set_gradient_checkpointing(enable=True)
        selective = loss_and_gradients(model, batch())
        monkeypatch.setattr(model, "_reads_selectively", lambda kwargs: False)
        assert_same(selective, loss_and_gradients(model, batch()))

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_nothing_supervised_gives_zero_gradients(self, kernel):
        batch = joined()
        batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
        loss, gradients = loss_and_gradients(make_model(kernel), batch)
        assert loss == 0.0
        assert "model.layers.0.self_attn.q_proj.weight" in gradients
        assert not any(gradient.any() for gradient in gradients.values())

    def test_only_rows_that_are_read_pass_the_mlp(self):
        model, rows = make_model("sdpa"), []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1].numel()))
        batch = joined()
        model(**batch)
        supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        assert rows == [sum(LENGTHS)] * (len(rows) - 1) + [supervised]

    def test_hidden_states_that_are_asked_for_are_whole(self):
        model, batch = make_model("sdpa"), padded()
        outputs = model(**batch, output_hidden_states=True)
        assert all(state.shape[:2] == batch["input_ids"].shape for state in outputs.hidden_states)
        assert outputs.loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)

    def test_without_labels_all_logits_are_there(self):
        model, batch = make_model("sdpa").eval(), padded()
        assert isinstance(model.model.layers[-1], LastDecoderLayer)
        labels = batch.pop("labels")
        assert model(**batch).logits.shape[:2] == labels.shape
