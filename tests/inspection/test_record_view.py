"""What `inspect data` shows of each record."""

import gzip
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_ft.cli import main
from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.conversation import get_template
from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.preparation.truncation import Limits
from llava_ft.data.sources.open import open_source
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.errors import UserError
from llava_ft.geometry import ImageGeometry
from llava_ft.inspection.record_view import (
    ALL_RECORDS,
    InspectionSummary,
    Selection,
    render_record,
    run_inspect_data,
    view_records,
)
from llava_ft.terminal import has_color

GOLDEN = Path(__file__).parents[1] / "golden"
MIX = GOLDEN / "data" / "mix.json"
KEYS = [
    "source", "index", "id", "input_ids", "labels", "num_images", "num_image_tokens", "num_kept", "images", "error",
]  # fmt: skip
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def limits(num_image_tokens=None, model_max_length=10**6, truncation="truncate"):
    side = None if num_image_tokens is None else round(num_image_tokens**0.5)
    geometry = None if side is None else ImageGeometry(side, side, side**2, side**2)
    return Limits(geometry, model_max_length, truncation)


def opened(path, cache):
    source = open_source(path)
    source.prepare(cache)
    return source


def make_plan(tokenize, limits=None, image_folder=None, check_images="none"):
    limits = limits or Limits(None, 10**6)
    needs_sizes = limits.geometry is not None and limits.geometry.needs_image_sizes
    return DataPlan(tokenize, limits, ImageChecks(check_images, needs_sizes), image_folder)


@pytest.fixture
def inspect(tokenize, tmp_path):
    def run(records, *, summary=None, selection=ALL_RECORDS, **options):
        path = tmp_path / "records.json"
        path.write_text(json.dumps(records))
        plan = make_plan(tokenize, **options)
        return list(view_records(opened(path, tmp_path), plan, summary or InspectionSummary(), selection))

    return run


def record(question="What?", answer="a car", **extra):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **extra}


class TestRecords:
    def test_views(self, tokenize, tmp_path):
        records = json.loads(MIX.read_text())
        views = list(view_records(opened(MIX, tmp_path), make_plan(tokenize, limits(16)), InspectionSummary()))
        assert [view.id for view in views] == [entry["id"] for entry in records]
        for position, (view, entry) in enumerate(zip(views, records, strict=True)):
            assert list(vars(view)) == KEYS
            assert view.index == position
            assert view.error is None
            assert len(view.input_ids) == len(view.labels)
            num_images = int("image" in entry)
            assert view.num_images == num_images == view.input_ids.count(IMAGE_TOKEN_INDEX)
            assert view.num_image_tokens == 16 * num_images
            assert view.num_kept == len(view.input_ids)
            assert view.images == ([entry["image"]] if "image" in entry else [])
            for token, label in zip(view.input_ids, view.labels, strict=True):
                assert label in (token, IGNORE_INDEX)
            assert json.loads(json.dumps(vars(view))) == vars(view)

    def test_tokens_of_images_are_null_without_a_tower(self, inspect):
        views = inspect([record("<image>", image="a.png"), record()])
        assert [view.num_image_tokens for view in views] == [None, 0]

    def test_several_images(self, inspect):
        (view,) = inspect([record("<image> and <image>?", image=["a.png", "b.png"])], limits=limits(4))
        assert view.num_images == view.input_ids.count(IMAGE_TOKEN_INDEX) == 2
        assert view.num_image_tokens == 8

    def test_unusable(self, inspect):
        views = inspect([record(), record("<image>", id="x"), "text", record(answer="ok")])
        assert [view.error is None for view in views] == [True, False, False, True]
        assert [view.index for view in views] == [0, 1, 2, 3]
        bad = views[1]
        assert list(vars(bad)) == KEYS
        assert bad.id == "x"
        assert bad.error.startswith("placeholder-mismatch: 1 <image> placeholder(s) but 0 image path(s)")
        assert (bad.input_ids, bad.labels, bad.num_images, bad.num_image_tokens) == ([], [], 0, 0)
        assert views[2].error.startswith("not-an-object: ")

    def test_images_are_checked_where_a_folder_is_known(self, inspect):
        records = [record("<image>", image="gone.png"), record("<image>", image="../x.png")]
        assert [view.error for view in inspect(records)] == [None, None]
        folder = GOLDEN / "images" / "src"
        errors = [view.error for view in inspect(records, image_folder=folder)]
        assert errors[0] is None
        assert errors[1].startswith("image-outside-folder: ")
        errors = [view.error for view in inspect(records, image_folder=folder, check_images="header")]
        assert errors[0].startswith("image-missing: ")

    def test_truncation_that_leaves_no_answer(self, inspect):
        long = record("word " * 100, "yes")
        assert inspect([long])[0].error is None
        found = inspect([long], limits=limits(model_max_length=60))
        assert found[0].error.startswith("truncated-answer: ")
        with_image = record("<image> What?", image="a.png")
        assert inspect([with_image], limits=limits(model_max_length=100))[0].error is None
        found = inspect([with_image], limits=limits(576, 100))
        assert found[0].error.startswith("truncated-answer: ")

    @pytest.mark.parametrize("policy", ["error", "drop"])
    def test_too_long(self, inspect, policy):
        found = inspect([record("word " * 100, "yes")], limits=limits(None, 60, policy))
        assert found[0].error.startswith("too-long: it has ")

    def test_what_is_cut_off(self, inspect):
        turns = [("human", "One?"), ("gpt", "red"), ("human", "<image>\nTwo?"), ("gpt", "blue")]
        entry = {"conversations": [{"from": role, "value": text} for role, text in turns], "image": "a.png"}
        summary = InspectionSummary()
        (view,) = inspect([entry], limits=limits(400, 300), summary=summary)
        assert view.error is None
        assert IMAGE_TOKEN_INDEX in view.input_ids[view.num_kept :]
        assert IMAGE_TOKEN_INDEX not in view.input_ids[: view.num_kept]
        assert summary.num_cut == 1
        assert "1 cut off at model_max_length" in "\n".join(summary.lines())

    def test_sizes_of_images_decide_with_anyres(self, inspect, tmp_path):
        Image.new("RGB", (40, 8)).save(tmp_path / "wide.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
        grids = ((8, 16), (16, 8), (16, 16), (24, 8))
        geometry = ImageGeometry(8, 8, 64, 64, aspect_ratio="anyres", merge_type="flat", grid_pinpoints=grids)
        records = [record("<image>", image=name) for name in ("wide.png", "small.png")]
        views = inspect(records, limits=Limits(geometry, 2048), image_folder=tmp_path)
        assert [view.num_image_tokens for view in views] == [64 * 4, 64 * 3]
        views = inspect(records, limits=Limits(geometry, 2048))
        assert [view.num_image_tokens for view in views] == [None, None]

    @pytest.mark.parametrize(
        ("selection", "wanted"),
        [
            (Selection(limit=2), [0, 1]),
            (Selection(indices=(3, 1)), [3, 1]),
            (Selection(ids=("b", "d")), [1, 3]),
            (Selection(limit=1, ids=("b", "d")), [1]),
            (Selection(indices=(0, 1, 2), ids=("b",)), [1]),
            (Selection(ids=("none",)), []),
        ],
    )
    def test_selection(self, inspect, selection, wanted):
        records = [record(id=name) for name in "abc"] + [record("<image>", id="d")]
        summary = InspectionSummary()
        views = inspect(records, selection=selection, summary=summary)
        assert [view.index for view in views] == wanted
        assert summary.num_records == len(wanted)

    def test_position_that_is_not_there(self, inspect):
        with pytest.raises(UserError, match=r"There is no record 1 in .*, which has 1. Allowed is 0 to 0"):
            inspect([record()], selection=Selection(indices=(1,)))

    def test_summary(self, inspect):
        summary = InspectionSummary()
        records = [
            record("<image> What?", image="a.png"),
            record(),
            "text",
            record("<image>"),
            record("<image>"),
        ]
        views = inspect(records, limits=limits(16), summary=summary)
        assert (summary.num_records, summary.num_usable, summary.num_images) == (5, 2, 1)
        assert summary.num_tokens == len(views[0].input_ids) + 15 + len(views[1].input_ids)
        supervised = sum(label != IGNORE_INDEX for view in views for label in view.labels)
        assert summary.num_supervised == supervised > 0
        assert summary.counts == {"placeholder-mismatch": 2, "not-an-object": 1}
        assert summary.lines() == [
            "5 records, 2 usable",
            f"{summary.num_tokens} tokens, {supervised} supervised ({supervised / summary.num_tokens:.1%})",
            "1 images",
            "2 unusable: placeholder-mismatch",
            "1 unusable: not-an-object",
        ]

    def test_summary_of_nothing_usable(self, inspect):
        summary = InspectionSummary()
        inspect(["text"], summary=summary)
        assert "0 tokens, 0 supervised (0.0%)" in "\n".join(summary.lines())


class TestRendering:
    def text(self, views, tokenizer, color=False):
        return render_record(views[0], tokenizer, color=color)

    def test_marks(self, inspect, tokenizer):
        entry = record("<image>\nWhat is it?", "a red car", image="a.png", id="x")
        header, *lines = self.text(inspect([entry], limits=limits(16)), tokenizer).splitlines()
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

    def test_cut(self, inspect, tokenizer):
        turns = [("human", "One?"), ("gpt", "red"), ("human", "Two?"), ("gpt", "blue " * 40)]
        entry = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        (whole,) = inspect([entry])
        views = inspect([entry], limits=limits(None, len(whole.input_ids) - 10))
        header, *lines = self.text(views, tokenizer).splitlines()
        assert "; model_max_length cuts off " in header
        body = "\n".join(lines)
        assert "ASSISTANT:[[ red</s>]]{-USER: Two? ASSISTANT:-}{- blue blue" in body
        assert body.endswith("</s>-}")
        assert "\x1b[9;31mUSER: Two? ASSISTANT:\x1b[0m" in self.text(views, tokenizer, color=True)

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
        plan = make_plan(SampleTokenizer(tokenizer, get_template(template)))
        views = list(view_records(opened(path, tmp_path), plan, InspectionSummary()))
        assert len(views) == len(records)
        for view in views:
            marked = render_record(view, tokenizer, color=False)
            colored = render_record(view, tokenizer, color=True)
            assert colored.count(GREEN) == colored.count(PLAIN)
            assert (GREEN in colored) == (view.error is None)
            assert marked.startswith(f"Record {view.index}")

    @settings(max_examples=40, deadline=None)
    @given(answer=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30))
    def test_answer_stands_between_the_marks(self, tokenizer, tokenize, tmp_path_factory, answer):
        path = tmp_path_factory.getbasetemp() / "hypothesis.json"
        path.write_text(json.dumps([record(answer=answer)]))
        (view,) = view_records(opened(path, path.parent), make_plan(tokenize), InspectionSummary())
        if view.error is None and "<" not in answer:
            text = render_record(view, tokenizer, color=False)
            inside = text.split("ASSISTANT:[[ ", 1)[1]
            expected = tokenizer.decode(tokenizer(f"x {answer}", add_special_tokens=False).input_ids)[2:]
            assert inside == f"{expected}</s>]]"


class TestPage:
    @pytest.fixture
    def page(self, tokenize, tmp_path, monkeypatch):
        def make(records, **options):
            path, page = tmp_path / "a <title>.json", tmp_path / "page.html"
            path.write_text(json.dumps(records))
            monkeypatch.chdir(tmp_path)
            plan = replace(make_plan(tokenize, **options), preparation=PreparationSettings(tmp_path / "cache"))
            run_inspect_data(path.name, plan, io.StringIO(), html=page)
            return page.read_text()

        return make

    def test_text_is_escaped_and_marked(self, page):
        html = page([record("<script>alert(1)</script>\x1b", "<b>bold</b>", id="<i>")])
        assert "<script" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b" in html
        assert "<mark> &lt;b&gt;bold&lt;/b&gt;&lt;/s&gt;</mark>" in html
        assert "Record 0 (id &#39;&lt;i&gt;&#39;)" in html
        assert "<title>Records of a &lt;title&gt;.json</title>" in html
        assert "1 records, 1 usable" in html

    def test_nothing_is_loaded(self, page, tmp_path):
        Image.new("RGB", (900, 30), "red").save(tmp_path / "a.png")
        html = page([record("<image>", image="a.png"), record("<image>", image="no.png")], image_folder=tmp_path)
        assert html.count('src="data:image/jpeg;base64,') == html.count("src=") == 1
        assert "no.png&#39; does not exist" in html
        assert "http" not in html.replace("http-equiv", "")
        assert "Content-Security-Policy" in html

    def test_errors_and_cuts(self, page):
        turns = [("human", "One?"), ("gpt", "red"), ("human", "Two?"), ("gpt", "blue " * 400)]
        long = {"conversations": [{"from": role, "value": text} for role, text in turns]}
        html = page([record("<image>"), long], limits=limits(None, 300))
        assert "Cannot be used: placeholder-mismatch" in html
        assert "<del>USER: Two? ASSISTANT:</del><del><mark> blue" in html


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        monkeypatch.chdir(GOLDEN)
        flags = ["--model_name_or_path", "ckpt/llava15-tiny", "--data_path", "data/mix.json"]
        flags += ["--image_folder", "images/src", "--data_cache_dir", str(tmp_path)]
        return lambda *extra: main(["inspect", "data", *flags, *extra])

    def test_text(self, run, capsys):
        assert run("--index", "2", "--limit", "1") == 0
        assert capsys.readouterr().out.startswith("Record 2 ")

    def test_json(self, run, capsys):
        assert run("--json") == 0
        views = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [list(view) for view in views] == [KEYS] * len(json.loads(MIX.read_text()))

    def test_page(self, run, capsys, tmp_path):
        assert run("--html", str(tmp_path / "page.html"), "--supervise", "all") == 0
        html = (tmp_path / "page.html").read_text()
        assert html.endswith("</body></html>\n")
        assert "<mark>A chat between" in html.replace("<mark> ", "<mark>")
        assert "shows " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--limit", "0"], "--limit is 0; it must be at least 1"),
            (["--json", "--html", "x"], "--json and --html exclude each other"),
            (["--index", "999"], "There is no record 999"),
            (["--html", "/nowhere/x.html"], "The page /nowhere/x.html cannot be written: No such file"),
        ],
    )
    def test_wrong_requests(self, run, extra, message, capsys):
        assert run(*extra) == 2
        assert message in capsys.readouterr().err


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
