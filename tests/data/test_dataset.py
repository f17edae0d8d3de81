"""Data sets: exact lengths, one clear error per unusable record, and runs that survive a lost image."""

import json
import logging
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.conversation import get_template
from llava_ft.data.collator import PaddingCollator
from llava_ft.data.dataset import ConversationDataset, build_datasets, split_dataset
from llava_ft.data.image_files import find_bad_images, resolve_image_path
from llava_ft.data.images import ImageError, ImageTransform
from llava_ft.data.prepared import prepare_samples
from llava_ft.data.sampler import EpochSampler
from llava_ft.data.schema import parse_record
from llava_ft.data.tokenize import SampleTokenizer, expand_and_truncate
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.errors import BadSampleError, UserError

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCES = GOLDEN / "images" / "src"
TOKENS_PER_IMAGE = 16


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizers" / "tiny512", model_max_length=2048)


@pytest.fixture(scope="module")
def tokenize(tokenizer):
    return SampleTokenizer(tokenizer, get_template("v1"))


@pytest.fixture(scope="module")
def transform():
    return ImageTransform.from_pretrained(GOLDEN / "ckpt" / "clip-tiny", "pad")


@pytest.fixture
def build(tokenize, transform, tmp_path):
    """Build from records or from a file, with defaults that a test may replace."""

    def run(records, **options):
        path = records
        if isinstance(records, list):
            path = tmp_path / "records.json"
            path.write_text(json.dumps(records))
        defaults = {
            "tokenize": tokenize,
            "image_transform": transform,
            "image_folder": SOURCES,
            "tokens_per_image": TOKENS_PER_IMAGE,
            "model_max_length": 2048,
        }
        return build_datasets(path, **{**defaults, **options})

    return run


def record(name="r", image=None, question="What is it?", answer="a red car", **extra):
    images = image if isinstance(image, list) else [image] * (image is not None)
    text = "<image>" * len(images) + "\n" * bool(images) + question
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    entry = {"id": name, "conversations": turns, **extra}
    return {**entry, "image": image} if image is not None else entry


MIX = GOLDEN / "data" / "mix.json"


class TestItems:
    def test_lengths_are_exact_before_any_image_is_read(self, build, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("an image was decoded")

        monkeypatch.setattr("llava_ft.data.dataset.load_image", refuse)
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
            expected = expand_and_truncate(tokens, [TOKENS_PER_IMAGE] * tokens.num_images, 2048)
            assert item["input_ids"].tolist() == expected.input_ids
            assert item["labels"].tolist() == expected.labels
            assert item["index"] == position
            assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
            assert "bad_sample" not in item
            assert ("pixel_values" in item) == ("image" in entry)
            if "image" in entry:
                picture = Image.open(SOURCES / entry["image"]).convert("RGB")
                assert torch.equal(item["pixel_values"], transform(picture)[None])
            num_positions = int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum())
            assert num_positions == TOKENS_PER_IMAGE * tokens.num_images

    def test_several_images_are_in_reading_order(self, build, transform):
        names = ["square.png", "rgba.png", "square.png"]
        item = build([record(image=names)]).train[0]
        pictures = [transform(Image.open(SOURCES / name).convert("RGB")) for name in names]
        assert torch.equal(item["pixel_values"], torch.stack(pictures))

    def test_absolute_paths_need_no_folder(self, build):
        item = build([record(image=str(SOURCES / "square.png"))], image_folder=None).train[0]
        assert item["pixel_values"].shape == (1, 3, 56, 56)

    def test_exif_transpose(self, build):
        plain = build([record(image="exif_rot6.jpg")]).train[0]["pixel_values"]
        turned = build([record(image="exif_rot6.jpg")], exif_transpose=True).train[0]["pixel_values"]
        assert not torch.equal(plain, turned)

    def test_text_only_needs_no_vision(self, build):
        train = build([record()], image_transform=None, image_folder=None, tokens_per_image=0).train
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
        with pytest.raises(
            UserError, match=r"'long'\): the 20 tokens that model_max_length = 20 leaves hold no"
        ):
            build([record("long")], model_max_length=20)


def write_bomb(path):
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    Image.new("RGB", (4, 4)).save(path, "PNG")
    rest = path.read_bytes()[33:]
    signature = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big")
    path.write_bytes(signature + header + zlib.crc32(header).to_bytes(4, "big") + rest)


@pytest.fixture
def folder(tmp_path):
    """A folder with one good picture and several that cannot be used."""
    path = tmp_path / "pictures"
    (path / "sub.png").mkdir(parents=True)
    shutil.copy(SOURCES / "landscape.jpg", path / "good.jpg")
    content = (path / "good.jpg").read_bytes()
    (path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (path / "headless.jpg").write_bytes(content[:3])
    (path / "empty.png").touch()
    (path / "text.png").write_text("not a picture")
    write_bomb(path / "bomb.png")
    Image.new("1", (70_000, 1)).save(path / "long.png")
    return path


def turns(*texts):
    roles = ["human", "gpt"] * len(texts)
    return [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]


MALFORMED = {
    "missing file": (record(image="gone.jpg"), "image-missing", "'.*gone.jpg' does not exist"),
    "directory": (record(image="sub.png"), "image-not-a-file", "is a directory, not a file"),
    "empty file": (record(image="empty.png"), "image-empty", "is an empty file"),
    "no picture": (record(image="text.png"), "image-corrupt", "is not an image in a format"),
    "half a header": (record(image="headless.jpg"), "image-corrupt", "headless.jpg"),
    "bomb": (record(image="bomb.png"), "image-too-large", "is too large to be decoded"),
    "long side": (record(image="long.png"), "image-too-large", "70000 x 1 pixels; a side can have 65535"),
    "escape": (record(image="../x.png"), "image-outside-folder", r"'../x.png' leaves the image folder"),
    "hidden escape": (record(image="a/../../x.png"), "image-outside-folder", "leaves the image folder"),
    "address": (record(image="https://a.b/c.png"), "image-is-url", "is an address; download it"),
    "second image missing": (record(image=["good.jpg", "gone.jpg"]), "image-missing", "gone.jpg"),
    "absolute path missing": (record(image="/no/such.png"), "image-missing", "'/no/such.png' does not exist"),
    "more placeholders than images": (
        {"image": "good.jpg", "conversations": turns("<image><image> What?", "yes")},
        "placeholder-mismatch",
        r"2 <image> placeholder\(s\) but 1 image path",
    ),
    "fewer placeholders than images": (
        {"image": ["good.jpg", "good.jpg"], "conversations": turns("<image> What?", "yes")},
        "placeholder-mismatch",
        r"1 <image> placeholder\(s\) but 2 image path",
    ),
    "image without placeholder": (
        {"image": "good.jpg", "conversations": turns("What?", "yes")},
        "placeholder-mismatch",
        r"0 <image> placeholder\(s\) but 1 image path",
    ),
    "placeholder without image": (
        {"conversations": turns("<image> What?", "yes")},
        "placeholder-mismatch",
        r"1 <image> placeholder\(s\) but 0 image path",
    ),
    "placeholder in an answer": (
        {"image": "good.jpg", "conversations": turns("What?", "<image>")},
        "image-in-answer",
        "stands in an assistant's turn",
    ),
    "no answer": ({"conversations": turns("What?")}, "no-supervised-token", "nothing to learn"),
    "answer out of reach": (
        {"conversations": turns("word " * 3000, "yes")},
        "truncated-answer",
        "model_max_length = 2048 leaves hold no part of an answer",
    ),
    "image is a number": (record(image=7), "bad-image", "'image' is the number 7"),
    "not an object": (["text"], "not-an-object", "the record is a list of 1"),
    "null": (None, "not-an-object", "the record is null"),
    "no conversations": ({"id": "x", "text": "hi"}, "missing-conversations", "no 'conversations'"),
    "unknown role": ({"conversations": [{"from": "user", "value": "a"}]}, "unknown-role", "Write 'human'"),
    "text is null": ({"conversations": turns("a", None)}, "bad-text", "'value' of turn 1 is null"),
}


class TestMalformedRecords:
    @pytest.mark.parametrize("name", MALFORMED)
    def test_error_names_the_record(self, build, folder, name):
        bad, kind, match = MALFORMED[name]
        with pytest.raises(UserError, match=rf"(?s)1 of 2 records .*\({kind}: 1\):\n  Sample 1.*{match}"):
            build([record("fine"), bad], image_folder=folder)

    @pytest.mark.parametrize("name", MALFORMED)
    def test_skip_leaves_it_out(self, build, folder, name):
        bad, kind, _ = MALFORMED[name]
        datasets = build([record("a"), bad, record("b")], image_folder=folder, on_bad_sample="skip")
        assert len(datasets.train) == 2
        assert [datasets.train[i]["index"] for i in (0, 1)] == [0, 2]
        assert datasets.report.counts == {kind: 1}
        assert [error.index for error in datasets.report.errors] == [1]

    def test_truncated_picture_needs_decoding(self, build, folder):
        records = [record("t", image="truncated.jpg")]
        assert build(records, image_folder=folder).report.num_usable == 1
        with pytest.raises(UserError, match="image-truncated: 1"):
            build(records, image_folder=folder, check_images="decode")

    def test_levels(self, build, folder):
        names = ["good.jpg", "gone.jpg", "text.png", "truncated.jpg", "../x.png"]
        records = [record(name, image=name) for name in names]
        expected = {"none": 4, "exists": 3, "header": 2, "decode": 1}
        for level, num_usable in expected.items():
            datasets = build(records, image_folder=folder, check_images=level, on_bad_sample="skip")
            assert datasets.report.num_usable == num_usable

    def test_every_file_is_checked_once(self, build, monkeypatch):
        seen = []
        monkeypatch.setattr("llava_ft.data.image_files.check_image", lambda path, level: seen.append(path))
        build([record(image="square.png")] * 500 + [record(image="rgba.png")])
        assert sorted(seen) == [str(SOURCES / "rgba.png"), str(SOURCES / "square.png")]

    def test_many_files(self, folder):
        paths = [str(folder / f"gone-{number}.png") for number in range(1000)]
        bad = find_bad_images([*paths, str(folder / "good.jpg")], "exists")
        assert list(bad) == paths

    def test_path_inside_the_folder_may_go_up(self):
        assert resolve_image_path("a/../b.png", "/data") == "/data/a/../b.png"
        with pytest.raises(ImageError, match="a relative path, but there is no image_folder"):
            resolve_image_path("b.png", None)


class TestPolicies:
    def bad_records(self):
        missing = [record(f"m{number}", image=f"gone{number}.png") for number in range(12)]
        return [record("fine"), *missing, {"conversations": turns("no answer")}, "text"]

    def test_error_counts_all_and_shows_some(self, build):
        with pytest.raises(UserError) as caught:
            build(self.bad_records())
        message = str(caught.value)
        kinds = "(image-missing: 12, no-supervised-token: 1, not-an-object: 1)"
        assert "14 of 15 records of" in message
        assert kinds in message
        assert "Sample 1 (id 'm0'): Image" in message
        assert message.count("\n  ") == 9
        assert "\n  and 6 more\n" in message
        assert message.endswith("pass --on_bad_sample skip to train without them.")

    def test_skip_reports_and_logs(self, build, caplog):
        with caplog.at_level(logging.WARNING):
            report = build(self.bad_records(), on_bad_sample="skip").report
        assert report.num_records == 15
        assert report.num_usable == 1
        assert report.counts == {"image-missing": 12, "no-supervised-token": 1, "not-an-object": 1}
        assert report.ids_by_kind["image-missing"] == [f"m{number}" for number in range(12)]
        assert report.ids_by_kind["not-an-object"] == ["#14"]
        (message,) = caplog.messages
        assert "14 of 15 records" in message
        assert "are left out (image-missing: 12, no-supervised-token: 1, not-an-object: 1)" in message
        assert message.endswith(
            "'m0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', 'm9', 'm10', 'm11', 13, 14"
        )

    def test_long_lists_are_shortened_in_the_log(self, build, caplog):
        build([record("fine")] + ["text"] * 150, on_bad_sample="skip")
        assert caplog.messages[0].endswith(" 99, 100 and 50 more")

    def test_report_as_json(self, build):
        report = build(self.bad_records(), on_bad_sample="skip").report
        values = json.loads(json.dumps(report.to_dict()))
        assert values["counts"] == report.counts
        assert values["num_usable"] == 1
        assert "errors" not in values

    def test_report_counts(self, build):
        datasets = build(MIX)
        train, report = datasets.train, datasets.report
        assert report.num_tokens == sum(train.lengths)
        assert report.num_images == 10
        labels = [train[i]["labels"][1:] for i in range(len(train))]
        assert report.num_supervised == sum(int((row != IGNORE_INDEX).sum()) for row in labels)
        share = f"{report.num_supervised / report.num_tokens:.1%}"
        assert f"14 of 14 records are usable, with 10 images and 1169 tokens, {share} of" in report.describe()

    def test_nothing_left(self, build):
        with pytest.raises(UserError, match=r"2 of 2 records .* so none is left \(not-an-object: 2\)"):
            build([1, 2], on_bad_sample="skip")

    def test_good_data_is_not_logged_as_bad(self, build, caplog):
        with caplog.at_level(logging.WARNING):
            build(MIX)
        assert not caplog.messages

    @pytest.mark.parametrize(
        ("option", "match"),
        [
            ({"on_bad_sample": "ignore"}, "on_bad_sample is 'ignore'; it can be 'error' or 'skip'"),
            ({"check_images": "all"}, "check_images is 'all'; it can be none, exists, header, decode"),
        ],
    )
    def test_unknown_values(self, build, option, match):
        with pytest.raises(UserError, match=match):
            build([record()], **option)


class TestRunsWithoutImages:
    """What is wrong with the whole run is said before any file is looked for, whatever the policy."""

    @pytest.fixture(autouse=True)
    def no_files_are_checked(self, monkeypatch):
        def refuse(*args):
            raise AssertionError("files were checked")

        monkeypatch.setattr("llava_ft.data.dataset.find_bad_images", refuse)

    @pytest.mark.parametrize("policy", ["error", "skip"])
    def test_no_vision_tower(self, build, policy):
        with pytest.raises(
            UserError, match=r"Sample 1 \(id 'x'\) has images, but the model has no vision tower"
        ):
            build([record(), record("x", image="square.png")], image_transform=None, on_bad_sample=policy)

    @pytest.mark.parametrize("policy", ["error", "skip"])
    def test_no_image_folder(self, build, policy):
        with pytest.raises(
            UserError, match=r"Sample 0 .*'square.png', a relative path, .* Pass --image_folder"
        ):
            build([record(image="square.png")], image_folder=None, on_bad_sample=policy)

    @pytest.mark.parametrize("policy", ["error", "skip"])
    def test_image_folder_is_not_there(self, build, tmp_path, policy):
        with pytest.raises(UserError, match=r"The image folder '.*nowhere' is not a directory, but Sample 0"):
            build([record(image="a.png")], image_folder=tmp_path / "nowhere", on_bad_sample=policy)

    def test_image_folder_does_not_matter_without_images(self, build, tmp_path, monkeypatch):
        monkeypatch.setattr("llava_ft.data.dataset.find_bad_images", lambda paths, level: {})
        assert build([record()], image_folder=tmp_path / "nowhere").report.num_usable == 1


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
        assert batch["pixel_values"].shape == (3, 3, 56, 56)
        assert [(error.index, error.kind) for error in batch["bad_samples"]] == [(1, "image-missing")]
        assert (batch["labels"][1] == IGNORE_INDEX).all()
        num_positions = int((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum())
        assert num_positions == TOKENS_PER_IMAGE * len(batch["pixel_values"])

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
        chosen = {
            seed: [self.indices(build(self.records(), validation_fraction=0.2, seed=seed).validation)] * 2
            for seed in (0, 1)
        }
        assert chosen[0][0] == self.indices(build(self.records(), validation_fraction=0.2, seed=0).validation)
        assert chosen[0] != chosen[1]

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

    def test_is_compact(self, tokenize):
        entry = record(answer="the man is standing on a white table " * 30)
        samples = [parse_record(entry, index) for index in range(200)]
        prepared, errors = prepare_samples(samples, tokenize, tokens_per_image=16, max_length=4096)
        assert not errors
        num_bytes = prepared.token_ids.nbytes + prepared.is_target.nbytes
        assert num_bytes == 5 * int(prepared.lengths.sum())

    def test_describe(self, build):
        records = [record("a"), "text", {"conversations": turns("hi", "yes")}]
        train = build(records, on_bad_sample="skip").train
        assert isinstance(train, ConversationDataset)
        assert train.describe(0) == "0 (id 'a')"
        assert train.describe(2) == "2"
