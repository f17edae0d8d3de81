"""lineage.json: what it says, that it says no secrets, and that chains stay finite."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from llava_ft.checkpoint.lineage import (
    LINEAGE,
    MAX_DEPTH,
    describe_parent,
    read_lineage,
    record_lineage,
)
from llava_ft.checkpoint.manifest import what_is_incomplete
from llava_ft.cli import main
from llava_ft.errors import CheckpointError
from tests.training.helpers import train, write_records


@pytest.fixture(autouse=True)
def _there(in_recordings: Path):
    """Run where the recordings' paths lead somewhere."""


def lineage_of(directory: Path) -> dict[str, Any]:
    lineage = read_lineage(directory)
    assert lineage is not None
    return lineage


def make(directory: Path, action: str = "merge", **what: object) -> Path:
    directory.mkdir(exist_ok=True)
    record_lineage(directory, action, **what)  # pyright: ignore[reportArgumentType]
    return directory


def adapter(directory: Path, value: float = 1.0) -> Path:
    """The least that counts as an adapter."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    torch.save({name: torch.full((2, 3), value)}, directory / "adapter_model.bin")
    return directory


class TestRuns:
    @pytest.mark.parametrize("method", ["lora", "projector", "full"])
    def test_every_save_has_one_that_its_manifest_lists(self, tmp_path, method):
        train(tmp_path / "out", method, max_steps=4)
        for directory, step in (("checkpoint-3", 3), ("checkpoint-4", 4), (".", 4)):
            place = tmp_path / "out" / directory
            lineage = lineage_of(place)
            assert (lineage["action"], lineage["details"]["step"]) == ("train", step)
            assert lineage["base"]["path"] == str(Path("ckpt/base-llm").resolve())
            assert lineage["base"]["fingerprint"].startswith("sha256:")
            assert LINEAGE in json.loads((place / "llava_ft.json").read_text())["files"]
            assert what_is_incomplete(place) is None
            config = (place / "run_config.yaml").read_text()
            assert lineage["run_config"]["sha256"] == hashlib.sha256(config.encode()).hexdigest()
            assert lineage["run_config"]["values"] == yaml.safe_load(config)
        (projector,) = lineage["parents"]
        assert (projector["kind"], projector["role"]) == ("file", "projector")
        assert projector["path"] == str(Path("ckpt/mm_projector.bin").resolve())
        (place / LINEAGE).unlink()
        assert what_is_incomplete(place) == f"{LINEAGE} is missing"

    def test_each_source_of_the_data_is_described(self, tmp_path):
        records = json.loads(Path("data/mix.json").read_text())
        write_records(tmp_path / "one.json", records[:6])
        write_records(tmp_path / "two.json", records[6:])
        (tmp_path / "mix.yaml").write_text(
            "sources:\n  - {path: one.json, weight: 3}\n  - {path: two.json, weight: 1, held_out: 2}\n"
        )
        train(tmp_path / "out", data_path=tmp_path / "mix.yaml", max_steps=1)
        one, two = lineage_of(tmp_path / "out")["data"]
        assert [source["path"] for source in (one, two)] == [str(tmp_path / f"{name}.json") for name in ("one", "two")]
        assert (one["num_records"], two["num_records"]) == (6, len(records) - 6)
        assert (one["weight"], two["weight"]) == (3.0, 1.0)
        assert two["num_held_out"] == 2
        assert one["mixture"] == str(tmp_path / "mix.yaml")
        assert one["image_folder"] == str(Path("images/src").resolve())
        assert one["fingerprint"] != two["fingerprint"]

    def test_the_fingerprint_of_moved_data_stays(self, tmp_path):
        fingerprints: set[str] = set()
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
            shutil.copy("data/mix.json", tmp_path / name / "data.json")
            train(tmp_path / f"out-{name}", data_path=tmp_path / name / "data.json", max_steps=1)
            fingerprints.add(lineage_of(tmp_path / f"out-{name}")["data"][0]["fingerprint"])
        assert len(fingerprints) == 1

    def test_no_token_is_written(self, tmp_path):
        train(tmp_path / "out", max_steps=1, hub_token="hf_secret123", lora_dropout="0")
        for path in (tmp_path / "out").rglob("*"):
            assert path.is_dir() or b"hf_secret123" not in path.read_bytes(), path


class TestChain:
    def test_a_parent_brings_its_own_record(self, tmp_path):
        first = make(adapter(tmp_path / "first"), "train", base=("lmsys/vicuna-7b-v1.5", "sha256:1"))
        second = make(tmp_path / "second", parents=[first])
        shutil.rmtree(first)
        (parent,) = lineage_of(second)["parents"]
        assert parent["kind"] == "lora"
        assert parent["lineage"]["base"] == {"path": "lmsys/vicuna-7b-v1.5", "fingerprint": "sha256:1"}
        third = lineage_of(make(tmp_path / "third", parents=[second]))
        assert third["parents"][0]["lineage"]["parents"][0]["lineage"]["action"] == "train"

    def test_a_parent_without_a_record_says_what_its_files_say(self, tmp_path):
        (parent,) = lineage_of(make(tmp_path / "merged", parents=[adapter(tmp_path / "adapter")]))["parents"]
        assert parent["lineage"] is None
        assert parent["base"] == {"path": "lmsys/vicuna-7b-v1.5", "fingerprint": ""}

    def test_an_ancestor_is_described_once(self, tmp_path):
        root = make(adapter(tmp_path / "root"), "train")
        one, two = (make(adapter(tmp_path / name, value), parents=[root]) for name, value in (("a", 2.0), ("b", 3.0)))
        parents = lineage_of(make(tmp_path / "both", parents=[one, two]))["parents"]
        assert parents[0]["lineage"]["parents"][0]["lineage"]["action"] == "train"
        again = parents[1]["lineage"]["parents"][0]
        assert (again["lineage"], again["left_out"]) == (None, "described above")
        assert again["fingerprint"] == parents[0]["lineage"]["parents"][0]["fingerprint"]

    def test_a_long_chain_stays_finite(self, tmp_path):
        last = adapter(tmp_path / "0")
        for number in range(1, MAX_DEPTH + 10):
            last = make(adapter(tmp_path / str(number), number), parents=[last])
        record, depth = lineage_of(last), 0
        while record is not None and record["parents"]:
            (parent,) = record["parents"]
            record, depth = parent["lineage"], depth + 1
        assert depth == MAX_DEPTH
        assert parent["left_out"] == f"older than {MAX_DEPTH} generations"

    def test_a_base_that_was_merged_brings_its_record(self, tmp_path):
        shutil.copytree("ckpt/base-llm", tmp_path / "merged")
        make(tmp_path / "merged", parents=[adapter(tmp_path / "adapter")])
        base = lineage_of(make(tmp_path / "run", "train", base=(str(tmp_path / "merged"), "sha256:2")))["base"]
        assert base["lineage"]["parents"][0]["path"] == str(tmp_path / "adapter")

    def test_the_same_weights_have_the_same_fingerprint(self, tmp_path):
        one = adapter(tmp_path / "one")
        two = adapter(tmp_path / "two")
        tensors = torch.load(two / "adapter_model.bin", weights_only=True)
        (two / "adapter_model.bin").unlink()
        save_file({f"module.{key}": value for key, value in tensors.items()}, two / "adapter_model.safetensors")
        assert describe_parent(one)["fingerprint"] == describe_parent(two)["fingerprint"]
        assert describe_parent(one)["fingerprint"] != describe_parent(adapter(tmp_path / "x", 2.0))["fingerprint"]

    def test_shards_alone_are_named_without_a_fingerprint(self, tmp_path):
        (tmp_path / "checkpoint-3/global_step3").mkdir(parents=True)
        assert describe_parent(tmp_path / "checkpoint-3")["fingerprint"] == ""


class TestFile:
    def test_secrets_are_left_out(self, tmp_path):
        config = yaml.safe_dump(
            {
                "hub_token": "a",
                "wandb_api_key": "b",
                "data_path": "https://user:c@host/data.json",
                "mm_use_im_patch_token": True,
                "accelerator_config": {"password": "d", "split_batches": True},
            }
        )
        values = lineage_of(make(tmp_path / "out", run_config=config))["run_config"]["values"]
        assert values == {
            "data_path": "https://host/data.json",
            "mm_use_im_patch_token": True,
            "accelerator_config": {"split_batches": True},
        }

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "lineage.json"),
            ("{}", "is damaged: it does not say what made the directory"),
            ('{"schema_version": 99, "action": "train"}', "has version 99 of its layout"),
        ],
    )
    def test_a_damaged_file_is_refused(self, tmp_path, content, message):
        (tmp_path / LINEAGE).write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_lineage(tmp_path)

    def test_a_field_of_a_later_version_is_passed_over(self, tmp_path):
        make(tmp_path)
        content = json.loads((tmp_path / LINEAGE).read_text())
        (tmp_path / LINEAGE).write_text(json.dumps(content | {"colour": "red"}))
        assert lineage_of(tmp_path)["action"] == "merge"


class TestCommand:
    def test_text_names_each_generation(self, tmp_path, capsys):
        first = make(adapter(tmp_path / "first"), "train", base=("lmsys/vicuna-7b-v1.5", "sha256:0123456789abcdef"))
        data = [
            {"path": "/d.json", "num_records": 3, "num_usable": 2, "use": "train", "fingerprint": "f", "weight": 2.0}
        ]
        second = make(
            tmp_path / "second",
            parents=[first],
            data=data,
            details={"ignored": ["another base\x1b[2J [red]"], "step": 5},
        )
        shutil.rmtree(first)
        assert main(["inspect", "lineage", str(second)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == str(second)
        assert lines[1].startswith("└── merge, step 5, ")
        assert lines[2] == "    ├── ignored: another base\\x1b[2J [red]"
        assert lines[3] == "    ├── data /d.json (2 of 3 records used, train, weight 2, f)"
        assert lines[4].startswith(f"    └── from {first} (lora, sha256:")
        assert lines[4].endswith(", not there any more)")
        assert lines[5].startswith("        └── train, ")
        assert lines[6] == "            └── base lmsys/vicuna-7b-v1.5 (sha256:0123456789ab)"

    def test_json_is_the_file(self, tmp_path, capsys):
        make(tmp_path, base=("hub/name", "sha256:1"))
        assert main(["inspect", "lineage", str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / LINEAGE).read_text())

    @pytest.mark.parametrize(
        ("path", "message"),
        [("ckpt/base-llm", "has no lineage.json"), ("nowhere", "does not exist"), ("data/mix.json", "is a file")],
    )
    def test_what_has_none(self, capsys, path, message):
        assert main(["inspect", "lineage", path]) == 2
        assert message in capsys.readouterr().err
