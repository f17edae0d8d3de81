"""Packed and joined samples train as separate ones do."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from llava_ft.data.collator import PackedCollator, PaddingCollator
from llava_ft.data.packing import PackedDataset
from tests.training.helpers import prepare, state_of, train, write_records

pytestmark = pytest.mark.usefixtures("in_recordings")

ROW = 256
METHOD = "full"


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def run(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        from tests.conftest import RECORDINGS

        patch.chdir(RECORDINGS)
        run = prepare(tmp_path_factory.mktemp("run"), METHOD, attn_implementation=request.param, model_max_length=ROW)
        run.stop.release()
    return run


def loss_and_gradients(run, batches, num_items=None):
    """The loss of some batches, summed, and its gradients."""
    model = run.trainer.model
    model.train()
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**run.trainer._prepare_inputs(batch), num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def supervised(dataset):
    return sum(int((item["labels"][1:] != -100).sum()) for item in dataset)


def assert_same(first, second):
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert set(first[1]) == set(second[1])
    for name, gradient in first[1].items():
        other = second[1][name]
        assert (gradient - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_packed_loss_and_gradients_are_those_of_separate_samples(run, size: int, flatten: bool):
    dataset = run.datasets.train
    packed = PackedDataset(dataset, ROW, seed=3)
    assert min(packed.dataset.modality_lengths) < 0 < max(packed.modality_lengths)
    assert max(len(packed.rows[i]) for i in range(len(packed))) > 2
    collate = PackedCollator(0, row_length=ROW, flatten=flatten)
    rows = [collate([packed[i] for i in range(at, min(at + size, len(packed)))]) for at in range(0, len(packed), size)]
    num_items = supervised(dataset)
    separate = [PaddingCollator(0)([item]) for item in dataset]
    assert_same(loss_and_gradients(run, rows, num_items), loss_and_gradients(run, separate, num_items))


def test_joined_loss_and_gradients_are_those_of_separate_samples(run):
    dataset = run.datasets.train
    joined = PackedCollator(0, flatten=True)([{"samples": [item]} for item in dataset])
    assert joined["input_ids"].shape == (1, sum(dataset.lengths))
    separate = [PaddingCollator(0)([item]) for item in dataset]
    num_items = supervised(dataset)
    assert_same(loss_and_gradients(run, [joined], num_items), loss_and_gradients(run, separate, num_items))


def test_the_mean_of_a_micro_batch_is_that_of_its_samples_padded(run):
    """With loss_normalization micro_batch the model divides by the supervised tokens of the rows it is given."""
    packed = PackedDataset(run.datasets.train, ROW, seed=3)
    rows = [packed[0], packed[1]]
    padded = PaddingCollator(0)([sample for row in rows for sample in row["samples"]])
    together = loss_and_gradients(run, [PackedCollator(0, row_length=ROW)(rows)])
    assert_same(together, loss_and_gradients(run, [padded]))


def test_samples_of_a_row_do_not_see_each_other(run):
    model = run.trainer.model.eval()
    packed = PackedDataset(run.datasets.train, ROW, seed=3)
    row = max((packed[i] for i in range(len(packed))), key=lambda row: len(row["samples"]))["samples"]
    batch = PackedCollator(0, row_length=ROW)([{"samples": row}])
    lengths = [len(sample["input_ids"]) for sample in row]
    assert len(row) > 2

    def losses(batch):
        """The loss of each sample of the row alone."""
        inputs = run.trainer._prepare_inputs(batch)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found = []
        for start, end in zip([0, *ends], ends, strict=False):
            labels = torch.full_like(inputs["labels"], -100)
            labels[:, start:end] = inputs["labels"][:, start:end]
            with torch.no_grad():
                found.append(model(**{**inputs, "labels": labels}, num_items_in_batch=1).loss.item())
        return found

    before = losses(batch)
    for changed, start in enumerate(torch.tensor([0, *lengths]).cumsum(0).tolist()[:-1]):
        ids = batch["input_ids"].clone()
        words = ids[0, start : start + lengths[changed]]
        words[words >= 0] = (words[words >= 0] + 7) % 300
        after = losses({**batch, "input_ids": ids})
        assert after[changed] != before[changed]
        assert after[:changed] + after[changed + 1 :] == before[:changed] + before[changed + 1 :]


def losses_of(run):
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


def test_three_steps_and_three_more_are_six(tmp_path: Path):
    changes = {"packing": True, "group_by_modality_length": None, "model_max_length": ROW, "dataloader_num_workers": 1}
    straight = train(tmp_path / "straight", **changes)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoint-6")
    resumed = train(tmp_path / "stopped", **changes)
    assert resumed.checkpoint == tmp_path / "stopped/checkpoint-3"
    expected, got = state_of(straight), state_of(resumed)
    assert set(expected) == set(got)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert losses_of(straight) == losses_of(resumed)


@pytest.mark.parametrize("flag", ["packing", "padding_free"])
def test_a_run_counts_tokens_and_evaluates_on_padded_records(
    tmp_path: Path, flag: str, caplog: pytest.LogCaptureFixture
):
    changes = {"max_steps": 2, "model_max_length": ROW, "validation_data_path": "data/mix.json"}
    with caplog.at_level(logging.INFO):
        run = train(tmp_path / "out", METHOD, **{flag: True}, **changes)
    plain = prepare(tmp_path / "plain", METHOD, **changes)
    plain.stop.release()
    plain.trainer.model.load_state_dict(run.trainer.model.state_dict())
    expected, got = plain.trainer.evaluate(), run.trainer.evaluate()
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert got["eval_supervised_tokens"] == expected["eval_supervised_tokens"]
    entry = next(entry for entry in run.trainer.state.log_history if "loss" in entry)
    if flag == "padding_free":
        assert entry["padding"] == 0
        return
    packed = run.trainer.train_dataset
    assert f"{len(packed.dataset)} samples in {len(packed)} rows of {ROW} tokens" in caplog.text
    assert f"{100 * packed.efficiency:.1f}% of which hold a token" in caplog.text
    assert f"{-(-len(packed) // 2)} steps an epoch" in caplog.text
    assert len(run.trainer.get_train_dataloader()) == -(-len(packed) // 2)


def test_a_row_with_an_unreadable_image_learns_from_its_other_samples(tmp_path: Path):
    shutil.copy("images/src/landscape.jpg", tmp_path / "a.jpg")
    shutil.copy("images/src/landscape.jpg", tmp_path / "b.jpg")
    records = [
        {
            "id": name,
            "image": f"{name}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "a red car"},
            ],
        }
        for name in ("a", "b")
    ]
    changes = {"packing": True, "model_max_length": ROW, "max_steps": 1, "image_folder": tmp_path}
    run = prepare(tmp_path / "out", METHOD, data_path=write_records(tmp_path / "records.json", records), **changes)
    (tmp_path / "b.jpg").unlink()
    run.trainer.train()
    run.stop.release()
    assert [error.sample_id for error in run.trainer.bad_samples] == ["b"]
    entry = next(entry for entry in run.trainer.state.log_history if "loss" in entry)
    assert entry["bad_samples"] == 1
    assert entry["supervised_tokens"] == supervised([run.datasets.train[0]]) > 0
    assert entry["samples_per_second"] > 0


def test_packing_that_begins_between_two_runs_goes_on_at_the_same_share_of_the_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    changes = {"group_by_modality_length": None, "model_max_length": ROW, "save_steps": 3}
    first = train(tmp_path / "out", max_steps=3, **changes)
    num_samples = len(first.datasets.train)
    run = prepare(tmp_path / "out", max_steps=4, packing=True, **changes)
    num_rows = len(run.trainer.train_dataset)
    with caplog.at_level(logging.WARNING):
        run.trainer.train(resume_from_checkpoint=str(run.checkpoint))
    run.stop.release()
    assert num_rows < num_samples
    assert f"an epoch had {num_samples} samples or packed rows and has {num_rows} now" in caplog.text
    assert run.trainer.state.global_step == 4
