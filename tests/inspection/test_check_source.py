"""What a check finds: the same as a run, and what else is wrong with records that a run takes."""

import gzip
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from llava_ft.conversation import TEMPLATES, get_template
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.errors import UserError
from llava_ft.geometry import ImageGeometry
from llava_ft.inspection import check_source as check_module
from llava_ft.inspection.check_source import Example, Tally, check_source
from llava_ft.inspection.findings import REMARKS, UNUSABLE, find_all
from tests.data.conftest import GOLDEN, SOURCES, record, turns
from tests.data.test_bad_records import MALFORMED
from tests.data.test_text_properties import json_values
from tests.data.test_text_properties import records as any_records


def kinds_of(found):
    return {kind: list(tally.indices) for kind, tally in found.errors.items()}


def findings_of(found, **options):
    return {finding.kind: finding for finding in find_all(found, options.get("on_bad_sample", "error"))}


def assert_agrees(check, build, records, **options):
    """Check that exactly the records are unusable that a run leaves out, for the same reasons."""
    found = check(records, **options)
    names = {"max_length": "model_max_length"}
    wishes = {names.get(name, name): value for name, value in options.items()}
    try:
        datasets = build(records, on_bad_sample="skip", check_images="decode", **wishes)
    except UserError:
        assert len(found.columns["index"]) == 0
        return found
    report = datasets.report
    wanted = {}
    for error in report.errors:
        wanted.setdefault(error.kind, []).append(error.index)
    assert kinds_of(found) == wanted
    assert found.columns["index"].tolist() == [datasets.train[row]["index"] for row in range(len(datasets.train))]
    assert found.columns["kept_tokens"].tolist() == datasets.train.lengths
    assert int(found.columns["kept_supervised"].sum()) == report.num_supervised
    assert int(found.columns["kept_images"].sum()) == report.num_images
    assert int((found.columns["kept_tokens"] < found.columns["tokens"]).sum()) == report.num_truncated
    lost = int((found.columns["tokens"] - found.columns["kept_tokens"]).sum())
    assert found.dropped.indices or lost == report.num_lost_tokens
    if options.get("truncation") == "drop":
        assert len(found.dropped.indices) == report.num_too_long
    return found


class TestAgreementWithTraining:
    def test_malformed_records(self, check, build, folder):
        records = [record("first"), *(bad for bad, _, _ in MALFORMED.values()), record("t", image="truncated.jpg")]
        found = assert_agrees(check, build, records, image_folder=folder)
        for position, (_, kind, _) in enumerate(MALFORMED.values(), start=1):
            assert position in found.errors[kind].indices

    @pytest.mark.parametrize("truncation", ["truncate", "drop"])
    @pytest.mark.parametrize("max_length", [60, 90, 120, 200])
    def test_truncation(self, check, build, truncation, max_length):
        long = {"conversations": turns("One?", "red " * 30, "<image>Two?", "blue " * 30, "Three?", "green"), "id": "l"}
        records = [*json.loads((GOLDEN / "data" / "mix.json").read_text()), long | {"image": "landscape.jpg"}]
        assert_agrees(check, build, records, truncation=truncation, max_length=max_length)

    @pytest.mark.parametrize(
        ("template", "supervise"),
        [*((name, "answers") for name in sorted(TEMPLATES)), ("v1", "last_answer"), ("v1", "all")],
    )
    def test_recorded_conversations(self, check, build, tokenizer, template, supervise):
        cases = json.loads(gzip.decompress((GOLDEN / "conversations_tiny512.json.gz").read_bytes()))["cases"][::3]
        records = [
            {"conversations": case["conversations"], **({"image": "landscape.jpg"} if case["image"] else {})}
            for case in cases
        ]
        make = SampleTokenizer(tokenizer, get_template(template), supervise=supervise)
        assert_agrees(check, build, records, tokenize=make, max_length=150)

    def test_sizes_of_images_count(self, check, build, tmp_path):
        geometry = ImageGeometry(
            56,
            4,
            16,
            16,
            aspect_ratio="anyres",
            merge_type="spatial_unpad",
            grid_pinpoints=((56, 112), (112, 56), (112, 112)),
        )
        for name, size in {"wide": (300, 20), "tall": (30, 500), "small": (20, 20)}.items():
            Image.new("RGB", size, "red" if name == "wide" else "blue").save(tmp_path / f"{name}.png")
        records = [record(name, image=f"{name}.png") for name in ("wide", "tall", "small", "gone")]
        found = assert_agrees(check, build, records, geometry=geometry, image_folder=tmp_path)
        assert len(set(found.columns["tokens"].tolist())) == 3

    def test_images_inside_the_data(self, write, make_plan, build, tmp_path):
        content = (SOURCES / "landscape.jpg").read_bytes()
        contents = [content, content[: len(content) // 2], b"", b"no picture", content, None]
        rows = [
            record(str(n), question="<image>What?") | {"image": {"bytes": data, "path": "landscape.jpg"}}
            for n, data in enumerate(contents)
        ]
        path = tmp_path / "rows.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        found = check_source(write(None, path.name), make_plan())
        report = build(path, on_bad_sample="skip", check_images="decode").report
        assert {kind: len(indices) for kind, indices in kinds_of(found).items()} == report.counts
        assert sorted(found.unusable()) == [error.index for error in report.errors] == [1, 2, 3]
        assert list(found.remarks["duplicate-record"].indices) == [4, 5]

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(entries=st.lists(any_records | json_values, min_size=1, max_size=8))
    def test_anything_that_json_holds(self, check, build, tmp_path, entries):
        text = json.dumps(entries)
        try:
            text.encode()
        except UnicodeEncodeError:
            return
        assert_agrees(check, build, json.loads(text))


def test_any_number_of_processes_finds_the_same(check, folder, monkeypatch):
    for name, value in {"RECORDS_PER_TASK": 3, "IMAGES_PER_TASK": 2, "RECORDS_FOR_PROCESSES": 10}.items():
        monkeypatch.setattr(check_module, name, value)
    records = [bad for bad, _, _ in MALFORMED.values()]
    records += [record(str(n), image="good.jpg", answer=f"answer {n % 7}") for n in range(30)]
    one, two = (check(records, image_folder=folder, num_processes=number) for number in (1, 2))
    assert kinds_of(one) == kinds_of(two)
    assert find_all(one, "error") == find_all(two, "error")
    for name, column in one.columns.items():
        np.testing.assert_array_equal(column, two.columns[name])


def test_processes_that_decode_do_without_pytorch():
    code = "import sys, llava_ft.inspection.check_source, llava_ft.inspection.repair; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def run_fatally(work, tasks, num_processes, when_killed=None):
    """Stands in for a pool: decoding an image called bad ends the process."""
    for task in tasks:
        yield when_killed(task) if any("bad" in str(part) for part in task) else work(task)


def test_an_image_that_kills_its_process_is_named(check, monkeypatch):
    monkeypatch.setattr(check_module, "run_tasks", run_fatally)
    monkeypatch.setattr(
        check_module, "run_alone", lambda work, task, when_killed: next(run_fatally(work, [task], 1, when_killed))
    )
    found = check([record(name, image=f"{name}.png") for name in ("square", "bad", "palette")])
    assert kinds_of(found) == {"image-crash": [1]}
    assert "'bad.png' ends the process that decodes it" in found.errors["image-crash"].examples[0].reason
    assert findings_of(found, on_bad_sample="skip")["image-crash"].severity == "error"


class TestFindings:
    def test_nothing(self, check):
        found = check([record("a"), record("b", image="landscape.jpg")])
        assert find_all(found, "error") == []
        assert found.unusable() == {}

    def test_every_kind_is_described(self):
        page = (GOLDEN.parents[1] / "docs/reference/data-format.md").read_text()
        table = page.split("## Records that cannot be used", 1)[1]
        listed = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", table))
        assert len(listed) > 20
        assert listed <= UNUSABLE.keys()
        assert not UNUSABLE.keys() & REMARKS.keys()

    def test_duplicates(self, check, tmp_path):
        shutil.copy(SOURCES / "landscape.jpg", tmp_path / "a.jpg")
        shutil.copy(SOURCES / "landscape.jpg", tmp_path / "b.jpg")
        Image.new("RGB", (50, 50)).save(tmp_path / "c.jpg")
        records = [
            record("1", image="a.jpg"),
            record("2", image="b.jpg"),
            record("3", image="c.jpg"),
            record("3", image="c.jpg", answer="no"),
            record("5", image="a.jpg"),
            record("6"),
            record(6),
            {"conversations": turns("What is it?", "a red car"), "id": None},
            {"conversations": turns("And what is that?", "a blue car")},  # two without an id do not share it
        ]
        found = findings_of(check(records, image_folder=tmp_path))
        assert [each.record for each in found["duplicate-record"].examples] == [1, 4, 6, 7]
        assert found["duplicate-record"].examples[0] == Example(1, "2", "record 0 says the same of the same images.")
        assert found["duplicate-record"].severity == "warning"
        assert [each.record for each in found["repeated-id"].examples] == [3, 6]
        assert found["same-image"].severity == found["repeated-id"].severity == "note"
        assert found["same-image"].examples[0].reason == "a.jpg = b.jpg"

    def test_weights_make_records_differ(self, check):
        weighted = record("2")
        weighted["conversations"][1]["weight"] = 1
        other = {"conversations": [*turns("Q", "A", "What is it?"), {"from": "gpt", "value": "x", "weight": 0}]}
        plain = {"conversations": turns("Q", "A", "What is it?", "x")}
        found = findings_of(check([record("1"), weighted, other, plain]))
        assert [each.record for each in found["duplicate-record"].examples] == [1]

    def test_answers(self, check):
        records = [
            {"conversations": turns("One?", "red", "Two?", " \n")},
            record("echo", question="Say cheese.", answer=" Say cheese. "),
            record("stop", answer="It is</s> a car."),
            record("gone", answer="It is</s> a car.", image="gone.jpg"),  # unusable, which is enough
        ]
        found = findings_of(check(records))
        assert {kind: [each.record for each in finding.examples] for kind, finding in found.items()} == {
            "answer-repeats-question": [1],
            "empty-answer": [0],
            "image-missing": [3],
            "stop-marker-in-answer": [2],
        }
        assert found["stop-marker-in-answer"].examples[0].reason == "an answer holds '</s>'."

    def test_pictures(self, check, tmp_path):
        Image.new("RGB", (900, 30)).save(tmp_path / "long.png")
        Image.new("RGB", (15, 300)).save(tmp_path / "tiny.png")
        found = findings_of(check([record(n, image=f"{n}.png") for n in ("long", "tiny")], image_folder=tmp_path))
        assert found["long-image"].examples[0].reason == "long.png is 900 x 30 pixels."
        assert found["tiny-image"].examples[0].reason == "tiny.png is 15 x 300 pixels."

    def test_what_is_cut_off(self, check):
        entry = {"conversations": turns("One?", "red " * 5, "<image>Two?", "blue " * 200), "image": "landscape.jpg"}
        entry["id"] = "long"
        found = findings_of(check([record("short"), entry], max_length=200))
        assert (found["cut-off"].num_records, found["cut-off"].examples[0].id) == (1, "long")
        assert "1 of 2 answers and 0 of 1 images stay." in found["cut-off"].examples[0].reason
        dropped = findings_of(check([record("short"), entry], max_length=200, truncation="drop"))
        assert (dropped["dropped"].severity, dropped["dropped"].num_records) == ("warning", 1)
        refused = findings_of(check([record("short"), entry], max_length=200, truncation="error"))
        assert (refused["too-long"].severity, refused["too-long"].num_records) == ("error", 1)

    def test_a_prefix_makes_records_longer(self, check):
        plain, longer = check([record("a")]), check([record("a")], prompt_prefix="Answer briefly. ")
        assert longer.columns["tokens"][0] > plain.columns["tokens"][0]

    def test_skip_makes_warnings_of_what_the_run_finds(self, check, folder):
        records = [record("fine"), record("gone", image="gone.jpg"), record("half", image="truncated.jpg")]
        for level, late in [("header", "error"), ("decode", "warning")]:
            found = check(records, image_folder=folder, check_images=level)
            severities = {kind: each.severity for kind, each in findings_of(found, on_bad_sample="skip").items()}
            assert severities == {"image-missing": "warning", "image-truncated": late}
        nothing_left = check(records[1:2], image_folder=folder)
        assert findings_of(nothing_left, on_bad_sample="skip")["image-missing"].severity == "error"

    def test_few_records_are_named_many_are_counted(self):
        tally = Tally()
        for index in range(1000):
            tally.add(index, str, "")
        assert len(tally.indices) == 1000
        assert len(tally.examples) == 20


class TestWrongRequests:
    def test_no_vision_tower(self, check):
        with pytest.raises(UserError, match=r"the model has no vision tower\. Pass --vision_tower"):
            check([record(image="a.jpg")], geometry=None)

    def test_no_folder(self, check, tmp_path):
        with pytest.raises(UserError, match=r"a relative path, but there is no image folder. Pass --image_folder"):
            check([record(image="a.jpg")], image_folder=None)
        with pytest.raises(UserError, match=r"is not a directory, but .* has images in it"):
            check([record(image="a.jpg")], image_folder=tmp_path / "no")
        assert check([record()], image_folder=None).unusable() == {}
