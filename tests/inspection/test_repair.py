"""The repaired copy: only what is unambiguous is changed, and what is written passes the check."""

import base64
import copy
import json
import re
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llava_ft.errors import UserError
from llava_ft.inspection import check_source as check_module
from llava_ft.inspection.check_source import check_source
from llava_ft.inspection.findings import find_all
from llava_ft.inspection.repair import REPAIRS, check_target, write_fixed
from tests.data.conftest import SOURCES, record
from tests.data.test_bad_records import MALFORMED
from tests.data.test_text_properties import json_values
from tests.data.test_text_properties import records as any_records


@pytest.fixture
def fix(write, make_plan, tmp_path):
    """Check records and write what can be used; give the report and what was written."""

    def run(records, name="fixed.jsonl", **options):
        plan = make_plan(**options)
        target = tmp_path / name
        report = write_fixed(check_source(write(records), plan), target, plan)
        text = target.read_text(encoding="utf-8")
        written = (
            json.loads(text)
            if target.suffix == ".json"
            else [json.loads(line) for line in text.rstrip("\n").split("\n")]
        )
        return report, written

    return run


def said(*pairs, **extra):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **extra}


ASKED = [("human", "What?"), ("gpt", "A car.")]
REPAIRABLE = {
    "roles of another program": (
        said(("user", "What?"), ("assistant", "A car.")),
        said(*ASKED),
        ["roles renamed"],
    ),
    "roles with capitals and blanks": (
        said(("System", "Be brief."), (" Human", "What?"), ("GPT", "A car.")),
        said(("system", "Be brief."), *ASKED),
        ["roles renamed"],
    ),
    "blank turns around": (
        said(("human", " "), ("gpt", ""), *ASKED, ("human", ""), ("human", "\n")),
        said(*ASKED),
        ["blank turns removed"],
    ),
    "a blank question before the question": (
        said(("system", "S."), ("human", ""), *ASKED),
        said(("system", "S."), *ASKED),
        ["blank turns removed"],
    ),
    "one image without placeholder": (
        said(*ASKED, image="landscape.jpg"),
        said(("human", "<image>\nWhat?"), ASKED[1], image="landscape.jpg"),
        ["<image> added to the first question"],
    ),
    "a list of one image": (
        said(*ASKED, *ASKED, image=["landscape.jpg"]),
        said(("human", "<image>\nWhat?"), ASKED[1], *ASKED, image=["landscape.jpg"]),
        ["<image> added to the first question"],
    ),
    "two at once": (
        said(("user", "What?"), ("assistant", "A car."), id=7, note={"kept": True}, image="landscape.jpg"),
        said(("human", "<image>\nWhat?"), ASKED[1], id=7, note={"kept": True}, image="landscape.jpg"),
        ["roles renamed", "<image> added to the first question"],
    ),
}
LEFT_ALONE = {
    "two images without placeholder": said(*ASKED, image=["landscape.jpg", "landscape.jpg"]),
    "placeholders without images": said(("human", "<image>What?"), ASKED[1]),
    "two placeholders, one image": said(("human", "<image><image>?"), ASKED[1], image="landscape.jpg"),
    "a placeholder in the answer": said(ASKED[0], ("gpt", "<image>"), image="landscape.jpg"),
    "an image that is missing": said(*ASKED, image="gone.jpg"),
    "an unknown role": said(("alice", "What?"), ("bob", "A car.")),
    "a blank turn in the middle": said(*ASKED, ("human", ""), ("human", "Why?"), ("gpt", "So.")),
    "two questions": said(ASKED[0], *ASKED),
    "no answer": said(ASKED[0]),
    "nothing": said(),
    "no turns": {"id": 3},
    "half a character": said(("human", "\ud83d"), ASKED[1]),
}


class TestRepairs:
    @pytest.mark.parametrize("name", REPAIRABLE)
    def test_repaired(self, fix, name):
        before, after, names = REPAIRABLE[name]
        report, written = fix([record("fine"), before])
        assert written == [record("fine"), after]
        assert report["repaired"] == {name: [1] for name in names}
        assert report["repaired_counts"] == dict.fromkeys(names, 1)
        assert report["left_out"] == {}

    @pytest.mark.parametrize("name", LEFT_ALONE)
    def test_left_out(self, fix, name):
        report, written = fix([LEFT_ALONE[name], record("fine")])
        assert written == [record("fine")]
        assert report["repaired"] == {}
        assert sum(report["left_out"].values()) == 1

    def test_usable_records_are_written_as_they_are(self, fix):
        odd = [
            said(
                ("human", "Is it <image>?"), ("gpt", " Yes "), image=["landscape.jpg"], extra=[1.5, None, "é 😀 \u2028"]
            ),
            said(*ASKED, ("human", " ")),
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "id": 1},
            {**record("x"), "broken key": "\ud83d"},
        ]
        assert fix(odd)[1] == odd

    def test_counts(self, fix):
        records = [said(("user", f"{n}?"), ("assistant", "Yes.")) for n in range(50)] + [bad(0), bad(1), record("r")]
        report, written = fix(records, "fixed.json")
        assert len(written) == report["written"] == 51
        assert report["left_out"] == {"empty-conversation": 2}
        assert report["repaired_counts"] == {"roles renamed": 50}
        assert len(report["repaired"]["roles renamed"]) == 20


def bad(number):
    return {"id": number, "conversations": []}


class TestWhatIsWritten:
    def test_any_number_of_processes_writes_the_same(self, fix, monkeypatch):
        records = [before for before, _, _ in REPAIRABLE.values()] + list(LEFT_ALONE.values()) + [record("r")] * 20
        one = fix(records, "one.json")
        monkeypatch.setattr(check_module, "RECORDS_PER_TASK", 3)
        monkeypatch.setattr(check_module, "RECORDS_FOR_PROCESSES", 1)
        two = fix(records, "two.json", num_processes=2)
        assert one[1] == two[1]
        assert (one[0]["left_out"], one[0]["repaired"]) == (two[0]["left_out"], two[0]["repaired"])

    @pytest.mark.parametrize("name", ["fixed.json", "fixed.jsonl"])
    def test_it_passes_the_check(self, fix, check, folder, name):
        records = [before for before, _, _ in copy.deepcopy(REPAIRABLE).values()] + list(
            copy.deepcopy(LEFT_ALONE).values()
        )
        for each in records:
            if each.get("image") == "landscape.jpg":
                each["image"] = "good.jpg"
        records += [broken for broken, _, _ in MALFORMED.values()]
        records += [record("t", image="truncated.jpg"), said(("human", "long " * 3000), ("gpt", "x"))]
        report, written = fix(records, name, image_folder=folder)
        assert report["repaired"]
        again = check(written, image_folder=folder)
        assert [finding for finding in find_all(again, "error") if finding.severity == "error"] == []

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(entries=st.lists(any_records | json_values, max_size=5))
    def test_anything_that_json_holds(self, fix, check, tmp_path, entries):
        (tmp_path / "fixed.jsonl").unlink(missing_ok=True)
        try:
            _, written = fix([record("fine"), *entries])
        except UnicodeEncodeError:
            return
        assert check(written).unusable() == {}

    def test_images_inside_the_text_stay(self, fix, check):
        content = base64.b64encode((SOURCES / "landscape.jpg").read_bytes()).decode()
        records = [record("inside", image=f"data:image/jpeg;base64,{content}"), bad(1)]
        assert fix(records)[1] == records[:1]

    def test_nothing_with_images_for_a_model_without_vision_tower(self, fix):
        broken = said(("user", "<image>What?"), ("assistant", "A car."), image="landscape.jpg")
        report, written = fix([record("fine"), broken], geometry=None)
        assert (report["left_out"], written) == ({"unknown-role": 1}, [record("fine")])

    def test_the_original_stays(self, fix, tmp_path):
        fix([record("fine"), bad(1)])
        assert json.loads((tmp_path / "records.json").read_text()) == [record("fine"), bad(1)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "fixed.jsonl", "records.json"]

    def test_nothing_usable(self, fix, tmp_path):
        with pytest.raises(UserError, match=r"None of the 2 records can be used, so .*fixed.jsonl is not written"):
            fix([bad(1), bad(2)])
        assert not (tmp_path / "fixed.jsonl").exists()


class TestTargets:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("out.csv", r"must end in .json \(one list\) or .jsonl"),
            ("here.json", "is the data itself. Nothing is overwritten"),
            ("there.json", "exists already. Nothing is overwritten; name another file"),
            ("no/out.json", "is not a folder. Make it first"),
        ],
    )
    def test_refused(self, tmp_path, name, message):
        (tmp_path / "here.json").touch()
        (tmp_path / "there.json").touch()
        with pytest.raises(UserError, match=message):
            check_target(tmp_path / name, [str(tmp_path / "here.json")])

    def test_records_with_bytes(self, write, make_plan, tmp_path):
        content = (SOURCES / "landscape.jpg").read_bytes()
        rows = [record("a", question="<image>What?") | {"image": {"bytes": content, "path": "a.jpg"}}]
        path = tmp_path / "rows.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        plan = make_plan()
        check = check_source(write(None, path.name), plan)
        assert check.unusable() == {}
        assert check.images.decoded[0].num_bytes == len(content)
        with pytest.raises(UserError, match=r"record 0 of .* holds more than text: the images in it would be lost"):
            write_fixed(check, tmp_path / "out.json", plan)
        assert not Path(tmp_path / "out.json").exists()


def test_every_repair_is_documented():
    page = (Path(__file__).parents[2] / "docs/how-to/check-data.md").read_text()
    for name in REPAIRS:
        assert re.search(rf"^\| `{re.escape(name)}` \|", page, re.M), name
