"""Tables: each kind gives the same records, and images stay where they are until asked for."""

import io
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image as Picture

from llava_ft.data.records import EmbeddedImage, parse_record
from llava_ft.data.sources import tables
from llava_ft.data.sources.open import open_source
from llava_ft.errors import UserError

FEATURES = Features(
    {
        "id": Value("int64"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "embedding": List(Value("float32")),
    }
)


def png(grey):
    buffer = io.BytesIO()
    Picture.fromarray(np.full((4, 6, 3), grey, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def table(tmp_path):
    """Five rows: two images each in odd ones, one of them by path."""
    path = tmp_path / "a.png"
    path.write_bytes(png(9))

    def row(number):
        images = [{"bytes": png(number), "path": "old.png"}, {"bytes": None, "path": str(path)}] if number % 2 else []
        question = "<image>\n" * len(images) + f"What is {number}?"
        return {
            "id": number,
            "images": images,
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"{number}."}],
            "embedding": [0.5],
        }

    return Dataset.from_list([row(number) for number in range(5)], features=FEATURES)


def write_stream(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_file(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_parquet(table, path):
    pa.parquet.write_table(table, path, row_group_size=2)


def write_saved(table, path):
    Dataset(table).save_to_disk(path)


def opened(path, tmp_path, **options):
    source = open_source(path, **options)
    source.prepare(tmp_path / "cache")
    return source


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_parquet, "a.parquet"),
        (write_stream, "a.arrow"),
        (write_file, "a.arrow"),
        (write_file, "a.feather"),
        (write_saved, "saved"),
    ],
)
def test_every_kind_gives_the_same_records(write, name, table, tmp_path):
    write(table.data.table, tmp_path / name)
    source = opened(tmp_path / name, tmp_path)
    assert len(source) == 5
    source = pickle.loads(pickle.dumps(source))
    samples = [parse_record(record, index) for index, record in enumerate(source.read(0, 5))]
    assert [sample.id for sample in samples] == list("01234")
    assert samples[2].images == ()
    by_path = "embedded:3/1" if write is write_saved else str(tmp_path / "a.png")  # Saving takes files in.
    assert samples[3].images == ("embedded:3/0", by_path)
    assert samples[3].turns[0].text == "<image>\n<image>\nWhat is 3?"
    assert source.image_bytes(3, 0) == png(3)
    assert list(source.read(2, 4)) == list(source.read(0, 5))[2:4]
    assert "embedding" not in next(source.read(0, 1))


def mapped_kib():
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_images_are_not_read_with_the_records(tmp_path):
    images = [[{"bytes": bytes(2**20), "path": "old.png"}, None] for _ in range(48)]
    write_stream(pa.table({"images": images}), tmp_path / "a.arrow")
    source = opened(tmp_path / "a.arrow", tmp_path)
    list(source.read(0, 1))
    before = mapped_kib()
    records = list(source.read(0, 48))
    assert records[7]["images"] == [{"bytes": EmbeddedImage(("images", 0, "bytes")), "path": "old.png"}, None]
    assert mapped_kib() - before < 8 * 1024
    for row in range(48):
        source._image_content(row, records[row]["images"][0]["bytes"], "")
    assert mapped_kib() - before > 40 * 1024


def test_a_second_start_converts_nothing(table, tmp_path, monkeypatch):
    write_parquet(table.data.table, tmp_path / "a.parquet")
    opened(tmp_path / "a.parquet", tmp_path)
    monkeypatch.setattr(Parquet, "_generate_tables", None)
    assert len(opened(tmp_path / "a.parquet", tmp_path)) == 5


ONE_TALK = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A."}]
PART = pa.struct(
    [
        ("type", pa.string()),
        ("text", pa.string()),
        ("image", pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])),
    ]
)
PARTS = [{"type": "image", "image": {"bytes": b"two"}}, {"type": "text", "text": "What?"}]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": pa.array([None, b"one"], pa.binary()), "conversations": pa.array([ONE_TALK] * 2)}, b"one"),
        (
            {"image": pa.array([{"bytes": b"zero"}, {"bytes": b"one"}]), "conversations": pa.array([ONE_TALK] * 2)},
            b"one",
        ),
        (
            {
                "images": pa.array([[], [b"one"]], pa.list_(pa.large_binary())),
                "conversations": pa.array([ONE_TALK] * 2),
            },
            b"one",
        ),
        (
            {
                "messages": pa.array(
                    [[{"role": "user", "content": [PARTS[1]]}], [{"role": "user", "content": PARTS}]],
                    pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))])),
                )
            },
            b"two",
        ),
    ],
)
def test_binary_values_at_any_depth(columns, expected, tmp_path):
    write_parquet(pa.table(columns), tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet", tmp_path)
    (record,) = source.read(1, 2)
    assert parse_record(record, 1).images == ("embedded:1/0",)
    assert source.image_bytes(1, 0) == expected


def test_columns_of_media_are_seen(tmp_path):
    talk = [[{"role": "user", "content": "Why?"}]] * 2
    write_parquet(pa.table({"messages": talk, "videos": [None, [{"bytes": b"x"}]]}), tmp_path / "a.parquet")
    without, with_video = opened(tmp_path / "a.parquet", tmp_path).read(0, 2)
    assert parse_record(without, 0).images == ()
    with pytest.raises(UserError, match="the record has a value under 'videos'"):
        parse_record(with_video, 1)


def test_addresses_lead_back_in_slices():
    table = pa.table({"images": [[{"bytes": b"%d" % (10 * row + item)} for item in range(row)] for row in range(5)]})
    for start in range(5):
        for number, record in enumerate(tables.records_of(table.slice(start))):
            row = start + number
            for item, image in enumerate(record["images"]):
                assert tables.binary_at(table.slice(row, 1), image["bytes"].address) == b"%d" % (10 * row + item)


@pytest.mark.parametrize("name", ["shards", "shards/*.parquet", "shards/{0..1}.parquet"])
def test_shards(name, table, tmp_path):
    (tmp_path / "shards").mkdir()
    write_parquet(table.data.table.slice(0, 2), tmp_path / "shards" / "0.parquet")
    write_parquet(table.data.table.slice(2), tmp_path / "shards" / "1.parquet")
    source = opened(f"{tmp_path}/{name}", tmp_path)
    assert [record["id"] for record in source.read(0, len(source))] == [0, 1, 2, 3, 4]


def write_splits(table, folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        write_parquet(table.data.table.slice(number, 1), folder / f"{name}-00000-of-00001.parquet")
    return folder


def test_splits_of_a_folder_of_shards(table, tmp_path):
    def ids(path, **options):
        source = opened(path, tmp_path, **options)
        return [record["id"] for record in source.read(0, len(source))]

    write_splits(table, tmp_path / "both" / "data", ["test", "train"])
    assert ids(tmp_path / "both") == [1]
    assert ids(tmp_path / "both", split="test") == [0]
    assert ids(f"{tmp_path}/both:test") == [0]
    with pytest.raises(UserError, match=r"has no split 'dev'. There is: test, train"):
        ids(f"{tmp_path}/both:dev")
    with pytest.raises(UserError, match=r"names a split, and 'train' is asked for"):
        ids(f"{tmp_path}/both:test", split="train")
    write_splits(table, tmp_path / "odd", ["test", "dev"])
    with pytest.raises(UserError, match=r"has the splits dev, test. Name one, as in .*odd:dev"):
        ids(tmp_path / "odd")


def test_splits_of_a_saved_data_set(table, tmp_path):
    DatasetDict({"train": table.select([0]), "test": table.select([1, 2])}).save_to_disk(tmp_path / "saved")
    assert len(opened(tmp_path / "saved", tmp_path)) == 1
    assert len(opened(tmp_path / "saved", tmp_path, split="test")) == 2
    test = open_source(f"{tmp_path}/saved:test")
    assert test.fingerprint() != open_source(tmp_path / "saved").fingerprint()
    with pytest.raises(UserError, match=r"has no split 'dev'. There is: test, train"):
        open_source(tmp_path / "saved", split="dev").fingerprint()
    table.save_to_disk(tmp_path / "single")
    with pytest.raises(UserError, match=r"single has no splits, but 'test' is asked for"):
        open_source(tmp_path / "single", split="test").fingerprint()


def test_the_fingerprint_changes_with_the_files(table, tmp_path):
    for name in ("a", "b"):
        write_parquet(table.data.table, tmp_path / f"{name}.parquet")
    first = open_source(tmp_path / "a.parquet").fingerprint()
    assert open_source(tmp_path / "*.parquet").fingerprint() != first
    write_parquet(table.data.table.slice(1), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").fingerprint() != first


def test_tables_that_cannot_be_read(table, tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 and no more")
        with pytest.raises(UserError, match=rf"{name} cannot be read: .* Check that its files are complete"):
            opened(tmp_path / name, tmp_path)
    write_parquet(table.data.table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty.parquet cannot be read: .* no data"):
        opened(tmp_path / "empty.parquet", tmp_path)
    write_stream(table.data.table.slice(0, 0), tmp_path / "empty.arrow")
    with pytest.raises(UserError, match=r"empty.arrow holds no record"):
        opened(tmp_path / "empty.arrow", tmp_path)
    source = open_source(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"a.parquet cannot be read: No such file"):
        source.fingerprint()


def test_the_hub(table, tmp_path, monkeypatch):
    table.save_to_disk(tmp_path / "saved")
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.load_from_disk(str(tmp_path / "saved"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/set", "owner/set:test", "owner/set:config:test"):
        source = opened(name, tmp_path)
        assert len(source) == 5
        assert source.name == name
    assert open_source("owner/set", split="test").fingerprint() == source.fingerprint()
    expected = [("owner/set", None, "train"), ("owner/set", None, "test"), ("owner/set", "config", "test")]
    assert asked == [*expected, ("owner/set", None, "test")]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'owner/nothing' is neither a file or folder here .* in the cache already"):
        open_source("owner/nothing").prepare(Path("unused"))
