"""Data sets of several sources: numbers, names, reports, and what is held out."""

import json
import pickle
import shutil

import pytest
import torch
import yaml
from PIL import Image

from llava_ft.errors import UserError
from tests.data.conftest import SOURCES, record


@pytest.fixture
def mixture(tmp_path):
    """Write sources and a mixture of them; entries name the records and anything else."""

    def write(*entries, **rest):
        listed = []
        for number, (records, options) in enumerate(entries):
            path = tmp_path / f"source{number}.json"
            path.write_text(json.dumps(records))
            listed.append({"path": path.name, **options})
        file = tmp_path / "mixture.yaml"
        file.write_text(yaml.safe_dump({"sources": listed, **rest}))
        return file

    return write


def some(prefix, count, **options):
    return [record(f"{prefix}{number}", answer=f"answer {number}", **options) for number in range(count)]


def names(dataset):
    return [
        dataset.describe(dataset[position]["index"]).partition("'")[2].partition("'")[0]
        for position in range(len(dataset))
    ]


class TestMixture:
    def test_numbers_go_on_from_source_to_source(self, build, mixture, tmp_path):
        file = mixture((some("a", 3), {}), ([*some("b", 2), "text", *some("c", 1)], {"name": "second"}))
        datasets = build(file, on_bad_sample="skip")
        train = datasets.train
        assert [train[position]["index"] for position in range(len(train))] == [0, 1, 2, 3, 4, 6]
        assert names(train) == ["a0", "a1", "a2", "b0", "b1", "c0"]
        assert train.describe(6) == "3 (id 'c0') of second"
        assert train.describe(5) == "2 of second"
        assert train.describe(0) == f"0 (id 'a0') of {tmp_path / 'source0.json'}"
        assert [len(train[position]["labels"]) for position in range(6)] == train.lengths
        copy = pickle.loads(pickle.dumps(train))
        assert torch.equal(copy[5]["input_ids"], train[5]["input_ids"])

    def test_a_record_is_tokenised_the_same_alone_and_in_a_mixture(self, build, mixture):
        alone = build(some("b", 2)).train
        mixed = build(mixture((some("a", 1), {}), (some("b", 2), {}))).train
        assert torch.equal(mixed[2]["input_ids"], alone[1]["input_ids"])

    def test_folders_prefixes_and_image_order(self, build, mixture, tmp_path, transform):
        (tmp_path / "own").mkdir()
        shutil.copy(SOURCES / "rgba.png", tmp_path / "own" / "square.png")
        file = mixture(
            (some("a", 1, image="square.png"), {}),
            (some("b", 1, image="square.png"), {"image_folder": "own", "prompt_prefix": "Look closely. "}),
        )
        train = build(file).train
        assert [ref.source for position in (0, 1) for ref in train.image_refs(position)] == [0, 1]
        for position, path in enumerate((SOURCES / "square.png", tmp_path / "own" / "square.png")):
            expected = transform.pixels(Image.open(path).convert("RGB"))
            assert torch.equal(train[position]["pixel_values"], expected)
        assert train.lengths[1] > train.lengths[0]

    def test_repeats_and_counts(self, build, mixture):
        train = build(mixture((some("a", 2), {"repeat": 2}), (some("b", 5), {"count": 3}))).train
        found = names(train)
        assert found[:4] == ["a0", "a0", "a1", "a1"]
        assert len(found) == 7
        assert set(found[4:]) <= {f"b{number}" for number in range(5)}

    def test_held_out_records_are_validated_on(self, build, mixture):
        file = mixture((some("a", 4), {"held_out": 1}), (some("b", 10), {"held_out": 0.2}))
        datasets = build(file, seed=1)
        train, validation = names(datasets.train), names(datasets.validation)
        assert [name[0] for name in validation] == ["a", "b", "b"]
        assert sorted(train + validation) == sorted([record["id"] for record in some("a", 4) + some("b", 10)])
        assert (datasets.report.num_taken, datasets.report.num_held_out) == (11, 3)
        again = build(file, seed=1)
        assert names(again.validation) == validation

    def test_of_its_own_validation_data(self, build, mixture, tmp_path):
        path = tmp_path / "validation.json"
        path.write_text(json.dumps(some("v", 2)))
        file = mixture((some("a", 4), {"repeat": 2}))
        assert names(build(file, validation_path=path).validation) == ["v0", "v1"]
        assert len(build(path, validation_path=file).validation) == 8

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"validation_fraction": 0.5}, r"validation_fraction is 0.5, and .*mixture.yaml is a mixture"),
            ({"validation_path": "x.json"}, r"mixture.yaml holds out records for validation \(held_out\), and"),
        ],
    )
    def test_contradictions_are_refused_first(self, build, mixture, options, match):
        file = mixture((some("a", 4), {"held_out": 1, "path": "missing.json"}))
        with pytest.raises(UserError, match=match):
            build(file, **options)

    def test_validation_mixture_that_holds_out(self, build, mixture):
        with pytest.raises(UserError, match=r"validation data .* holds out records itself"):
            build(some("a", 2), validation_path=mixture((some("b", 4), {"held_out": 1})))


class TestReports:
    def test_one_for_each_source_and_the_total(self, build, mixture, caplog):
        caplog.set_level("INFO")
        long = record("long", answer="word " * 200)
        file = mixture(
            ([*some("a", 2), "text", long], {"name": "first"}),
            ([*some("b", 3), record("gone", image="gone.png")], {"name": "second"}),
        )
        report = build(file, on_bad_sample="skip", model_max_length=100).report
        first, second = report.sources
        assert (first.path, first.counts, first.truncated_ids) == ("first", {"not-an-object": 1}, ["long"])
        assert (second.path, second.ids_by_kind) == ("second", {"image-missing": ["gone"]})
        assert (report.num_records, report.num_usable, report.num_truncated) == (8, 6, 1)
        assert report.num_lost_tokens == first.num_lost_tokens > 0
        assert report.num_tokens == first.num_tokens + second.num_tokens
        values = json.loads(json.dumps(report.to_dict()))
        assert [source["counts"] for source in values["sources"]] == [{"not-an-object": 1}, {"image-missing": 1}]
        assert any(message.startswith("second: 3 of 4 records are usable") for message in caplog.messages)
        assert any("6 samples make an epoch." in message for message in caplog.messages)

    def test_errors_name_their_source(self, build, mixture):
        file = mixture((["text"], {"name": "first"}), ([*some("b", 1), 7], {"name": "second"}))
        with pytest.raises(UserError) as caught:
            build(file)
        assert "2 of 3 records of" in str(caught.value)
        assert "\n  first: Sample 0: the record is" in str(caught.value)
        assert "\n  second: Sample 1: the record is" in str(caught.value)

    def test_lost_images_during_a_run_name_their_source(self, build, mixture, tmp_path):
        folder = tmp_path / "pictures"
        folder.mkdir()
        shutil.copy(SOURCES / "square.png", folder / "b.png")
        file = mixture((some("a", 1), {}), (some("b", 1, image="b.png"), {"name": "second"}))
        train = build(file, image_folder=folder).train
        (folder / "b.png").unlink()
        error = train[1]["bad_sample"]
        assert (error.index, error.sample_id) == (0, "b0")
        assert error.reason.endswith("(record of second)")

    def test_a_source_without_usable_records(self, build, mixture):
        file = mixture((some("a", 1), {}), (["text"], {"name": "second"}))
        with pytest.raises(UserError, match="Source second of the mixture has no usable record"):
            build(file, on_bad_sample="skip")
