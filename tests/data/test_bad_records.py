"""Records that cannot be used: one clear error for each, or left out, counted and named."""

import json
import logging

import pytest

from llava_ft.constants import IGNORE_INDEX
from llava_ft.data.image_files import resolve_image_path
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.errors import ImageError, UserError
from tests.data.conftest import GOLDEN, record, turns

MIX = GOLDEN / "data" / "mix.json"

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
        "model_max_length = 2048 leaves no part of an answer",
    ),
    "image is a number": (record(image=7), "bad-image", "'image' is the number 7"),
    "video": (record(video="a.mp4"), "unknown-media", "a value under 'video'"),
    "mark of a video": ({"conversations": turns("<video>\nWhat?", "yes")}, "unknown-media", "holds '<video>'"),
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

    def test_every_file_is_opened_once(self, build, folder, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "llava_ft.data.preparation.image_facts.check_image_header",
            lambda path, **options: (seen.append(path), (8, 8))[1],
        )
        records = [record(image="good.jpg")] * 500 + [record(image="text.png")]
        for _ in range(2):
            build(records, image_folder=folder, preparation=PreparationSettings(tmp_path / "cache"))
        assert sorted(seen) == [str(folder / "good.jpg"), str(folder / "text.png")]

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
        assert message.endswith("'m0', 'm1', 'm2', 'm3', 'm4', 'm5', 'm6', 'm7', 'm8', 'm9', 'm10', 'm11', 13, 14")

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

        monkeypatch.setattr("llava_ft.data.build.look_at_images", refuse)

    @pytest.mark.parametrize("policy", ["error", "skip"])
    def test_no_vision_tower(self, build, policy):
        with pytest.raises(UserError, match=r"Sample 1 \(id 'x'\) has images, but the model has no vision tower"):
            build([record(), record("x", image="square.png")], image_transform=None, on_bad_sample=policy)

    @pytest.mark.parametrize("policy", ["error", "skip"])
    def test_no_image_folder(self, build, policy):
        with pytest.raises(UserError, match=r"Sample 0 .*'square.png', a relative path, .* Pass --image_folder"):
            build([record(image="square.png")], image_folder=None, on_bad_sample=policy)

    @pytest.mark.parametrize("policy", ["error", "skip"])
    def test_image_folder_is_not_there(self, build, tmp_path, policy):
        with pytest.raises(UserError, match=r"The image folder '.*nowhere' is not a directory, but Sample 0"):
            build([record(image="a.png")], image_folder=tmp_path / "nowhere", on_bad_sample=policy)

    def test_image_folder_does_not_matter_without_images(self, build, tmp_path):
        assert build([record()], image_folder=tmp_path / "nowhere").report.num_usable == 1
