"""Reports: text for a terminal, JSON for programs, a page for a browser."""

import io
import json
import re
from html.parser import HTMLParser

import pytest

from llava_ft.cli import main
from llava_ft.inspection import check_data
from llava_ft.inspection.check_report import as_text
from tests.data.conftest import GOLDEN, record, turns

TOP_KEYS = ["format", "passed", "data_sets", "epoch", "fix", "refused"]
STATISTICS_KEYS = [
    "records", "usable", "images", "image_files", "image_bytes", "unusable_images", "tokens", "supervised", "lengths",
    "truncation", "supervised_share",
]  # fmt: skip
FINDING_KEYS = ["severity", "kind", "title", "advice", "num_records", "examples"]


@pytest.fixture
def data(folder, tmp_path):
    """Write a data set with something of everything."""
    records = [
        record("fine", image="good.jpg"),
        record("<b>gone</b>", image="gone<i>.jpg"),
        record("half", image="truncated.jpg"),
        {
            "conversations": [{"from": "user", "value": "Hi\x1b[2J"}, {"from": "assistant", "value": "Ho"}],
            "id": "\x1bx",
        },
        {"conversations": turns("One?", "red", "<image>Two?", "blue " * 200), "image": "good.jpg", "id": "cut"},
        record("fine"),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def run(data, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model_name_or_path", str(GOLDEN / "ckpt" / "llava15-tiny"), "--image_folder", str(folder)]
    flags += ["--vision_tower", str(GOLDEN / "ckpt" / "clip-tiny")]
    flags += ["--data_cache_dir", str(tmp_path / "cache"), "--model_max_length", "200", "--workers", "1"]
    return lambda *extra: main(["check-data", *flags, "--data_path", str(data), *extra])


def open_tags(page):
    """Name the tags of a page that are not closed, or closed in the wrong order."""
    wrong, stack = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br", "!doctype"):
                stack.append(tag)

        def handle_endtag(self, tag):
            if not stack or stack.pop() != tag:
                wrong.append(tag)

    Parser().feed(page)
    return wrong + stack


def loaded(capsys):
    return json.loads(capsys.readouterr().out)


class TestJson:
    def test_keys_are_fixed(self, run, capsys):
        assert run("--json") == 1
        report = loaded(capsys)
        assert list(report) == TOP_KEYS
        assert report["format"] == 1
        assert report["passed"] is False
        (found,) = report["data_sets"]
        assert list(found) == ["name", "use", "statistics", "findings"]
        assert list(found["statistics"]) == STATISTICS_KEYS
        assert list(found["statistics"]["lengths"]) == [
            "shortest", "median", "mean", "p99", "longest", "histogram",
        ]  # fmt: skip
        assert list(found["statistics"]["truncation"]) == [
            "max_length", "policy", "records_cut", "records_dropped", "tokens_lost", "supervised_lost", "answers_lost",
            "images_lost",
        ]  # fmt: skip
        assert all(list(finding) == FINDING_KEYS for finding in found["findings"])
        assert list(report["epoch"]) == ["records", "tokens", "supervised", "packing"]
        assert list(report["epoch"]["packing"]) == [
            "rows", "max_length", "records_per_row", "efficiency", "padded_efficiency", "batch_size",
        ]  # fmt: skip

    def test_findings(self, run, capsys):
        run("--json")
        findings = loaded(capsys)["data_sets"][0]["findings"]
        assert {finding["kind"]: (finding["severity"], finding["num_records"]) for finding in findings} == {
            "image-missing": ("error", 1),
            "image-truncated": ("error", 1),
            "unknown-role": ("error", 1),
            "cut-off": ("warning", 1),
            "repeated-id": ("note", 1),
        }
        missing = next(finding for finding in findings if finding["kind"] == "image-missing")
        assert missing["examples"][0]["record"] == 1
        assert missing["examples"][0]["id"] == "<b>gone</b>"
        assert "does not exist" in missing["examples"][0]["reason"]


class TestText:
    def test_report(self, run, capsys):
        assert run() == 1
        text = capsys.readouterr().out
        assert "records  6, 3 usable" in text
        assert re.search(r"error +1  image-missing: an image file is not there\n +records 1 \(id '<b>gone</b>'\)", text)
        assert re.search(r"\d+ +#* *< model_max_length", text)
        assert text.endswith("Kinds found: 3 errors, 1 warning, 1 note.\n")
        assert not {"\x1b", "\r"} & set(text)

    def test_nothing_is_cut_off_where_there_is_no_terminal(self, run, folder, tmp_path, capsys):
        name = "far/" * 60 + "gone.jpg"
        (tmp_path / "far.json").write_text(json.dumps([record("fine"), record("far", image=name)]))
        run("--data_path", str(tmp_path / "far.json"))
        assert f"first: Image '{folder / name}' does not exist.\n" in capsys.readouterr().out

    def test_a_terminal_wraps_and_colours(self, run, capsys, monkeypatch):
        seen = []
        monkeypatch.setattr(check_data, "as_text", lambda report, is_terminal: seen.append(report) or "")
        run()
        for name, value in {"COLUMNS": "70", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("NO_COLOR", raising=False)
        wrapped, plain = as_text(seen[0], is_terminal=True), as_text(seen[0], is_terminal=False)
        assert "\x1b[31merror" in wrapped
        without_codes = re.sub(r"\x1b\[[\d;]+m", "", wrapped)
        assert "\x1b" not in without_codes
        assert max(map(len, without_codes.splitlines())) <= 70 < max(map(len, plain.splitlines()))
        assert re.sub(r"\s+", "", without_codes) == re.sub(r"\s+", "", plain)
        monkeypatch.setenv("NO_COLOR", "1")
        assert "[31m" not in as_text(seen[0], is_terminal=True)

    def test_nothing_wrong(self, run, capsys):
        assert run("--data_path", str(GOLDEN / "data" / "text.json"), "--model_max_length", "2048") == 0
        assert "Nothing would stop or spoil a run." in capsys.readouterr().out

    def test_skip_passes_when_the_run_finds_it(self, run, capsys):
        assert run("--on_bad_sample", "skip", "--check_images", "decode") == 0
        assert run("--on_bad_sample", "skip") == 1


class TestPage:
    def test_escaped_and_self_contained(self, run, capsys, tmp_path):
        assert run("--html", "report.html") == 1
        page = (tmp_path / "report.html").read_text()
        assert page.startswith("<!DOCTYPE html>")
        assert page.endswith("</body></html>\n")
        assert "<b>gone" not in page
        assert "gone&lt;i&gt;.jpg" in page
        assert "\x1b" not in page
        assert page.count("<svg") == page.count("</svg>") == 3
        sources = re.findall(r'src="([^"]*)"', page)
        assert sources
        assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
        assert not re.search(r"https?://|<script|<link|@import|url\(", page)
        assert open_tags(page) == []
        assert "model_max_length 200" in page


class TestFix:
    def test_written_file_passes(self, run, capsys, tmp_path):
        assert run("--fix", "fixed.json", "--json") == 1
        report = loaded(capsys)
        assert report["fix"] == {
            "path": "fixed.json",
            "written": 4,
            "left_out": {"image-missing": 1, "image-truncated": 1},
            "repaired": {"roles renamed": [3]},
            "repaired_counts": {"roles renamed": 1},
        }
        assert run("--data_path", str(tmp_path / "fixed.json"), "--json") == 0
        assert loaded(capsys)["data_sets"][0]["statistics"]["usable"] == 4

    def test_listed_in_the_text(self, run, capsys):
        run("--fix", "fixed.jsonl")
        text = capsys.readouterr().out
        assert "Written: fixed.jsonl" in text
        assert "repaired  1 roles renamed (records 3)" in text
        assert "left out  1 image-missing" in text


class TestSeveralSources:
    def test_mixture_and_validation(self, run, capsys, tmp_path):
        text = GOLDEN / "data" / "text.json"
        (tmp_path / "mix.yaml").write_text(
            f"sources:\n- {{path: {text}, weight: 3, prompt_prefix: 'Briefly: '}}\n"
            f"- {{path: {GOLDEN / 'data' / 'mix.json'}, weight: 1, image_folder: {GOLDEN / 'images' / 'src'}}}\n"
            "epoch_size: 100\n"
        )
        flags = ["--data_path", "mix.yaml", "--validation_data_path", str(text), "--model_max_length", "2048"]
        assert run(*flags, "--json") == 0
        report = loaded(capsys)
        assert [(data["name"], data["use"]) for data in report["data_sets"]] == [
            (str(text), "training"),
            (str(GOLDEN / "data" / "mix.json"), "training"),
            (str(text), "validation"),
        ]
        assert report["epoch"]["records"] == 100
        with_prefix, _, without = (data["statistics"]["tokens"] for data in report["data_sets"])
        assert with_prefix > without

    def test_a_mixture_that_cannot_be_made(self, run, capsys, tmp_path):
        text = GOLDEN / "data" / "text.json"
        (tmp_path / "mix.yaml").write_text(f"sources:\n- {{path: {text}, held_out: 1000}}\n")
        flags = ["--data_path", "mix.yaml", "--model_max_length", "2048"]
        assert run(*flags, "--json") == 1
        report = loaded(capsys)
        assert "held_out = 1000 leaves none to train on" in report["refused"]
        assert report["epoch"] is None
        assert run(*flags) == 1
        assert "Not ready: a run would be refused. Source" in capsys.readouterr().out

    def test_a_mixture_is_not_fixed(self, run, capsys, tmp_path):
        (tmp_path / "mix.yaml").write_text(f"sources:\n- path: {GOLDEN / 'data' / 'text.json'}\n")
        assert run("--data_path", "mix.yaml", "--fix", "out.json") == 2
        assert "a mixture has several sources. Check each of them on its own" in capsys.readouterr().err


class TestWrongRequests:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--workers", "0"], "--workers is 0; it must be at least 1"),
            (["--fix", "out.csv"], "must end in .json"),
            (["--data_path", "none.json"], "none.json does not exist"),
            (["--html", "no/page.html"], "The page no/page.html cannot be written"),
            (["--no_such_flag", "1"], "no_such_flag"),
        ],
    )
    def test_exit_status_2(self, run, extra, message, capsys):
        assert run(*extra) == 2
        assert message in capsys.readouterr().err


def test_no_weights_are_needed(run, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for file in (GOLDEN / "ckpt" / "llava15-tiny").iterdir():
        if file.suffix in (".json", ".model") and "index" not in file.name:
            (model / file.name).write_bytes(file.read_bytes())
    assert run("--model_name_or_path", str(model)) == 1
    assert "3 usable" in capsys.readouterr().out


def test_output_is_the_report_alone(run, capsys):
    run("--json")
    captured = capsys.readouterr()
    assert json.load(io.StringIO(captured.out))
