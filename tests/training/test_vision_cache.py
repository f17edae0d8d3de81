"""Runs that read features instead of images: the same losses bit for bit, and a directory that is never wrong."""

import base64
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_ft.data.features.store import FeatureReader, FeatureStore
from llava_ft.errors import RunError, UserError
from llava_ft.training import vision_cache
from llava_ft.training.run import Run
from llava_ft.tuning.plan import PartPlan, TuningPlan
from tests.conftest import RECORDINGS
from tests.training.helpers import METHODS, flags, prepare, state_of, train, write_records

BF16 = {"bf16": "True"}
SHORT = {"max_steps": "2", "save_strategy": "no"}

pytestmark = pytest.mark.usefixtures("in_recordings")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("llava_ft.data.features.contents._SETTLED_SECONDS", 0.0)


def losses(run: Run) -> list[float]:
    return [entry[key] for entry in run.trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]


def same(one: Run, other: Run) -> None:
    """Two runs are equal bit for bit: every loss, every trained value, the optimizer's state."""
    assert losses(one) == losses(other)
    assert losses(one)
    before, after = state_of(one), state_of(other)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def has_tower(run: Run) -> bool:
    return any("vision_tower" in name for name, _ in run.trainer.model.named_parameters())


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("features are computed that are there already")

    monkeypatch.setattr(vision_cache, "load_tower", refuse)


def copy_of_images(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDINGS / "images" / "src", tmp_path / "images"))


def folders(cache: Path) -> list[Path]:
    return sorted(cache.glob("features-*"))


def data_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("features-*/features-*.safetensors"))


def num_bytes(cache: Path) -> int:
    """Bytes of all features in a cache, without the names and checksums beside them."""
    return sum(value.nbytes for path in data_files(cache) for value in load_file(path).values())


class TestSameLosses:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dtype", [{}, BF16], ids=["float32", "bfloat16"])
    def test_bit_for_bit(self, tmp_path, request, method, dtype):
        request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(2)  # several threads round differently for other numbers of images; one does not
        changes = dtype | {"max_steps": "4", "save_strategy": "no"}
        plain = train(tmp_path / "plain", method, **changes)
        cached = train(tmp_path / "cached", method, vision_cache=tmp_path / "cache", **changes)
        assert has_tower(plain)
        assert not has_tower(cached)
        same(plain, cached)

    @pytest.mark.parametrize(
        "change",
        [
            {"validation_fraction": "0.3", "eval_strategy": "steps", "eval_steps": "1"},
            {"pretrain_mm_mlp_adapter": None},  # the projector's random start
            {"mm_projector_type": "linear", "pretrain_mm_mlp_adapter": None, "mm_vision_select_feature": "cls_patch"},
            {"mm_use_im_start_end": "True", "pretrain_mm_mlp_adapter": None},
            {"image_aspect_ratio": "square", "image_exif_transpose": "True"},
            {"gradient_checkpointing": "True", "gradient_accumulation_steps": "2"},
            {"dataloader_num_workers": "2"},
            {"validation_data_path": "data/pretrain.json", "eval_strategy": "steps", "eval_steps": "1"},
            {"packing": "True", "per_device_train_batch_size": "1", "group_by_modality_length": "False"},
            {"padding_free": "True"},
            {"per_device_train_batch_size": "1"},
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
        ],
        ids=lambda change: " ".join(change),
    )
    def test_whatever_else_is_asked_for(self, tmp_path, change):
        plain = train(tmp_path / "plain", **SHORT | change)
        cached = train(tmp_path / "cached", vision_cache=tmp_path / "cache", **SHORT | change)
        assert not has_tower(cached)
        same(plain, cached)

    def test_a_resumed_run(self, tmp_path, caplog):
        plain = train(tmp_path / "plain")
        train(tmp_path / "cached", vision_cache=tmp_path / "cache")
        shutil.rmtree(tmp_path / "cached" / "checkpoint-6")
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="llava_ft"):
            resumed = train(tmp_path / "cached", vision_cache=tmp_path / "cache")
        assert "step 4/6" in caplog.text
        assert "step 3/6" not in caplog.text
        same(plain, resumed)

    def test_8_bits_are_close(self, tmp_path):
        plain = train(tmp_path / "plain", **SHORT)
        kept = train(tmp_path / "kept", vision_cache=tmp_path / "cache", vision_cache_dtype="int8", **SHORT)
        assert losses(kept) != losses(plain)
        assert losses(kept) == pytest.approx(losses(plain), rel=1e-3)

    def test_the_tower_is_written_if_that_is_asked_for(self, tmp_path):
        changes = SHORT | {"save_vision_tower": "True", "weights_format": "bin"}
        plain = train(tmp_path / "plain", "full", **changes)
        cached = train(tmp_path / "cached", "full", vision_cache=tmp_path / "cache", **changes)
        same(plain, cached)
        one, other = (
            torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True) for name in ("plain", "cached")
        )
        assert any("vision_tower" in name for name in one)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


class TestReuse:
    def test_a_second_run_computes_nothing(self, tmp_path, monkeypatch, caplog):
        one = train(tmp_path / "one", vision_cache=tmp_path / "cache", **SHORT)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
        forbid_encoding(monkeypatch)
        with caplog.at_level(logging.INFO, logger="llava_ft"):
            same(one, train(tmp_path / "two", vision_cache=tmp_path / "cache", **SHORT))
        assert "are there" in caplog.text
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    def test_other_records_and_names_of_the_same_images(self, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        images = copy_of_images(tmp_path)
        prepare(tmp_path / "one", vision_cache=cache, image_folder=images)
        for path in sorted(images.iterdir()):
            path.rename(path.with_name("renamed_" + path.name))
        records = json.loads(Path("data/mix.json").read_text())
        for record in records:
            if isinstance(record.get("image"), str):
                record["image"] = "renamed_" + record["image"]
            elif "image" in record:
                record["image"] = ["renamed_" + name for name in record["image"]]
        forbid_encoding(monkeypatch)
        prepare(
            tmp_path / "two",
            vision_cache=cache,
            image_folder=images,
            data_path=write_records(tmp_path / "renamed.json", records),
        )
        assert len(folders(cache)) == 1

    def test_copies_take_no_room(self, tmp_path):
        images = copy_of_images(tmp_path)
        (images / "copy.png").write_bytes((images / "square.png").read_bytes())
        human = {"from": "human", "value": "<image>\nWhat?"}
        records = [
            {"image": name, "conversations": [human, {"from": "gpt", "value": "A square."}]}
            for name in ("square.png", "copy.png")
        ]
        prepare(
            tmp_path / "run",
            vision_cache=tmp_path / "cache",
            image_folder=images,
            data_path=write_records(tmp_path / "two.json", records),
        )
        assert num_bytes(tmp_path / "cache") == 16 * 32 * 4

    @pytest.mark.parametrize(
        "change",
        [
            {"mm_vision_select_layer": "-1"},
            {"mm_vision_select_feature": "cls_patch"},
            {"image_aspect_ratio": "square"},
            {"image_exif_transpose": "True"},
            {"image_fast_decode": "True"},
            {"vision_cache_dtype": "int8"},
            BF16,
        ],
        ids=lambda change: " ".join(change),
    )
    def test_what_changes_features_has_a_folder_of_its_own(self, tmp_path, change):
        prepare(tmp_path / "one", vision_cache=tmp_path / "cache")
        prepare(tmp_path / "two", vision_cache=tmp_path / "cache", **change)
        assert len(folders(tmp_path / "cache")) == 2

    @pytest.mark.parametrize("change", [{"mm_vision_select_layer": "2"}, {"lora_r": "8"}, {"seed": "8"}])
    def test_what_does_not_change_features_does_not(self, tmp_path, monkeypatch, change):
        prepare(tmp_path / "one", vision_cache=tmp_path / "cache")
        forbid_encoding(monkeypatch)
        prepare(tmp_path / "two", vision_cache=tmp_path / "cache", **change)
        assert len(folders(tmp_path / "cache")) == 1

    def test_another_tower_has_a_folder_of_its_own(self, tmp_path):
        from safetensors.torch import load_file, save_file

        tower = Path(shutil.copytree("ckpt/clip-tiny", tmp_path / "clip"))
        prepare(tmp_path / "one", vision_cache=tmp_path / "cache", vision_tower=tower)
        tensors = load_file(tower / "model.safetensors")
        next(value for name, value in tensors.items() if name.endswith("fc1.weight")).view(-1)[17] += 1e-3
        save_file(tensors, tower / "model.safetensors", metadata={"format": "pt"})
        prepare(tmp_path / "two", vision_cache=tmp_path / "cache", vision_tower=tower)
        assert len(folders(tmp_path / "cache")) == 2


class TestFilling:
    @pytest.fixture(autouse=True)
    def _small_batches(self, monkeypatch):
        monkeypatch.setattr(vision_cache, "_IMAGES_PER_BATCH", 2)

    @pytest.mark.parametrize("num_workers", ["0", "2"])
    def test_any_batches_give_the_same_features(self, tmp_path, num_workers):
        plain = train(tmp_path / "plain", **SHORT)
        cached = train(
            tmp_path / "cached", vision_cache=tmp_path / "cache", dataloader_num_workers=num_workers, **SHORT
        )
        same(plain, cached)

    def test_killed_in_between(self, tmp_path, monkeypatch):
        script = (
            "import os, signal, sys\n"
            "from llava_ft.args import parse_args\n"
            "from llava_ft.data.features.store import FeatureStore\n"
            "from llava_ft.training import vision_cache\n"
            "from llava_ft.training.run import prepare_run\n"
            "vision_cache._IMAGES_PER_BATCH = 2\n"
            "add, left = FeatureStore.add, [2]\n"
            "def add_or_die(*args):\n"
            "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    left[0] -= 1\n"
            "    add(*args)\n"
            "FeatureStore.add = add_or_die\n"
            "prepare_run(parse_args(sys.argv[1:]))\n"
        )
        cache = tmp_path / "cache"
        argv = flags(tmp_path / "killed", vision_cache=cache, dataloader_num_workers=2)
        environment = os.environ | {"PYTHONPATH": str(RECORDINGS.parent.parent)}
        done = subprocess.run([sys.executable, "-c", script, *argv], env=environment, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL
        encoded: list[int] = []
        encode = vision_cache.Encoder.__call__

        def count(self, pixels):
            encoded.append(len(pixels))
            return encode(self, pixels)

        monkeypatch.setattr(vision_cache.Encoder, "__call__", count)
        cached = train(tmp_path / "cached", vision_cache=cache, **SHORT)
        assert sum(encoded) == NUM_IMAGES - 4
        same(train(tmp_path / "plain", **SHORT), cached)

    @pytest.mark.parametrize("length", [0, 100, 3000])
    def test_a_cut_file_is_filled_again(self, tmp_path, caplog, length):
        cache = tmp_path / "cache"
        prepare(tmp_path / "one", vision_cache=cache)
        os.truncate(data_files(cache)[0], length)
        cached = train(tmp_path / "cached", vision_cache=cache, **SHORT)
        assert "1 files in" in caplog.text
        assert "are damaged or not of this cache" in caplog.text
        same(train(tmp_path / "plain", **SHORT), cached)

    def test_a_changed_byte_costs_its_sample_and_is_said(self, tmp_path, caplog):
        cache = tmp_path / "cache"
        prepare(tmp_path / "one", vision_cache=cache)
        path = data_files(cache)[0]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        run = prepare(tmp_path / "two", vision_cache=cache)
        dataset = run.datasets.train
        bad = [item["bad_sample"] for item in map(dataset.__getitem__, range(len(dataset))) if "bad_sample" in item]
        assert bad
        assert {error.kind for error in bad} == {"image-features-damaged"}
        assert "Delete that file to have what is in it computed anew" in str(bad[0])

    def test_a_full_disk_ends_the_run_and_keeps_what_is_there(self, tmp_path, monkeypatch):
        cache, fsync, num_forced = tmp_path / "cache", os.fsync, []

        def no_space(file):
            if len(num_forced) == 3:  # digests of contents and two batches
                raise OSError(28, "No space left on device")
            num_forced.append(file)
            fsync(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            with pytest.raises(RunError, match=r"No space left on device. What was written before stays usable"):
                prepare(tmp_path / "one", vision_cache=cache)
        assert num_bytes(cache) == 4 * 16 * 32 * 4
        same(train(tmp_path / "plain", **SHORT), train(tmp_path / "two", vision_cache=cache, **SHORT))

    def test_too_little_room_is_refused_before_any_is_taken(self, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10_000))
        with pytest.raises(UserError) as caught:
            prepare(tmp_path / "one", vision_cache=tmp_path / "cache")
        assert "needs 20.48 kB more, and 10.00 kB is free" in str(caught.value)
        assert "10.48 kB is missing" in str(caught.value)
        assert "--vision_cache_dtype int8" in str(caught.value)
        assert data_files(tmp_path / "cache") == []

    def test_what_is_announced_is_what_is_taken(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO, logger="llava_ft"):
            prepare(tmp_path / "one", vision_cache=tmp_path / "cache")
        taken = num_bytes(tmp_path / "cache")
        assert sum(path.stat().st_size for path in data_files(tmp_path / "cache")) < taken + 200 * NUM_IMAGES + 5 * 200
        assert taken == NUM_IMAGES * 16 * 32 * 4
        assert f"0 of {NUM_IMAGES} images have features. The others take 20.48 kB: {NUM_IMAGES} tiles of 16 "
        assert "tokens x 32 values (torch.float32), 2048 bytes each" in caplog.text

    def test_an_image_that_cannot_be_read(self, tmp_path, caplog):
        images = copy_of_images(tmp_path)
        whole = (images / "landscape.jpg").read_bytes()
        (images / "landscape.jpg").write_bytes(whole[: len(whole) // 2])
        (images / "square.png").unlink()
        changes = SHORT | {"image_folder": images, "check_images": "none", "bad_sample_limit": "1"}
        plain = train(tmp_path / "plain", **changes)
        cached = train(tmp_path / "cached", vision_cache=tmp_path / "cache", **changes)
        same(plain, cached)
        assert "landscape.jpg could not be read, or is being changed; the vision cache has no features" in caplog.text
        seen = [
            [(item["bad_sample"].kind, str(item["bad_sample"])) for item in dataset if "bad_sample" in item]
            for dataset in (
                map(run.datasets.train.__getitem__, range(len(run.datasets.train))) for run in (plain, cached)
            )
        ]
        assert seen[0] == seen[1]
        assert {"image-missing", "image-truncated"} <= {kind for kind, _ in seen[0]}

    def test_a_file_replaced_meanwhile_gives_no_features_under_the_old_name(self, tmp_path, monkeypatch):
        images, announce = copy_of_images(tmp_path), vision_cache._announce
        before = (images / "square.png").read_bytes()

        def replace(*args):
            (images / "square.png").write_bytes((images / "gray.png").read_bytes())
            announce(*args)

        monkeypatch.setattr(vision_cache, "_announce", replace)
        run = prepare(tmp_path / "one", vision_cache=tmp_path / "cache", image_folder=images)
        dataset = run.datasets.train
        bad = [item["bad_sample"] for item in map(dataset.__getitem__, range(len(dataset))) if "bad_sample" in item]
        assert [error.kind for error in bad] == ["image-not-cached"]
        monkeypatch.setattr(vision_cache, "_announce", announce)
        (images / "square.png").write_bytes(before)
        changes = SHORT | {"image_folder": images}
        cached = train(tmp_path / "cached", vision_cache=tmp_path / "cache", **changes)
        same(train(tmp_path / "plain", **changes), cached)

    def test_features_that_do_not_appear(self, tmp_path, monkeypatch):
        monkeypatch.setattr(vision_cache, "_SECONDS_TILL_SEEN", 0.0)
        monkeypatch.setattr(FeatureStore, "add", lambda *_: None)
        with pytest.raises(RunError, match=rf"{NUM_IMAGES} images were encoded, but the features of 0 can be read"):
            prepare(tmp_path / "one", vision_cache=tmp_path / "cache")

    def test_numbers_that_are_not_finite(self, tmp_path, monkeypatch):
        infinite = torch.tensor(float("inf"))
        monkeypatch.setattr(vision_cache.Encoder, "__call__", lambda self, pixels: infinite.expand(len(pixels), 16, 32))
        with pytest.raises(RunError, match=r"numbers that are not finite for .* in torch.float32. Use bf16"):
            prepare(tmp_path / "one", vision_cache=tmp_path / "cache")


class TestSwitchedOff:
    def text(self, tmp_path: Path, caplog, method: str = "lora", **changes) -> str:
        with caplog.at_level(logging.INFO, logger="llava_ft"):
            run = prepare(tmp_path / "run", method, vision_cache=tmp_path / "cache", **changes)
        assert not isinstance(run.datasets.train.image_reader, FeatureReader)
        assert not (tmp_path / "cache").exists()
        return next(text for text in caplog.messages if "vision cache is off" in text)

    def test_data_without_images(self, tmp_path, caplog):
        text = self.text(tmp_path, caplog, data_path="data/text.json")
        assert text == "The vision cache is off: the data has no images."

    def test_a_model_without_tower(self, tmp_path, caplog):
        changes = {"vision_tower": None, "pretrain_mm_mlp_adapter": None, "mm_projector_lr": None}
        text = self.text(tmp_path, caplog, data_path="data/text.json", **changes)
        assert text == "The vision cache is off: the model has no vision tower."

    def test_a_tower_that_is_trained(self, tmp_path, caplog, monkeypatch):
        last_layer = PartPlan("full", layers=range(1, 2))
        plan = TuningPlan({"projector": PartPlan("full"), "vision tower": last_layer})
        monkeypatch.setattr(TuningPlan, "from_flags", lambda **flags: plan)
        text = self.text(tmp_path, caplog, "full")
        assert text == "The vision cache is off: the vision tower is trained, so its features change with every step."


class TestEmbeddedImages:
    def records(self, tmp_path: Path) -> Path:
        records = json.loads(Path("data/mix.json").read_text())
        for record in records:
            if "image" in record:
                content = base64.b64encode(Path("images/src", record["image"]).read_bytes()).decode()
                record["image"] = f"data:image/png;base64,{content}"
        return write_records(tmp_path / "embedded.json", records)

    def test_they_are_known_by_content_too(self, tmp_path, monkeypatch):
        plain = train(tmp_path / "plain", **SHORT)
        changes = SHORT | {"data_path": self.records(tmp_path), "vision_cache": tmp_path / "cache"}
        same(plain, train(tmp_path / "embedded", **changes))
        forbid_encoding(monkeypatch)
        same(plain, train(tmp_path / "again", **changes))
        same(plain, train(tmp_path / "files", vision_cache=tmp_path / "cache", **SHORT))


class TestRefused:
    def test_a_file_in_the_place_of_the_directory(self, tmp_path):
        (tmp_path / "cache").write_text("")
        with pytest.raises(
            UserError, match=r"vision_cache=.*cache cannot be made or is no directory.*Give a directory"
        ):
            prepare(tmp_path / "run", vision_cache=tmp_path / "cache")


NUM_IMAGES = 10
"""Different images in data/mix.json."""
