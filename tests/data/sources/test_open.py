"""What a path means, and several files read as one."""

import json
import subprocess
import sys

import pytest

from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.data_path import is_mixture
from llava_ft.data.sources.open import open_source
from llava_ft.errors import UserError


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))


def test_several_json_files_are_one_source(tmp_path):
    for shard in range(3):
        write(tmp_path / f"{shard}.jsonl", [{"id": 10 * shard + number} for number in range(shard + 1)])
    write(
        tmp_path / "1.jsonl",
        [{"image": "data:image/png;base64,YQ==", "conversations": [{"from": "human", "value": "x"}]}],
    )
    source = open_source(f"{tmp_path}/*.jsonl", image_folder="pictures")
    source.prepare(tmp_path / "cache")
    assert source.image_folder == "pictures"
    assert len(source) == 5
    records = list(source.read(0, 5))
    assert [record.get("id") for record in records] == [0, None, 20, 21, 22]
    for start in range(5):
        for stop in range(start, 6):
            assert list(source.read(start, min(stop, 5))) == records[start:stop]
    assert source.image_bytes(1, 0) == b"a"
    first = source.fingerprint()
    write(tmp_path / "0.jsonl", [{"id": 1}])
    assert open_source(f"{tmp_path}/*.jsonl").fingerprint() != first


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.json", r"none.json does not exist. Check --data_path"),
        ("none.parquet", r"none.parquet does not exist"),
        ("*.jsonl", r"\*.jsonl matches no file"),
        ("a.[jp]*[nt]", r"stands for files of several kinds \(.json, .parquet\). Name one kind"),
        ("{0..3}.json", r"stands for 4 files, and 4 of them do not exist; the first is .*0.json"),
        ("{3..0}.json", r"the range \{3..0\} has to go upwards"),
        ("{0..999}{0..999}.json", r"stands for 1000000 files; at most 100000"),
        ("empty", r"is a folder\. Give the .json or .jsonl file itself"),
        ("a.json:train", r"does not exist"),
        ("mix.yaml", r"is a mixture. A mixture cannot be part of another"),
        ("a.json.gz", r"a.json.gz is compressed \(.gz\)"),
    ],
)
def test_paths_that_are_refused(path, message, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.json", "a.parquet", "mix.yaml", "a.json.gz"):
        (tmp_path / name).write_text("[1]")
    with pytest.raises(UserError, match=message):
        open_source(f"{tmp_path}/{path}")


def test_names_that_are_neither_file_nor_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("/none", "./none", "a/b/c", "none.json", "-x y"):
        with pytest.raises(UserError, match="does not exist"):
            open_source(name)


def test_two_splits_are_refused(tmp_path):
    with pytest.raises(UserError, match="owner/set:test names a split, and 'train' is asked for"):
        open_source("owner/set:test", split="train")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        open_source(tmp_path / ("x" * 300))


def test_a_json_file_has_no_splits(tmp_path):
    write(tmp_path / "a.json", [[1]])
    with pytest.raises(UserError, match=r"a.json has no splits, but 'train' is asked for. Leave it out"):
        open_source(tmp_path / "a.json", split="train")


def test_one_file_in_a_range(tmp_path):
    write(tmp_path / "07.json", [[1]])
    source = open_source(f"{tmp_path}/{{07..07}}.json")
    source.prepare(tmp_path / "cache")
    assert isinstance(source, RecordSource)
    assert list(source.read(0, 1)) == [1]


def test_names_of_mixtures():
    assert [is_mixture(name) for name in ("a.yaml", "b/A.YML", "a.json", "yaml")] == [True, True, False, False]


def test_only_what_reads_the_files_is_loaded(tmp_path):
    (tmp_path / "records.json").write_text('[{"id": 1}]')
    code = (
        "import sys; from pathlib import Path; from llava_ft.data.sources.data_path import DataSources; "
        "data = DataSources.open('records.json', Path('cache')); assert len(data.sources[0]) == 1; "
        "print(*sorted(name.rpartition('.')[2] for name in sys.modules if name.startswith('llava_ft.data.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not {"mixture", "selection", "tables", "tar_shards", "features"} & set(done.stdout.split())
    assert "json_files" in done.stdout.split()
