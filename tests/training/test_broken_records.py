"""Runs over data of which a part is broken: refused by default, or finished without it and with a report."""

import json
import os
import shutil

import pytest
import yaml

from llava_ft.args import parse_args
from llava_ft.errors import RunError, UserError
from llava_ft.training.run import prepare_run, run_training
from tests.conftest import RECORDINGS
from tests.training.helpers import flags, write_records

GOOD_PER_SOURCE = 495
BROKEN = {
    "image-missing": {"image": "gone.png"},
    "image-corrupt": {"image": "text.png"},
    "image-empty": {"image": "empty.png"},
    "image-outside-folder": {"image": "../outside.png"},
    "image-is-url": {"image": "https://example.com/a.png"},
    "placeholder-mismatch": {"image": ["good.png", "good.png"]},
    "unknown-role": {"conversations": [{"from": "owner", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "roles-not-alternating": {"conversations": [{"from": "human", "value": "Hi"}] * 2},
    "no-supervised-token": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]},
    "bad-text": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": 7}]},
}
"""Records of ten kinds that cannot be used, by the kind of error; an image stands in the question."""

pytestmark = pytest.mark.usefixtures("in_recordings")


def conversation(name, image=None):
    question = "<image>\nWhat is it?" if image else "What is it?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"answer {name}"}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def mixture(tmp_path):
    """A mixture of two sources with 1,000 records, ten of which are broken, each in its own way."""
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(RECORDINGS / "images" / "src" / "square.png", folder / "good.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    broken = [conversation(f"broken {kind}", fields.get("image")) | fields for kind, fields in BROKEN.items()]
    for number, part in enumerate((broken[:5], broken[5:])):
        good = [conversation(f"{number}-{n}", "good.png" if n % 3 == 0 else None) for n in range(GOOD_PER_SOURCE)]
        records = [*good[:100], *part, *good[100:]]
        write_records(tmp_path / f"source{number}.json", records)
    file = tmp_path / "mixture.yaml"
    sources = [{"path": f"source{number}.json", "image_folder": "images"} for number in (0, 1)]
    file.write_text(yaml.safe_dump({"sources": sources}))
    return file


def arguments(mixture, output_dir, policy):
    changes = {"max_steps": "2", "save_strategy": "no", "image_folder": None, "on_bad_sample": policy}
    return parse_args(flags(output_dir, data_path=mixture, **changes))


def test_ten_kinds_are_refused(mixture, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare_run(arguments(mixture, tmp_path / "out", "error"))
    message = str(caught.value)
    assert "10 of 1000 records of" in message
    for kind in BROKEN:
        assert f"{kind}: 1" in message
    assert "source0.json: Sample 100 (id 'broken image-missing'): Image" in message
    assert "and 2 more" in message
    assert not (tmp_path / "out").exists()


def test_ten_kinds_are_left_out_and_reported(mixture, tmp_path, caplog):
    output_dir = tmp_path / "out"
    assert run_training(arguments(mixture, output_dir, "skip"))
    assert (output_dir / "adapter_config.json").exists()
    report = json.loads((output_dir / "data_report.json").read_text())["train"]
    assert (report["num_records"], report["num_usable"]) == (1000, 990)
    assert report["counts"] == dict.fromkeys(BROKEN, 1)
    assert report["ids_by_kind"] == {kind: [f"broken {kind}"] for kind in BROKEN}
    assert [sum(source["counts"].values()) for source in report["sources"]] == [5, 5]
    (warning,) = [message for message in caplog.messages if "cannot be used and are left out" in message]
    assert all(f"broken {kind}" in warning for kind in BROKEN)


def test_truncation_is_counted_by_id(tmp_path):
    records = [conversation("short"), conversation("long")]
    records[1]["conversations"] += [{"from": "human", "value": "More?"}, {"from": "gpt", "value": "words " * 60}]
    data = write_records(tmp_path / "data.json", records)
    changes = {"max_steps": "1", "save_strategy": "no", "model_max_length": "100"}
    run_training(parse_args(flags(tmp_path / "cut", data_path=data, **changes)))
    report = json.loads((tmp_path / "cut" / "data_report.json").read_text())["train"]
    assert (report["truncated_ids"], report["num_truncated"]) == (["long"], 1)
    assert report["num_lost_tokens"] > 100
    run_training(parse_args(flags(tmp_path / "dropped", data_path=data, truncation="drop", **changes)))
    report = json.loads((tmp_path / "dropped" / "data_report.json").read_text())["train"]
    assert (report["too_long_ids"], report["num_usable"]) == (["long"], 1)
    with pytest.raises(UserError, match=r"1 of 2 records .* longer than model_max_length = 100"):
        prepare_run(parse_args(flags(tmp_path / "refused", data_path=data, truncation="error", **changes)))


def test_data_cache_dir(tmp_path):
    cache = tmp_path / "cache"
    prepare_run(parse_args(flags(tmp_path / "out", data_cache_dir=cache, preprocessing_num_workers="1")))
    assert sorted(os.listdir(cache)) == ["images", "records", "tokens"]


class TestNothingIsLearnt:
    """A run that would end well without having learnt anything fails."""

    def test_too_few_records_for_a_step(self, tmp_path):
        changes = {"per_device_train_batch_size": 32, "dataloader_drop_last": "True"}
        with pytest.raises(UserError, match="14 rows do not fill one of 32 on each of 1 ranks: no step would be"):
            prepare_run(parse_args(flags(tmp_path / "out", **changes)))
        assert not (tmp_path / "out").exists()

    def test_no_picture_can_be_read(self, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "broken.png").write_text("no picture")
        broken = [conversation("a", "broken.png"), conversation("b", "broken.png")]
        records = write_records(tmp_path / "records.json", broken)
        changes = {"image_folder": tmp_path / "images", "check_images": "exists", "on_bad_sample": "skip"}
        args = parse_args(flags(tmp_path / "out", data_path=records, max_steps=2, **changes))
        with pytest.raises(RunError, match="None of the 4 samples of this run could be read"):
            run_training(args)
        assert not (tmp_path / "out" / "adapter_model.bin").exists()
