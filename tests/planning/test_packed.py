"""Plans of runs that pack samples or join them."""

import pytest

from llava_ft.args import parse_args
from llava_ft.planning.workload import find_workload
from llava_ft.resolve import resolve_model
from tests.planning.helpers import plan_of, request_of, write_configs
from tests.training.helpers import flags, prepare

ROW = 256


def changes_for(flag, **more):
    return {flag: "True", "group_by_modality_length": None, "model_max_length": ROW, **more}


def workload_of(argv):
    args = parse_args(argv, required=("model_name_or_path",))
    return find_workload(args, resolve_model(args, need="config"))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("flag", ["packing", "padding_free"])
def test_steps_are_those_of_the_run(in_recordings, tmp_path, flag, accumulation):
    changes = changes_for(flag, max_steps=None, num_train_epochs=2, gradient_accumulation_steps=accumulation)
    run = prepare(tmp_path, "lora", **changes)
    argv = flags(tmp_path, "lora", **changes)
    epoch = workload_of(argv).epoch(request_of(argv)[1])
    _, per_epoch, *_, steps = run.trainer.set_initial_training_values(
        run.trainer.args, run.trainer.get_train_dataloader()
    )
    assert (epoch["steps_per_epoch"], epoch["steps"]) == (per_epoch, steps)
    assert epoch.get("packed_rows", len(run.datasets.train)) == len(run.trainer.train_dataset)
    assert epoch["tokens_per_epoch"] == sum(run.datasets.train.lengths)


@pytest.mark.parametrize("flag", ["packing", "padding_free"])
def test_no_batch_of_the_run_is_larger(in_recordings, tmp_path, flag):
    run = prepare(tmp_path, "lora", **changes_for(flag))
    batch = workload_of(flags(tmp_path, "lora", **changes_for(flag))).largest_batch(2)
    assert batch.is_padded
    for real in run.trainer.get_train_dataloader():
        assert real["input_ids"].numel() <= batch.size * batch.length
        assert (real["labels"][:, 1:] != -100).sum() <= batch.num_supervised
        assert len(real.get("pixel_values", [])) <= batch.num_images
    assert (batch.size, batch.length) == (2, ROW) if flag == "packing" else batch.size == 1


def test_a_plan_says_how_many_rows_there_are(in_recordings, tmp_path):
    plan = plan_of(flags(tmp_path, "lora", **changes_for("packing")))
    assert 0 < plan.epoch["packed_rows"] < plan.epoch["training_records"]


def test_without_records_rows_are_full(tmp_path):
    argv = write_configs(tmp_path)
    assert workload_of([*argv, "--packing", "True"]).largest_batch(2).length == 64
    joined = workload_of([*argv, "--padding_free", "True"]).largest_batch(2)
    assert (joined.size, joined.length) == (1, 128)
