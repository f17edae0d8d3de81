"""The examples in the pages about data are what the program reads."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from llava_ft.data.records import Turn, parse_record
from llava_ft.data.sources.mixture import open_mixture
from llava_ft.data.sources.open import open_source
from llava_ft.data.sources.selection import select_rows
from llava_ft.errors import BadSampleError

DOCS = Path(__file__).parents[3] / "docs"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


RECORDS = [json.loads(block) for block in blocks("reference/data-format.md", "json")]


def test_records():
    samples = [parse_record(record, index) for index, record in enumerate(RECORDS)]
    llava, messages, pairs, weights, parts, inline = samples
    assert llava.images == messages.images == ("coco/train2017/000000033471.jpg",)
    assert llava.turns[:2] == messages.turns
    assert messages.system == "Answer in one sentence."
    assert pairs.turns[0].text == "<image>\nWhich part is the crust?"
    assert [turn.weight for turn in weights.turns] == [1, 0, 1, 1]
    assert parts.images == ("left.png", "right.png", "/data/third.png")
    assert [turn.text.count("<image>") for turn in parts.turns] == [2, 0, 1, 0]
    assert inline.images == ("embedded:5/0",)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_records_as_files(suffix, tmp_path):
    text = json.dumps(RECORDS) if suffix == ".json" else "\n".join(map(json.dumps, RECORDS))
    (tmp_path / f"chats{suffix}").write_text(text)
    source = open_source(tmp_path / f"chats{suffix}")
    source.prepare(tmp_path / "cache")
    assert list(source.read(0, len(source))) == RECORDS
    picture = Image.open(io.BytesIO(source.image_bytes(5, 0)))
    assert picture.getpixel((0, 0)) == (255, 0, 0)


def test_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (28, 28)).save("digit.png")
    (example,) = blocks("reference/data-format.md", "python")
    exec(example, {})
    for path in ("digits", "digits.parquet"):
        source = open_source(path)
        source.prepare(tmp_path / "cache")
        (record,) = source.read(0, 1)
        sample = parse_record(record, 0)
        assert sample.turns == (Turn("human", "<image>\nWhich digit is it?"), Turn("gpt", "A seven."))
        assert source.image_bytes(0, 0) == Path("digit.png").read_bytes()


def test_tar_shards(tmp_path):
    (listing,) = blocks("reference/data-format.md", "text")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (line.split()[0] for line in listing.splitlines()):
            record = {"conversations": [{"from": "human", "value": "<image>" * (1 + ("2." in name))}]}
            data = {"json": json.dumps(record), "txt": "A caption."}.get(name.rpartition(".")[2], name).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(tmp_path / "a.tar")
    source.prepare(tmp_path / "cache")
    samples = [parse_record(record, index) for index, record in enumerate(source.read(0, 3))]
    assert [(sample.id, len(sample.images)) for sample in samples] == [("000001", 1), ("000002", 2), ("000003", 1)]
    assert source.image_bytes(1, 1) == b"000002.1.png"
    assert samples[2].turns[1].text == "A caption."


def test_kinds_are_listed():
    """Each kind that the checks of a record can give has a line in the table."""
    page = (DOCS / "reference/data-format.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", page[page.index("## Records that cannot be used") :]))
    named = set(re.findall(r'"([a-z]+(?:-[a-z]+)+)"', str(parse_record.__doc__)))
    assert len(named) > 15
    assert named <= listed
    with pytest.raises(BadSampleError) as caught:
        parse_record(None, 0)
    assert caught.value.kind in named


def test_mixtures(tmp_path):
    mixtures = []
    for number, text in enumerate(blocks("how-to/mixture.md", "yaml")):
        (tmp_path / f"{number}.yaml").write_text(text)
        mixtures.append(open_mixture(tmp_path / f"{number}.yaml"))
    first, weighted, kept = mixtures
    assert [entry.path for entry in first.entries][::2] == ["llava_v1_5_mix665k.json", "documents"]
    assert first.entries[1].prompt_prefix == "Answer with one sentence. "
    chosen = select_rows([10_000, 45_000, 70_000], weighted, 0)
    assert [len(rows) for rows in chosen.train] == [60_000, 30_000, 10_000]
    assert [len(set(rows)) for rows in chosen.train] == [10_000, 30_000, 10_000]
    chosen = select_rows([1000, 1000], kept, 0)
    assert [len(rows) for rows in chosen.held_out] == [20, 500]
    assert [len(rows) for rows in chosen.train] == [980, 1500]


def test_prefixes():
    rows = re.findall(
        r"^\| `([^`]*)` \| `(Briefly: [^`]*|<image>⏎Briefly[^`]*)` \|$", (DOCS / "how-to/mixture.md").read_text(), re.M
    )
    assert len(rows) == 3
    for before, after in rows:
        turns = [{"from": "human", "value": before.replace("⏎", "\n")}]
        sample = parse_record({"conversations": turns}, 0, "Briefly: ")
        assert sample.turns[0].text == after.replace("⏎", "\n")
