"""Features on disk: what was added is read back, and nothing else ever is."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llava_ft.data.features import tensor_files
from llava_ft.data.features.store import DIGEST, FeatureFormat, FeatureStore, as_array, digest_of, find_digests
from llava_ft.data.features.tensor_files import DamagedShardError
from llava_ft.errors import RunError

FORK = multiprocessing.get_context("fork")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMAT = FeatureFormat(num_tokens=3, width=8, dtype=torch.float32)
KEY = {"tower": "sha256:abc", "preprocessing": {"size": 28}}
SETTINGS = (KEY, FORMAT)


def tiles(seed: int, num_tiles: int = 1, tile: FeatureFormat = FORMAT) -> torch.Tensor:
    values = torch.randn(num_tiles, tile.num_tokens, tile.width, generator=torch.Generator().manual_seed(seed))
    return values.to(tile.dtype)


def digest(number: int) -> bytes:
    return digest_of(str(number).encode())


def has(store: FeatureStore, *numbers: int) -> list[bool]:
    return store.has(as_array([*map(digest, numbers)])).tolist()


def read(store: FeatureStore, number: int) -> torch.Tensor:
    found = store.read(digest(number))
    assert found is not None
    return found


Settings = tuple[dict, FeatureFormat]


def fill(directory: Path, numbers: range, num_tiles: int = 1, of: Settings = SETTINGS, batch: int = 1) -> None:
    store = FeatureStore(directory, *of)
    for start in numbers[::batch]:
        some = range(start, min(start + batch, numbers.stop))
        store.add({digest(number): tiles(number, num_tiles, of[1]) for number in some})


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("features-*/features-*.safetensors"))


class TestFormat:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_come_back_bit_for_bit(self, dtype):
        tile = FeatureFormat(4, 6, dtype)
        values = tiles(1, 5, tile)
        kept = tile.encode(values)
        assert kept.nbytes == 5 * tile.bytes_per_tile == 5 * 4 * 6 * dtype.itemsize
        assert torch.equal(tile.decode(kept), values)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=12, max_size=12), st.sampled_from([torch.float32, *DTYPES])
    )
    def test_8_bits_are_right_to_a_254th_of_the_largest_value_of_a_token(self, values, dtype):
        tile = FeatureFormat(3, 4, dtype, is_8bit=True)
        features = torch.tensor(values).reshape(1, 3, 4).to(dtype)
        found = tile.decode(tile.encode(features))
        assert found.dtype == dtype
        largest = features.float().abs().amax(dim=2, keepdim=True)
        rounding = torch.finfo(dtype).eps + 1e-6
        assert ((found.float() - features.float()).abs() <= largest * (1 / 254 + rounding) + 1e-30).all()

    def test_8_bits_take_a_byte_a_value_and_a_scale_a_token(self):
        tile = FeatureFormat(576, 1024, torch.bfloat16, is_8bit=True)
        assert tile.encode(tiles(1, 2, tile)).nbytes == 2 * tile.bytes_per_tile == 2 * 576 * (1024 + 4)

    def test_zeros_stay_zeros_in_8_bits(self):
        tile = FeatureFormat(3, 4, torch.float16, is_8bit=True)
        assert not tile.decode(tile.encode(torch.zeros(2, 3, 4))).any()


class TestStore:
    @pytest.mark.parametrize("is_8bit", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_was_added_is_found_by_content(self, tmp_path, dtype, is_8bit):
        of = (KEY, FeatureFormat(3, 8, dtype, is_8bit))
        store = FeatureStore(tmp_path, *of)
        store.add({digest(1): tiles(1, 2, of[1]), digest(2): tiles(2, 1, of[1])})
        store.add({digest(3): tiles(3, 4, of[1])})
        for found in (FeatureStore(tmp_path, *of), store):
            found.refresh()
            assert (len(found), found.num_damaged) == (3, 0)
            for number, count in ((1, 2), (2, 1), (3, 4)):
                expected = of[1].decode(of[1].encode(tiles(number, count, of[1])))
                assert torch.equal(read(found, number), expected)
            assert has(found, 1, 2, 3, 4) == [True, True, True, False]
            assert found.read(digest(4)) is None

    def test_nothing_is_found_where_nothing_is(self, tmp_path):
        store = FeatureStore(tmp_path / "new", *SETTINGS)
        assert len(store) == 0
        assert has(store, 1, 2) == [False, False]
        assert not (tmp_path / "new").exists()

    @given(st.lists(st.binary(min_size=16, max_size=16), max_size=20), st.lists(st.binary(min_size=16, max_size=16)))
    def test_digests_are_found_byte_by_byte(self, some, others):
        known = sorted(set(some))
        wanted = [*others, *known, bytes(16)]
        found = find_digests(np.frombuffer(b"".join(known), DIGEST), np.frombuffer(b"".join(wanted), DIGEST))
        assert found.tolist() == [known.index(one) if one in known else -1 for one in wanted]

    def test_it_travels_to_another_process(self, tmp_path):
        fill(tmp_path, range(3))
        store = FeatureStore(tmp_path, *SETTINGS)
        read(store, 0)
        copy = pickle.loads(pickle.dumps(store))
        assert torch.equal(read(copy, 2), tiles(2))

    def test_other_settings_other_folder(self, tmp_path):
        variants = [
            SETTINGS,
            ({**KEY, "tower": "sha256:abd"}, FORMAT),
            ({**KEY, "preprocessing": {"size": 29}}, FORMAT),
            (KEY, FeatureFormat(3, 8, torch.bfloat16)),
            (KEY, FeatureFormat(3, 8, torch.float32, is_8bit=True)),
            (KEY, FeatureFormat(8, 3, torch.float32)),
        ]
        assert len({FeatureStore(tmp_path, *of).folder for of in variants}) == len(variants)

    def test_settings_can_be_read_by_people(self, tmp_path):
        fill(tmp_path, range(1))
        found = json.loads((FeatureStore(tmp_path, *SETTINGS).folder / "settings.json").read_text())
        assert found["tower"] == "sha256:abc"
        assert found["tile"] == {"num_tokens": 3, "width": 8, "dtype": "float32", "is_8bit": False}


class TestDamage:
    """Whatever happens to the files: a feature is right, absent, or an error."""

    def test_files_cut_at_any_place(self, tmp_path):
        fill(tmp_path, range(4), num_tiles=2, batch=4)
        (path,) = files_of(tmp_path)
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            store = FeatureStore(tmp_path, *SETTINGS)
            assert (len(store), store.num_damaged) == (0, 1)

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_any_byte_changed(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("store")
        fill(folder, range(3), batch=3)
        (path,) = files_of(folder)
        content = bytearray(path.read_bytes())
        end_of_names = 8 + int.from_bytes(content[:8], "little")
        place = data.draw(st.integers(0, end_of_names - 1) | st.integers(end_of_names, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        store = FeatureStore(folder, *SETTINGS)
        for number in range(3):
            with contextlib.suppress(DamagedShardError):
                found = store.read(digest(number))
                assert found is None or torch.equal(found, tiles(number))

    def test_a_changed_feature_is_an_error(self, tmp_path):
        fill(tmp_path, range(1))
        (path,) = files_of(tmp_path)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DamagedShardError, match=r"safetensors is damaged: the checksum of"):
            read(FeatureStore(tmp_path, *SETTINGS), 0)

    @pytest.mark.parametrize("length", [0, 96, None])
    def test_a_file_cut_or_removed_while_it_is_in_use(self, tmp_path, length):
        fill(tmp_path, range(3))
        store = FeatureStore(tmp_path, *SETTINGS)
        (path,) = [path for path in files_of(tmp_path) if digest(2).hex() in load_file(path)]
        read(store, 2)
        if length is None:
            path.unlink()
        else:
            os.truncate(path, length)
        with pytest.raises(DamagedShardError, match=r"safetensors cannot be read: "):
            read(store, 2)
        assert torch.equal(read(store, 0), tiles(0))

    def test_a_foreign_file_is_left_out(self, tmp_path):
        fill(tmp_path, range(1))
        folder = FeatureStore(tmp_path, *SETTINGS).folder
        (folder / "features-x.safetensors").write_bytes(b"something else" * 10)
        save_file({digest(1).hex(): tiles(1)}, folder / "features-y.safetensors")
        store = FeatureStore(tmp_path, *SETTINGS)
        assert (len(store), store.num_damaged) == (1, 2)

    def test_features_of_other_settings_are_left_out(self, tmp_path):
        fill(tmp_path, range(1))
        store = FeatureStore(tmp_path, {**KEY, "tower": "other"}, FORMAT)
        files_of(tmp_path)[0].parent.rename(store.folder)
        store.refresh()
        assert (len(store), store.num_damaged) == (0, 1)

    def test_other_programs_can_read_it(self, tmp_path):
        fill(tmp_path, range(2), batch=2)
        found = load_file(files_of(tmp_path)[0])
        assert found.keys() == {digest(0).hex(), digest(1).hex()}
        assert torch.equal(found[digest(1).hex()], tiles(1))


class TestWriting:
    @pytest.mark.parametrize("broken", ["fsync", "rename"])
    def test_a_full_disk_ends_it_and_leaves_what_is_complete(self, tmp_path, monkeypatch, broken):
        store = FeatureStore(tmp_path, *SETTINGS)
        store.add({digest(0): tiles(0)})

        def fails(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, broken, fails)
            with pytest.raises(RunError, match=r"No space left on device. What was written before stays usable"):
                store.add({digest(1): tiles(1)})
        assert sorted(store.folder.iterdir()) == [*files_of(tmp_path), store.folder / "settings.json"]
        store.refresh()
        assert (len(store), store.num_damaged) == (1, 0)
        assert torch.equal(read(store, 0), tiles(0))
        store.add({digest(1): tiles(1)})  # somebody made room
        store.refresh()
        assert torch.equal(read(store, 1), tiles(1))

    def test_a_real_limit_of_the_system(self, tmp_path):
        fill(tmp_path, range(3))

        def fill_much() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            with contextlib.suppress(RunError):
                fill(tmp_path, range(3, 100), batch=50)
                return
            os._exit(7)

        process = FORK.Process(target=fill_much)
        process.start()
        process.join(20)
        assert process.exitcode == 7
        store = FeatureStore(tmp_path, *SETTINGS)
        assert (len(store), store.num_damaged) == (3, 0)

    def test_a_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        store = FeatureStore(tmp_path / "file" / "sub", *SETTINGS)
        with pytest.raises(RunError, match="Features could not be written"):
            store.add({digest(1): tiles(1)})

    def test_killed_at_any_moment(self, tmp_path):
        for seconds in (0.0, 0.01, 0.1, 0.3):
            process = FORK.Process(target=fill, args=(tmp_path, range(10**6), 3))
            process.start()
            time.sleep(seconds)
            process.kill()
            process.join(20)
            store = FeatureStore(tmp_path, *SETTINGS)
            assert store.num_damaged == 0
            for number in range(len(store)):
                assert torch.equal(read(store, number), tiles(number, 3))
        assert len(store) > 3

    def test_killed_with_half_a_batch_written(self, tmp_path, monkeypatch):
        save, num_saved = tensor_files.save, []

        def half_and_die(*args):
            num_saved.append(args)
            if len(num_saved) < 3:
                return save(*args)
            (staged,) = [path for path in tmp_path.glob("*/.*") if not path.stat().st_size]
            staged.write_bytes(save(*args)[:300])
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(tensor_files, "save", half_and_die)  # called when the file is open
        process = FORK.Process(target=fill, args=(tmp_path, range(12), 3), kwargs={"batch": 4})
        process.start()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
        store = FeatureStore(tmp_path, *SETTINGS)
        assert (len(store), store.num_damaged) == (8, 0)

    def test_several_write_at_once_and_one_reads(self, tmp_path):
        processes = [FORK.Process(target=fill, args=(tmp_path, numbers)) for numbers in (range(60), range(40, 100))]
        for process in processes:
            process.start()
        store = FeatureStore(tmp_path, *SETTINGS)
        while any(process.is_alive() for process in processes):
            store.refresh()
        store.refresh()
        assert (len(store), store.num_damaged) == (100, 0)
        for number in range(100):
            assert torch.equal(read(store, number), tiles(number))
