"""The same conversations in every form and kind of source give the same ids, labels and pixels."""

import base64
import io
import json
import mimetypes
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from llava_ft.data.preparation.prepare import PreparationSettings
from tests.data.conftest import GOLDEN, SOURCES

RECORDS = json.loads((GOLDEN / "data" / "mix.json").read_text())
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def image_list(record):
    image = record.get("image")
    return [] if image is None else [image] if isinstance(image, str) else image


def content(image):
    return (SOURCES / image).read_bytes()


def data_uri(image):
    kind = mimetypes.guess_type(image)[0]
    return f"data:{kind};base64,{base64.b64encode(content(image)).decode()}"


def as_messages(record):
    """Write the record as messages; the first question in parts, its image as a part with an address."""
    messages, images = [], iter(image_list(record))
    for turn in record["conversations"]:
        pieces = turn["value"].split("<image>")
        parts = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            parts.append({"type": "image_url", "image_url": {"url": data_uri(next(images))}})
            parts += [{"type": "text", "text": piece}] if piece else []
        messages.append({"role": ROLES[turn["from"]], "content": parts if len(pieces) > 1 else turn["value"]})
    return {"id": record["id"], "messages": messages}


def write_json(folder):
    (folder / "a.json").write_text(json.dumps(RECORDS))
    return "a.json"


def write_lines(folder):
    for number in range(2):
        (folder / f"a-{number}.jsonl").write_text("\n".join(map(json.dumps, RECORDS[number * 5 : 5 + number * 100])))
    return "a-*.jsonl"


def write_messages(folder):
    (folder / "a.json").write_text(json.dumps([as_messages(record) for record in RECORDS]))
    return "a.json"


def write_parquet(folder):
    rows = [
        {**record, "id": str(record["id"]), "image": [{"bytes": content(image)} for image in image_list(record)]}
        for record in RECORDS
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return "a.parquet"


def write_tar(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, record in enumerate(RECORDS):
            members = [(f"{number:03d}.json", json.dumps(record).encode())]
            members += [
                (f"{number:03d}.{place}.{image}", content(image)) for place, image in enumerate(image_list(record))
            ]
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return "a.tar"


def write_mixture(folder):
    write_tar(folder)
    (folder / "mix.yaml").write_text("sources:\n- path: a.tar\n")
    return "mix.yaml"


@pytest.fixture
def items(build, tmp_path):
    def run(path):
        settings = PreparationSettings(tmp_path / "cache", num_processes=1)
        dataset = build(str(path), preparation=settings, on_bad_sample="skip").train
        return [dataset[index] for index in range(len(dataset))]

    datasets.disable_progress_bars()
    yield run
    datasets.enable_progress_bars()


@pytest.mark.parametrize("write", [write_json, write_lines, write_messages, write_parquet, write_tar, write_mixture])
def test_the_same_items(write, items, tmp_path):
    expected = items(GOLDEN / "data" / "mix.json")
    found = items(tmp_path / write(tmp_path))
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in ("input_ids", "labels", "pixel_values"):
            assert (key in one) == (key in other)
            assert key not in one or torch.equal(one[key], other[key])
