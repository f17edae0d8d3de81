"""Data sets: exact lengths, and runs that survive a lost image."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.data.build import split_dataset
from llava_ft.data.collator import PaddingCollator
from llava_ft.data.dataset import ConversationDataset
from llava_ft.data.records import parse_record
from llava_ft.data.sampler import EpochSampler
from llava_ft.errors import BadSampleError, UserError
from tests.data.conftest import GOLDEN, SOURCES, TOKENS_PER_IMAGE, record, turns

MIX = GOLDEN / "data" / "mix.json"


class TestItems:
    def test_lengths_are_exact_before_any_image_is_read(self, build, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("an image was decoded")

        monkeypatch.setattr("llava_ft.data.image_reader.load_image", refuse)
        train = build(MIX).train
        lengths, modality_lengths = train.lengths, train.modality_lengths
        monkeypatch.undo()
        items = [train[i] for i in range(len(train))]
        assert [len(item["input_ids"]) for item in items] == lengths
        assert [len(item["labels"]) for item in items] == lengths
        signs = [1 if "pixel_values" in item else -1 for item in items]
        assert modality_lengths == [n * sign for n, sign in zip(lengths, signs, strict=True)]

    def test_lengths_equal_the_original_run(self, build):
        # The original's lengths count an image as one token.
        trace = json.loads((GOLDEN / "train" / "lora_ga2_group" / "trace.json").read_text())
        train = build(MIX).train
        plain = [n - 15 if n > 0 else -n for n in train.modality_lengths]
        for number, step in enumerate(trace["steps"]):
            members = trace["order"][2 * number : 2 * number + 2]
            assert step["tokens"] == sum(plain[i] for i in members)
            assert step["input_shape"][1] == max(plain[i] for i in members)

    def test_item(self, build, tokenize, transform):
        records = json.loads(MIX.read_text())
        train = build(MIX).train
        for position, entry in enumerate(records):
            item = train[position]
            tokens = tokenize(parse_record(entry, position))
            repeats = [TOKENS_PER_IMAGE if token == IMAGE_TOKEN_INDEX else 1 for token in tokens.input_ids]
            assert item["input_ids"].tolist() == np.repeat(tokens.input_ids, repeats).tolist()
            assert item["labels"].tolist() == np.repeat(tokens.labels, repeats).tolist()
            assert item["index"] == position
            assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
            assert "bad_sample" not in item
            assert ("pixel_values" in item) == ("image" in entry)
            if "image" in entry:
                picture = Image.open(SOURCES / entry["image"]).convert("RGB")
                assert torch.equal(item["pixel_values"], transform.pixels(picture))
            num_positions = int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum())
            assert num_positions == TOKENS_PER_IMAGE * len(tokens.images)

    def test_several_images_are_in_reading_order(self, build, transform):
        names = ["square.png", "rgba.png", "square.png"]
        item = build([record(image=names)]).train[0]
        pictures = [transform.pixels(Image.open(SOURCES / name).convert("RGB")) for name in names]
        assert torch.equal(item["pixel_values"], torch.cat(pictures))

    def test_absolute_paths_need_no_folder(self, build):
        item = build([record(image=str(SOURCES / "square.png"))], image_folder=None).train[0]
        assert item["pixel_values"].shape == (1, 3, 56, 56)

    def test_exif_transpose(self, build):
        plain = build([record(image="exif_rot6.jpg")]).train[0]["pixel_values"]
        turned = build([record(image="exif_rot6.jpg")], exif_transpose=True).train[0]["pixel_values"]
        assert not torch.equal(plain, turned)

    def test_text_only_needs_no_vision(self, build):
        train = build([record()], image_transform=None, image_folder=None, geometry=None).train
        assert train.modality_lengths == [-length for length in train.lengths]
        assert "pixel_values" not in train[0]

    def test_position_out_of_range(self, build):
        train = build([record(), record()]).train
        assert train[-1]["index"] == 1
        with pytest.raises(IndexError):
            train[2]

    def test_jsonl(self, build, tmp_path):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in [record("a"), record("b")]))
        assert build(path).report.num_usable == 2


class TestTruncation:
    def test_no_image_is_cut(self, build):
        answer = "yes and no " * 20
        names = ["square.png", "rgba.png"]
        turns = [
            {"from": "human", "value": "<image>\nOne?"},
            {"from": "gpt", "value": "ok"},
            {"from": "human", "value": "<image>\nTwo?"},
            {"from": "gpt", "value": answer},
        ]
        entry = {"image": names, "conversations": turns}
        whole = build([entry]).train.lengths[0]
        for limit in range(80, whole + 3):
            datasets = build([entry], model_max_length=limit)
            item = datasets.train[0]
            num_images = len(item["pixel_values"])
            assert len(item["input_ids"]) == datasets.train.lengths[0] <= limit
            assert int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == num_images * TOKENS_PER_IMAGE
            assert datasets.report.num_truncated == int(limit < whole)
            assert datasets.report.num_images == num_images

    def test_sample_whose_images_are_all_cut_off_counts_as_text(self, build):
        entry = {
            "image": "square.png",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "<image>"},
                {"from": "gpt", "value": "a car"},
            ],
        }
        train = build([entry], model_max_length=70).train
        assert train.modality_lengths[0] < 0
        assert "pixel_values" not in train[0]

    def test_answer_cut_off(self, build):
        with pytest.raises(UserError, match=r"'long'\): of its \d+ tokens model_max_length = 20 leaves no part"):
            build([record("long")], model_max_length=20)


class TestLossDuringARun:
    @pytest.fixture
    def lost(self, build, folder):
        """A data set whose second sample has lost its second image after the checks."""
        shutil.copy(folder / "good.jpg", folder / "soon-gone.jpg")
        records = [
            record("a", image="good.jpg"),
            record("b", image=["good.jpg", "soon-gone.jpg"]),
            record("c"),
        ]
        train = build(records, image_folder=folder).train
        (folder / "soon-gone.jpg").unlink()
        return train

    def test_item_keeps_its_length_and_loses_its_labels(self, lost):
        item = lost[1]
        assert len(item["input_ids"]) == len(item["labels"]) == lost.lengths[1]
        assert (item["labels"] == IGNORE_INDEX).all()
        assert torch.equal(item["pixel_values"], torch.zeros(2, 3, 56, 56))
        error = item["bad_sample"]
        assert isinstance(error, BadSampleError)
        assert (error.index, error.sample_id, error.kind) == (1, "b", "image-missing")
        assert "soon-gone.jpg' does not exist" in error.reason
        assert "bad_sample" not in lost[0]
        assert "bad_sample" not in lost[2]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_batch(self, lost, num_workers):
        loader = DataLoader(
            lost,
            batch_size=3,
            sampler=EpochSampler(lost, strategy="sequential"),
            collate_fn=PaddingCollator(0),
            num_workers=num_workers,
        )
        (batch,) = list(loader)
        assert batch["sample_indices"] == [0, 1, 2]
        assert batch["pixel_values"].shape == (2, 3, 56, 56)  # both images of the second are blank
        assert batch["tile_index"].tolist() == [0, 1, 1]
        assert [(error.index, error.kind) for error in batch["bad_samples"]] == [(1, "image-missing")]
        assert (batch["labels"][1] == IGNORE_INDEX).all()
        num_positions = int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum())
        assert num_positions == TOKENS_PER_IMAGE * len(batch["tile_index"])

    @pytest.mark.parametrize("name", ["truncated.jpg", "text.png", "sub.png", "bomb.png"])
    def test_any_bad_file(self, build, folder, name):
        train = build([record(image=name)], image_folder=folder, check_images="none").train
        assert train[0]["bad_sample"].kind.startswith("image-")


class TestValidation:
    def records(self, count=20):
        return [record(f"r{number}", answer=f"answer {number}") for number in range(count)]

    def indices(self, dataset):
        return [dataset[i]["index"] for i in range(len(dataset))]

    def test_fraction(self, build):
        datasets = build(self.records(), validation_fraction=0.2, seed=3)
        train, validation = self.indices(datasets.train), self.indices(datasets.validation)
        assert len(validation) == 4
        assert sorted(train + validation) == list(range(20))
        assert train == sorted(train)
        assert validation == sorted(validation)
        assert datasets.report.num_usable == 20
        assert datasets.train.lengths == [len(datasets.train[i]["labels"]) for i in range(16)]

    def test_fraction_is_deterministic(self, build):
        def held_out(seed):
            return self.indices(build(self.records(), validation_fraction=0.2, seed=seed).validation)

        assert held_out(0) == held_out(0) != held_out(1)

    def test_at_least_one_record_on_each_side(self, build):
        for fraction in (0.001, 0.999):
            datasets = build(self.records(2), validation_fraction=fraction)
            assert (len(datasets.train), len(datasets.validation)) == (1, 1)

    def test_fraction_of_one_record(self, build):
        with pytest.raises(UserError, match="there is only 1 usable record"):
            build(self.records(1), validation_fraction=0.5)

    @pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
    def test_fraction_out_of_range(self, build, fraction):
        with pytest.raises(UserError, match="it must be at least 0 and below 1"):
            build(self.records(), validation_fraction=fraction)

    def test_file_of_its_own(self, build, tmp_path):
        path = tmp_path / "validation.json"
        path.write_text(json.dumps([record("v"), "text"]))
        with pytest.raises(UserError, match=r"1 of 2 records of .*validation.json"):
            build(self.records(), validation_path=path)
        datasets = build(self.records(), validation_path=path, on_bad_sample="skip")
        assert self.indices(datasets.validation) == [0]
        assert datasets.validation_report.counts == {"not-an-object": 1}
        assert datasets.report.counts == {}

    def test_not_both(self, build):
        with pytest.raises(UserError, match="validation_fraction and validation_data_path are both given"):
            build(self.records(), validation_path=MIX, validation_fraction=0.1)

    def test_none(self, build):
        assert build(self.records()).validation is None

    def test_split_of_a_split(self, build):
        train = build(self.records()).train
        rest, _ = split_dataset(train, 0.5, 0)
        inner, held_out = split_dataset(rest, 0.5, 1)
        assert sorted(self.indices(inner) + self.indices(held_out)) == self.indices(rest)


class TestDatasetObject:
    def test_survives_pickling(self, build):
        train = build(MIX, validation_fraction=0.3).train
        copy = pickle.loads(pickle.dumps(train))
        assert copy.lengths == train.lengths
        for position in range(len(train)):
            ours, theirs = train[position], copy[position]
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "index")

    def test_workers_give_what_the_main_process_gives(self, build):
        train = build(MIX).train
        sampler = EpochSampler(train, strategy="modality_length", batch_size=2)
        batches = []
        for num_workers in (0, 2):
            options = {"batch_size": 2, "sampler": sampler, "collate_fn": PaddingCollator(0)}
            batches.append(list(DataLoader(train, num_workers=num_workers, **options)))
        for ours, theirs in zip(*batches, strict=True):
            assert ours["sample_indices"] == theirs["sample_indices"]
            assert torch.equal(ours["input_ids"], theirs["input_ids"])
            assert ("pixel_values" in ours) == ("pixel_values" in theirs)
            if "pixel_values" in ours:
                assert torch.equal(ours["pixel_values"], theirs["pixel_values"])

    def test_describe(self, build):
        records = [record("a"), "text", {"conversations": turns("hi", "yes")}]
        train = build(records, on_bad_sample="skip").train
        assert isinstance(train, ConversationDataset)
        assert train.describe(0) == "0 (id 'a')"
        assert train.describe(2) == "2"
