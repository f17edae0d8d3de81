"""What `inspect data` shows of each record."""

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.conversation import get_template
from llava_ft.data.inspect import InspectionSummary, has_color, inspect_records, render_colored
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
MIX = GOLDEN / "data" / "mix.json"
KEYS = ["index", "id", "input_ids", "labels", "num_images", "num_image_tokens", "error"]
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


@pytest.fixture
def inspect(tokenize, tmp_path):
    def run(records, **options):
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        return list(inspect_records(path, options.pop("tokenize", tokenize), **options))

    return run


def record(question="What?", answer="a car", **extra):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **extra}


class TestRecords:
    def test_views(self, tokenize):
        records = json.loads(MIX.read_text())
        views = list(inspect_records(MIX, tokenize, num_image_tokens=16))
        assert [view["id"] for view in views] == [entry["id"] for entry in records]
        for position, (view, entry) in enumerate(zip(views, records, strict=True)):
            assert list(view) == KEYS
            assert view["index"] == position
            assert view["error"] is None
            assert len(view["input_ids"]) == len(view["labels"])
            num_images = int("image" in entry)
            assert view["num_images"] == num_images == view["input_ids"].count(IMAGE_TOKEN_INDEX)
            assert view["num_image_tokens"] == 16 * num_images
            for token, label in zip(view["input_ids"], view["labels"], strict=True):
                assert label in (token, IGNORE_INDEX)
            assert json.loads(json.dumps(view)) == view

    def test_tokens_of_images_are_null_without_a_tower(self, inspect):
        views = inspect([record("<image>", image="a.png"), record()])
        assert [view["num_image_tokens"] for view in views] == [None, 0]

    def test_several_images(self, inspect):
        (view,) = inspect([record("<image> and <image>?", image=["a.png", "b.png"])], num_image_tokens=5)
        assert view["num_images"] == view["input_ids"].count(IMAGE_TOKEN_INDEX) == 2
        assert view["num_image_tokens"] == 10

    def test_unusable(self, inspect):
        views = inspect([record(), record("<image>", id="x"), "text", record(answer="ok")])
        assert [view["error"] is None for view in views] == [True, False, False, True]
        assert [view["index"] for view in views] == [0, 1, 2, 3]
        bad = views[1]
        assert list(bad) == KEYS
        assert bad["id"] == "x"
        assert bad["error"].startswith("placeholder-mismatch: 1 <image> placeholder(s) but 0 image path(s)")
        assert (bad["input_ids"], bad["labels"], bad["num_images"], bad["num_image_tokens"]) == ([], [], 0, 0)
        assert views[2]["error"].startswith("not-an-object: ")

    def test_images_are_checked_where_a_folder_is_known(self, inspect):
        records = [record("<image>", image="gone.png"), record("<image>", image="../x.png")]
        assert [view["error"] for view in inspect(records)] == [None, None]
        folder = GOLDEN / "images" / "src"
        errors = [view["error"] for view in inspect(records, image_folder=folder)]
        assert errors[0] is None
        assert errors[1].startswith("image-outside-folder: ")
        errors = [view["error"] for view in inspect(records, image_folder=folder, check_images="header")]
        assert errors[0].startswith("image-missing: ")

    def test_truncation_that_leaves_no_answer(self, inspect):
        long = record("word " * 100, "yes")
        assert inspect([long])[0]["error"] is None
        assert inspect([long], model_max_length=60)[0]["error"].startswith("truncated-answer: ")
        with_image = record("<image> What?", image="a.png")
        assert inspect([with_image], model_max_length=100)[0]["error"] is None
        limits = {"model_max_length": 100, "num_image_tokens": 576}
        assert inspect([with_image], **limits)[0]["error"].startswith("truncated-answer: ")

    def test_missing_file(self, tokenize, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            list(inspect_records(tmp_path / "no.json", tokenize))

    def test_summary(self, inspect):
        summary = InspectionSummary()
        records = [
            record("<image> What?", image="a.png"),
            record(),
            "text",
            record("<image>"),
            record("<image>"),
        ]
        views = inspect(records, num_image_tokens=16, summary=summary)
        assert (summary.num_records, summary.num_usable, summary.num_images) == (5, 2, 1)
        assert summary.num_tokens == len(views[0]["input_ids"]) + 15 + len(views[1]["input_ids"])
        supervised = sum(label != IGNORE_INDEX for view in views for label in view["labels"])
        assert summary.num_supervised == supervised > 0
        assert summary.counts == {"placeholder-mismatch": 2, "not-an-object": 1}
        assert summary.describe().splitlines() == [
            "5 records, 2 usable",
            f"{summary.num_tokens} tokens, {supervised} supervised ({supervised / summary.num_tokens:.1%})",
            "1 images",
            "2 unusable: placeholder-mismatch",
            "1 unusable: not-an-object",
        ]

    def test_summary_of_nothing_usable(self, inspect):
        summary = InspectionSummary()
        inspect(["text"], summary=summary)
        assert "0 tokens, 0 supervised (0.0%)" in summary.describe()


class TestRendering:
    def text(self, views, tokenizer, color=False):
        return render_colored(views[0], tokenizer, color=color)

    def test_marks(self, inspect, tokenizer):
        entry = record("<image>\nWhat is it?", "a red car", image="a.png", id="x")
        header, *lines = self.text(inspect([entry], num_image_tokens=16), tokenizer).splitlines()
        assert header.startswith("Record 0 (id 'x'): ")
        assert header.endswith("1 images (16 tokens)")
        body = "\n".join(lines)
        assert body.endswith("USER: <image>\nWhat is it? ASSISTANT:[[ a red car</s>]]")
        assert body.startswith("<s> A chat between a curious user")

    def test_color(self, inspect, tokenizer):
        views = inspect([record(answer="a red car")])
        assert self.text(views, tokenizer, color=True).endswith(f"ASSISTANT:{GREEN} a red car</s>{PLAIN}")

    def test_every_answer_is_marked(self, inspect, tokenizer):
        turns = [("human", "One?"), ("gpt", "red"), ("human", "Two?"), ("gpt", "blue")]
        entry = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        assert self.text(inspect([entry]), tokenizer).endswith(
            "USER: One? ASSISTANT:[[ red</s>]]USER: Two? ASSISTANT:[[ blue</s>]]"
        )

    def test_unusable(self, inspect, tokenizer):
        text = self.text(inspect([record("<image>", id="x")]), tokenizer)
        assert text.startswith("Record 0 (id 'x') cannot be used: placeholder-mismatch: 1 <image>")

    def test_control_characters_do_not_reach_the_terminal(self, inspect, tokenizer):
        text = self.text(inspect([record("\x1b[2Jhi\r\x07", "tab\tand\nline")]), tokenizer)
        assert "\\x1b[2Jhi\\x0d\\x07" in text
        assert not {"\x1b", "\r", "\x07"} & set(text)
        assert "[[ tab\tand\nline</s>]]" in text

    @pytest.mark.parametrize("template", ["v0", "v1", "llama_2", "chatml_direct", "mpt", "plain"])
    def test_recorded_conversations_render(self, tokenizer, template, tmp_path):
        data = json.loads(gzip.decompress((GOLDEN / "conversations_tiny512.json.gz").read_bytes()))
        records = [
            {"conversations": case["conversations"], **({"image": "a.png"} if case["image"] else {})}
            for case in data["cases"]
        ]
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        views = list(inspect_records(path, SampleTokenizer(tokenizer, get_template(template))))
        assert len(views) == len(records)
        for view in views:
            marked = render_colored(view, tokenizer, color=False)
            colored = render_colored(view, tokenizer, color=True)
            assert colored.count(GREEN) == colored.count(PLAIN)
            assert (GREEN in colored) == (view["error"] is None)
            assert marked.startswith(f"Record {view['index']}")

    @settings(max_examples=40, deadline=None)
    @given(answer=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30))
    def test_answer_stands_between_the_marks(self, tokenizer, tokenize, tmp_path_factory, answer):
        path = tmp_path_factory.getbasetemp() / "hypothesis.json"
        path.write_text(json.dumps([record(answer=answer)]))
        (view,) = inspect_records(path, tokenize)
        if view["error"] is None and "<" not in answer:
            text = render_colored(view, tokenizer, color=False)
            inside = text.split("ASSISTANT:[[ ", 1)[1]
            expected = tokenizer.decode(tokenizer(f"x {answer}", add_special_tokens=False).input_ids)[2:]
            assert inside == f"{expected}</s>]]"


class TestColor:
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    @pytest.fixture(autouse=True)
    def plain_environment(self, monkeypatch):
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")

    def test_terminal(self):
        assert has_color(self.Terminal())

    def test_file(self):
        assert not has_color(io.StringIO())

    @pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
    def test_forbidden(self, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        assert not has_color(self.Terminal())
