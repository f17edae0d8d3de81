"""Batches and epochs of a plan are those of the run."""

import json
import shutil

import pytest

from llava_ft.args import parse_args
from llava_ft.errors import UserError
from llava_ft.planning.workload import Workload, find_workload
from llava_ft.resolve import resolve_model
from tests.conftest import RECORDINGS
from tests.planning.helpers import request_of, write_configs
from tests.training.helpers import METHODS, flags, prepare


def workload_of(argv: list[str]) -> Workload:
    args = parse_args(argv, required=("model_name_or_path",))
    return find_workload(args, resolve_model(args, need="config"))


def epoch_of(argv: list[str], **machine: int) -> dict[str, int]:
    return workload_of(argv).epoch(request_of(argv, **machine)[1])


class TestRecordsAreHere:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_counts_are_those_of_the_run(self, in_recordings, tmp_path, method, accumulation):
        changes = {"max_steps": None, "num_train_epochs": "2", "gradient_accumulation_steps": str(accumulation)}
        run = prepare(tmp_path, method, **changes)
        epoch = epoch_of(flags(tmp_path, method, **changes))
        report = run.datasets.report
        assert epoch["usable_records"] == report.num_usable
        assert epoch["tokens_per_epoch"] == report.num_tokens
        assert epoch["supervised_tokens_per_epoch"] == report.num_supervised
        assert epoch["images_per_epoch"] == report.num_images
        loader = run.trainer.get_train_dataloader()
        _, per_epoch, *_, steps = run.trainer.set_initial_training_values(run.trainer.args, loader)
        assert epoch["steps_per_epoch"] == per_epoch
        assert epoch["steps"] == steps

    def test_no_batch_of_the_run_is_larger(self, in_recordings, tmp_path):
        run = prepare(tmp_path, "lora")
        batch = workload_of(flags(tmp_path, "lora")).largest_batch(2)
        for real in run.trainer.get_train_dataloader():
            assert real["input_ids"].shape[1] <= batch.length
            assert (real["labels"][:, 1:] != -100).sum() <= batch.num_supervised
            assert len(real.get("pixel_values", [])) <= batch.num_images
        assert batch.is_padded

    def test_held_out_records_are_not_trained_on(self, in_recordings, tmp_path):
        argv = flags(tmp_path, "lora", validation_fraction="0.25")
        run = prepare(tmp_path, "lora", validation_fraction="0.25")
        assert epoch_of(argv)["training_records"] == len(run.datasets.train)

    def test_a_mixture_is_counted_as_the_run_takes_it(self, in_recordings, tmp_path):
        file = tmp_path / "mixture.yaml"
        data = RECORDINGS / "data"
        file.write_text(
            f"sources:\n- path: {data / 'mix.json'}\n  held_out: 2\n- path: {data / 'text.json'}\n  repeat: 2\n"
        )
        changes = {"data_path": file, "max_steps": None}
        run = prepare(tmp_path / "out", "lora", **changes)
        epoch = epoch_of(flags(tmp_path / "out", "lora", **changes))
        assert epoch["training_records"] == len(run.datasets.train)
        assert epoch["tokens_per_epoch"] == sum(run.datasets.train.lengths)

    def test_records_that_are_too_long_are_named(self, in_recordings, tmp_path):
        argv = flags(tmp_path, "lora", model_max_length="80", truncation="drop")
        notes = workload_of(argv).notes
        assert any("are longer than model_max_length = 80" in note and "left out" in note for note in notes)

    def test_more_ranks_take_fewer_steps(self, in_recordings, tmp_path):
        argv = flags(tmp_path, "lora", max_steps=None)
        assert epoch_of(argv, gpus=2, nodes=2)["steps_per_epoch"] < epoch_of(argv)["steps_per_epoch"]

    def test_records_that_cannot_be_used_are_counted(self, in_recordings, tmp_path):
        records = json.loads((RECORDINGS / "data" / "text.json").read_text())
        file = tmp_path / "data.json"
        file.write_text(json.dumps([*records, {"id": "empty", "conversations": []}]))
        workload = workload_of(flags(tmp_path, "lora", data_path=file))
        assert workload.records is not None
        assert workload.records.num_usable == len(records)
        assert f"1 of {len(records) + 1} records cannot be used" in workload.notes[0]

    def test_none_that_can_be_used_is_refused(self, in_recordings, tmp_path):
        file = tmp_path / "data.json"
        file.write_text(json.dumps([{"id": "empty", "conversations": []}]))
        with pytest.raises(UserError, match="None of the 1 records"):
            workload_of(flags(tmp_path, "lora", data_path=file))

    def test_without_a_tokenizer_they_are_counted_alone(self, tmp_path):
        argv = [*write_configs(tmp_path), "--data_path", str(RECORDINGS / "data" / "text.json")]
        workload = workload_of(argv)
        assert workload.records is not None
        assert workload.measured is None
        assert "counted but not tokenised" in workload.notes[0]
        epoch = epoch_of(argv)
        assert "tokens_per_epoch" not in epoch
        assert epoch["steps_per_epoch"] == -(-epoch["records"] // 2)

    def test_with_a_tokenizer_and_no_weights_they_are_measured(self, tmp_path):
        argv = [*write_configs(tmp_path), "--data_path", str(RECORDINGS / "data" / "text.json")]
        for file in (RECORDINGS / "tokenizers" / "tiny512").iterdir():
            shutil.copyfile(file, tmp_path / "llm" / file.name)
        assert epoch_of(argv)["tokens_per_epoch"] > 0


class TestRecordsAreNotHere:
    def test_the_longest_samples_are_taken(self, tmp_path):
        workload = workload_of(write_configs(tmp_path))
        batch = workload.largest_batch(2)
        assert (batch.size, batch.length, batch.num_images) == (2, 64, 2)
        assert batch.num_supervised == (2 * 63 - 2 * 16) // 2
        assert workload.largest_batch(2, supervise_all=True).num_supervised == 2 * 63 - 2 * 16
        assert "No data_path is given" in workload.notes[0]
        assert "64 positions long (model_max_length), with one image, 50%" in workload.notes[1]

    def test_one_sample_is_never_padded(self, tmp_path):
        assert not workload_of(write_configs(tmp_path)).largest_batch(1).is_padded

    def test_a_file_that_is_elsewhere_is_named(self, tmp_path):
        argv = [*write_configs(tmp_path), "--data_path", "elsewhere.json"]
        assert workload_of(argv).notes[0].startswith("elsewhere.json is not on this machine")
        assert epoch_of(argv) == {}
