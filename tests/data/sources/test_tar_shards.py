"""Tar shards: members of one key make one record, read where they are; what is damaged is named."""

import io
import json
import pickle
import tarfile

import pytest

from llava_ft.data.records import parse_record
from llava_ft.data.sources.open import open_source
from llava_ft.data.sources.tar_shards import TarSource
from llava_ft.errors import BadSampleError, ImageError, UserError


def talk(number_of_images=1, **fields):
    question = "<image>\n" * number_of_images + "What?"
    return {**fields, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A."}]}


def pack(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            if isinstance(content, dict | list):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(path, tmp_path):
    source = open_source(path)
    source.prepare(tmp_path / "cache")
    return source


def one(tmp_path, *members):
    source = opened(pack(tmp_path / "a.tar", members), tmp_path)
    (record,) = source.read(0, len(source))
    return source, record


def test_records_of_several_shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        members = [(f"{number:04d}.json", talk()) for number in numbers]
        members += [(f"{number:04d}.jpg", b"image %d" % number) for number in numbers]
        pack(folder / f"s-{shard:03d}.tar", [*members, ("README.md", "no record"), (".hidden.json", "")])
    for name in ("shards", "shards/*.tar", "shards/s-{000..002}.tar"):
        source = opened(f"{tmp_path}/{name}", tmp_path)
        assert len(source) == 12
    source = pickle.loads(pickle.dumps(source))
    samples = [parse_record(record, index) for index, record in enumerate(source.read(0, 12))]
    assert [sample.id for sample in samples] == [f"{number:04d}" for number in range(12)]
    assert [sample.images for sample in samples] == [(f"embedded:{number}/0",) for number in range(12)]
    assert list(source.read(3, 9)) == list(source.read(0, 12))[3:9]
    assert [source.image_bytes(number, 0) for number in range(12)] == [b"image %d" % number for number in range(12)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(form, tmp_path):
    key = "folder.with.dots/" + "ä" * 40 + "/x"
    path = pack(tmp_path / "a.tar", [(f"{key}.json", talk()), (f"{key}.png", b"image")], format=form)
    source = opened(path, tmp_path)
    (record,) = source.read(0, 1)
    assert parse_record(record, 0).id == key
    assert source.image_bytes(0, 0) == b"image"


def contents(source, record):
    return [source.image_bytes(0, place) for place in range(len(parse_record(record, 0).images))]


def test_images_in_the_order_of_their_names(tmp_path):
    members = [("x.10.jpg", b"ten"), ("x.2.jpg", b"two"), ("x.json", talk(3)), ("x.1.JPG", b"one")]
    assert contents(*one(tmp_path, *members)) == [b"one", b"two", b"ten"]


def test_images_in_the_order_the_record_names_them(tmp_path):
    members = [("f/x.1.jpg", b"one"), ("f/x.2.jpg", b"two"), ("f/x.json", talk(2, image=["f/x.2.jpg", "x.1.jpg"]))]
    assert contents(*one(tmp_path, *members)) == [b"two", b"one"]


def test_a_path_from_before_packing_is_passed_over(tmp_path):
    source, record = one(tmp_path, ("x.json", talk(image="coco/1.jpg", id=7)), ("x.jpg", b"one"))
    assert parse_record(record, 0).id == "7"
    assert contents(source, record) == [b"one"]


def test_a_record_may_name_files_outside(tmp_path):
    _, record = one(tmp_path, ("x.json", talk(image="coco/1.jpg")))
    assert parse_record(record, 0).images == ("coco/1.jpg",)


def test_parts_of_messages_name_members(tmp_path):
    parts = [{"type": "image", "image": "x.b.png"}, {"type": "text", "text": "?"}, {"type": "image", "path": "x.a.png"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A."}]
    source, record = one(tmp_path, ("x.json", {"messages": messages}), ("x.a.png", b"a"), ("x.b.png", b"b"))
    assert contents(source, record) == [b"b", b"a"]


def test_captions(tmp_path):
    source, record = one(tmp_path, ("x.txt", "\ufeffA cat.\n"), ("x.webp", b"cat"))
    sample = parse_record(record, 0)
    assert [turn.text for turn in sample.turns] == ["<image>", "A cat."]
    assert contents(source, record) == [b"cat"]


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        ([("x.json", "{"), ("x.jpg", b"1")], "bad-member", r"\(id 'x'\): its .json is not valid JSON: Expecting"),
        ([("x.json", b"\xff")], "bad-member", "its .json is not valid JSON: .* decode"),
        ([("x.txt", b"\xff"), ("x.jpg", b"1")], "bad-member", r"its .txt is not UTF-8 text \(byte 0\)"),
        ([("x.jpg", b"1")], "bad-member", "holds an image for it, but not a .json or .txt"),
        ([("x.txt", "A cat.")], "bad-member", "holds a .txt for it, but not an image"),
        ([("x.json", "{}"), ("x.b.json", "{}")], "bad-member", r"several texts .*: x.b.json, x.json"),
        ([("x.json", "{}"), ("x.jpg", b"1"), ("x.jpg", b"2")], "bad-member", "two members of one name"),
        ([("x.json", "[1]")], "not-an-object", "the record is a list of 1"),
    ],
)
def test_one_bad_record_does_not_stop_its_neighbours(members, kind, message, tmp_path):
    source = opened(pack(tmp_path / "a.tar", [("a.json", talk(0)), *members, ("z.json", talk(0))]), tmp_path)
    first, bad, last = source.read(0, 3)
    assert [parse_record(first, 0).id, parse_record(last, 2).id] == ["a", "z"]
    with pytest.raises(BadSampleError, match=message) as caught:
        parse_record(bad, 1)
    assert caught.value.kind == kind


def test_an_empty_image(tmp_path):
    source, _ = one(tmp_path, ("x.json", talk()), ("x.jpg", b""))
    with pytest.raises(ImageError, match=r"'embedded:0/0 of .*a.tar' is an empty file"):
        source.image_bytes(0, 0)


@pytest.mark.parametrize("kept", [1, 100, 512, 600, 1024, 1500, 2048, 2560])
def test_truncated_shards(kept, tmp_path):
    path = pack(tmp_path / "a.tar", [("x.json", talk()), ("x.jpg", b"1" * 600)])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"Shard .*a.tar is (truncated|not a tar|damaged)"):
        opened(path, tmp_path)


def test_a_fault_in_the_middle(tmp_path):
    path = pack(tmp_path / "a.tar", [("x.json", "{}"), ("y.json", "{}"), ("z.json", "{}")])
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"?" * 76
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.tar is damaged: no member starts where one should"):
        opened(path, tmp_path)


def test_a_disk_that_fails_while_a_shard_is_walked_through(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    pack(tmp_path / "a.tar", [("1.json", json.dumps(talk(0)).encode())])
    monkeypatch.setattr(tarfile, "open", fail)
    with pytest.raises(UserError, match=r"a.tar cannot be read: Input/output error"):
        opened(tmp_path / "a.tar", tmp_path)


def test_compressed_shards_links_and_empty_ones_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.json"))
    with pytest.raises(UserError, match=r"a.tar is compressed \(gzip\).* Unpack it to a plain .tar"):
        opened(tmp_path / "a.tar", tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match=r"a.tar.gz is compressed \(.gz\)"):
        open_source(tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        link = tarfile.TarInfo("x.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"holds 'x.jpg', which is a link or not a plain file"):
        opened(tmp_path / "b.tar", tmp_path)
    with pytest.raises(UserError, match=r"c.tar holds no record. Its shards need members such as"):
        opened(pack(tmp_path / "c.tar", [("README", "")]), tmp_path)


def test_shards_are_walked_once(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.tar", [("x.json", talk(0))])
    opened(path, tmp_path)
    monkeypatch.setattr(TarSource, "_find_records", lambda _: pytest.fail("walked again"))
    source = opened(path, tmp_path)
    pack(path, [("x.json", talk(0)), ("y.json", talk(0))])
    with pytest.raises(UserError, match=r"a.tar changed after it was first read"):
        list(source.read(0, 1))
    path.unlink()
    with pytest.raises(UserError, match=r"a.tar cannot be read: No such file"):
        list(source.read(0, 1))
