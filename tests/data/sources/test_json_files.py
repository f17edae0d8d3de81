"""JSON files: read in parts, the same records whatever the size of the window, and one clear error for each fault."""

import base64
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_ft.data.records import parse_record
from llava_ft.data.sources import base, json_files
from llava_ft.data.sources.open import open_source
from llava_ft.errors import ImageError, UserError

TALK = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def opened(path, tmp_path):
    source = open_source(path)
    source.prepare(tmp_path / "cache")
    return source


def read_all(path, tmp_path):
    source = opened(path, tmp_path)
    return list(source.read(0, len(source)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([{"a": 1}, {"b": "\u2028é"}])),
        ("a.json", "\ufeff" + json.dumps([{"a": 1}, {"b": "\u2028é"}], ensure_ascii=False, indent=1)),
        ("a.data", ' \n[{"a": 1}\n,\n{"b": "\u2028é"}\n]\n\n'),
        ("a.jsonl", '{"a": 1}\n\n{"b": "\u2028é"}\r\n'),
        ("a.jsonl", '\ufeff{"a": 1}\n \n{"b": "\u2028é"}\n\n'),
        ("a.JSONL", '{"a": 1}\n{"b": "\u2028\\u00e9"}'),
        ("a.ndjson", '{"a": 1}\n{"b": "\u2028\\u00e9"}'),
    ],
)
def test_records(name, text, tmp_path):
    assert read_all(write(tmp_path, name, text), tmp_path) == [{"a": 1}, {"b": "\u2028é"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "a.json is empty. It needs at least one record"),
        ("a.json", "\ufeff \n", "a.json is empty"),
        ("a.jsonl", " \n \n", "a.jsonl is empty"),
        ("a.json", "[]", "a.json holds no record"),
        ("a.json", '{"id": 1}', "a.json begins with '{', so it does not hold a list .* if it holds one record"),
        ("a.json", "null", "a.json begins with 'n'"),
        ("a.json", '[{"id": 1}, {"id', r"not valid JSON \(line 1, column 14\): .* It looks truncated"),
        ("a.json", '[{"id": 1},\n {"id": 2}', r"\(line 2, column 11\): .* It looks truncated"),
        ("a.json", "[", r"\(line 1, column 2\): Expecting value. It looks truncated"),
        ("a.json", "[{'id': 1}]", r"\(line 1, column 3\): Expecting property name"),
        ("a.json", "[1, 2,\n ]", r"\(line 1, column 6\): No record follows this comma\.$"),
        ("a.json", "[1 2]", r"\(line 1, column 4\): Expecting ',' delimiter\.$"),
        ("a.json", "[1]\n é]", r"\(line 2, column 2\): Extra data\.$"),
        ("a.json", '["é", "ü" x]', r"\(line 1, column 11\): Expecting ',' delimiter"),
        ("a.json", b"[{\"id\": \"\xff\"}]", r"a.json is not UTF-8 text \(byte 9\)"),
        ("a.json", b"\xff\xfe[\x001\x00]\x00", r"a.json is not UTF-8 text \(byte 0\)"),
        ("a.json", b"[\"a\xc3", r"a.json is not UTF-8 text \(byte 3\)"),
        ("a.json", "[" * 100_000, "a.json cannot be read as JSON"),
        ("a.json", "[" + "1" * 5000 + "]", "a.json cannot be read as JSON: Exceeds the limit"),
        ("a.jsonl", '{"id": 1}\n{"id": 2\n', "line 2: not valid JSON: Expecting ',' delimiter at column 9"),
        ("a.jsonl", '\ufeff [\n{"id": 1}\n]', "a.jsonl holds one JSON list, not one record"),
        ("a.jsonl", '[{"id": 1}, {"id": 2}]', "a.jsonl holds one JSON list, not one record"),
        ("a.jsonl", b'{"id": 1}\n{"id": "\xff"}', r"a.jsonl is not UTF-8 text \(byte 18\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("window", [1 << 22, 20])
def test_bad_file(name, text, message, window, tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", window)
    with pytest.raises(UserError, match=message):
        read_all(write(tmp_path, name, text), tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".npy"] == []


def test_missing_file_folder_and_pipe(tmp_path):
    with pytest.raises(UserError, match=r"none.json does not exist. Check --data_path"):
        open_source(tmp_path / "none.json").fingerprint()
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe.json is a pipe or a device, .* Write the records to a file"):
        open_source(tmp_path / "pipe.json").fingerprint()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    records=st.lists(json_values, min_size=1, max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    window=st.integers(1, 64),
    block=st.integers(1, 64),
    has_lines=st.booleans(),
)
def test_records_do_not_depend_on_the_window(tmp_path_factory, records, indent, ascii_only, window, block, has_lines):
    tmp_path = tmp_path_factory.mktemp("window")
    if has_lines:
        assume(not isinstance(records[0], list))
        text = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    else:
        text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
    path = write(tmp_path, "a.jsonl" if has_lines else "a.json", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_CHUNK_BYTES", window)
        patch.setattr(json_files, "_BLOCK_BYTES", block)
        source = opened(path, tmp_path)
        assert len(source) == len(records)
        assert list(source.read(0, len(records))) == records
        for index, record in enumerate(records):
            assert list(source.read(index, index + 1)) == [record]
        assert list(source.read(1, len(records))) == records[1:]


def test_a_fault_early_in_a_large_file_does_not_read_the_rest(tmp_path, monkeypatch):
    text = '[{"id": 1},\n {"id": oops},\n' + "1,\n" * 100_000 + "1]"
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", 1024)
    read = []

    class Watched:
        def __init__(self, file):
            self.file = file

        def read(self, size):
            read.append(self.file.read(size))
            return read[-1]

        def tell(self):
            return self.file.tell()

    path = write(tmp_path, "a.json", text)
    with path.open("rb") as file, pytest.raises(UserError, match=r"line 2, column 9\): Expecting value\.$"):
        json_files.scan_list(Watched(file), path)
    assert sum(map(len, read)) <= 4096


def test_the_index_is_built_once_and_read_by_several(tmp_path, monkeypatch):
    records = [{"id": number, "text": "é" * number} for number in range(300)]
    path = write(tmp_path, "a.json", json.dumps(records, ensure_ascii=False))
    source = opened(path, tmp_path)
    monkeypatch.setattr(json_files, "scan_list", lambda *_: pytest.fail("scanned again"))
    copies = [pickle.loads(pickle.dumps(source)) for _ in range(3)]
    assert len(pickle.dumps(source)) < 1000
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda part: list(copies[part].read(100 * part, 100 * part + 100)), range(3)))
    assert [*parts[0], *parts[1], *parts[2]] == records
    assert len(opened(path, tmp_path)) == 300


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    first = open_source(write(tmp_path, "a.json", "[1]")).fingerprint()
    assert open_source(write(tmp_path, "b.json", "[1]")).fingerprint() == first
    assert open_source(write(tmp_path, "a.json", "[2]")).fingerprint() != first


def test_files_of_the_other_kind_are_searched_anew(tmp_path):
    write(tmp_path, "a.json", "[1]")
    lines = write(tmp_path, "b.jsonl", '{"b": 1}')
    assert len(opened(tmp_path / "*.json*", tmp_path)) == 2
    lines.rename(tmp_path / "b.json")
    with pytest.raises(UserError, match="does not hold a list"):
        opened(tmp_path / "*.json*", tmp_path)


def test_a_long_search_is_announced(tmp_path, monkeypatch, caplog):
    path = write(tmp_path, "a.json", "[1]")
    opened(write(tmp_path, "b.json", "[2]"), tmp_path)
    monkeypatch.setattr(base, "_BYTES_WORTH_A_NOTE", 3)
    with caplog.at_level("INFO"):
        opened(path, tmp_path)
        opened(path, tmp_path)
    assert [record.message for record in caplog.records] == [f"Finding the records of {path} (0.0 GB), once."]


def test_a_file_that_changes_is_not_read_on(tmp_path):
    path = write(tmp_path, "a.json", "[1, 2]")
    source = opened(path, tmp_path)
    write(tmp_path, "a.json", "[1, 2, 3]")
    with pytest.raises(UserError, match="changed after it was first read"):
        list(source.read(0, 1))


def test_a_file_that_changes_while_it_is_searched_gets_no_index(tmp_path, monkeypatch):
    path, scan = write(tmp_path, "a.json", "[1, 2]"), json_files.scan_list

    def scan_and_change(file, name):
        found = scan(file, name)
        write(tmp_path, "a.json", "[1, 2, 3]")
        return found

    monkeypatch.setattr(json_files, "scan_list", scan_and_change)
    with pytest.raises(UserError, match="changed after it was first read"):
        opened(path, tmp_path)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written to .* --data_cache_dir"):
        opened(write(tmp_path, "a.json", "[1]"), tmp_path)


def test_a_lost_index(tmp_path):
    source = opened(write(tmp_path, "a.json", "[1]"), tmp_path)
    for file in Path(tmp_path / "cache").rglob("*.npy"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"missing or damaged .* Start again"):
        len(source)
    assert list(opened(tmp_path / "a.json", tmp_path).read(0, 1)) == [1]


def test_images_in_the_file(tmp_path):
    good = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    records = [{"image": "a.png", "conversations": TALK}, {"image": ["a.png", good], "conversations": TALK}]
    records.append({"image": good[:-1] + "*", "conversations": TALK})
    source = opened(write(tmp_path, "a.json", json.dumps(records)), tmp_path)
    assert parse_record(records[1], 1).images == ("a.png", "embedded:1/1")
    assert source.image_bytes(1, 1) == b"picture"
    with pytest.raises(ImageError, match=r"'embedded:2/0 of .*a.json' is not base64 text") as caught:
        source.image_bytes(2, 0)
    assert caught.value.kind == "image-corrupt"
