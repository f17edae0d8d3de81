"""Features on disk: what was added is read back, and nothing else ever is."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_ft.data.features import entry_log
from llava_ft.data.features.entry_log import CHECKSUM, DIGEST, EntryReader, EntryWriter, find_digests
from llava_ft.data.features.files import FeatureFileError, FeatureSettings, FeatureStore, FeatureWriter
from llava_ft.data.features.format import FeatureFormat
from llava_ft.data.features.image_contents import (
    NO_CONTENT,
    ContentTable,
    LocatedImage,
    digest_of,
    image_contents,
    image_states,
)
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.records import embedded_name
from llava_ft.errors import RunError, UserError

FORK = multiprocessing.get_context("fork")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMAT = FeatureFormat(num_tokens=3, width=8, dtype=torch.float32)
KEY = {"tower": "sha256:abc", "preprocessing": {"size": 28}}
SETTINGS = FeatureSettings(KEY, FORMAT)


def tiles(seed: int, num_tiles: int = 1, tile: FeatureFormat = FORMAT) -> torch.Tensor:
    values = torch.randn(num_tiles, tile.num_tokens, tile.width, generator=torch.Generator().manual_seed(seed))
    return values.to(tile.dtype)


def digest(number: int) -> bytes:
    return digest_of(str(number).encode())


def positions(store: FeatureStore, *numbers: int) -> list[int]:
    return store.find(np.frombuffer(b"".join(map(digest, numbers)), dtype=DIGEST)).tolist()


def read(store: FeatureStore, number: int) -> torch.Tensor:
    (position,) = positions(store, number)
    assert position >= 0
    return store.read(position)


def fill(folder: Path, numbers: range, num_tiles: int = 1, of: FeatureSettings = SETTINGS) -> None:
    with FeatureStore(folder, of).writer() as writer:
        for number in numbers:
            writer.add([digest(number)], [tiles(number, num_tiles, of.tiles)])


def file_of(folder: Path, suffix: str) -> Path:
    (path,) = folder.glob(f"features-*{suffix}")
    return path


class TestFormat:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_come_back_bit_for_bit(self, dtype):
        tile = FeatureFormat(4, 6, dtype)
        values = tiles(1, 5, tile)
        data = tile.encode(values)
        assert data.shape == (5, tile.bytes_per_tile) == (5, 4 * 6 * dtype.itemsize)
        assert torch.equal(tile.decode(data.reshape(-1).copy()), values)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=12, max_size=12), st.sampled_from([torch.float32, *DTYPES])
    )
    def test_8_bits_are_right_to_a_254th_of_the_largest_value_of_a_token(self, values, dtype):
        tile = FeatureFormat(3, 4, dtype, is_8bit=True)
        features = torch.tensor(values).reshape(1, 3, 4).to(dtype)
        found = tile.decode(tile.encode(features).reshape(-1).copy())
        assert found.dtype == dtype
        largest = features.float().abs().amax(dim=2, keepdim=True)
        rounding = torch.finfo(dtype).eps + 1e-6
        assert ((found.float() - features.float()).abs() <= largest * (1 / 254 + rounding) + 1e-30).all()

    def test_8_bits_take_a_byte_a_value_and_a_scale_a_token(self):
        assert FeatureFormat(576, 1024, torch.bfloat16, is_8bit=True).bytes_per_tile == 576 * (1024 + 4)

    def test_zeros_stay_zeros_in_8_bits(self):
        tile = FeatureFormat(3, 4, torch.float16, is_8bit=True)
        assert not tile.decode(tile.encode(torch.zeros(2, 3, 4)).reshape(-1).copy()).any()


class TestStore:
    @pytest.mark.parametrize("is_8bit", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_was_added_is_found_by_content(self, tmp_path, dtype, is_8bit):
        of = FeatureSettings(KEY, FeatureFormat(3, 8, dtype, is_8bit))
        with FeatureStore(tmp_path, of).writer() as writer:
            writer.add([digest(1), digest(2)], [tiles(1, 2, of.tiles), tiles(2, 1, of.tiles)])
            writer.add([digest(3)], [tiles(3, 4, of.tiles)])
        store = FeatureStore(tmp_path, of)
        assert len(store) == 3
        assert store.num_damaged == 0
        for number, count in ((1, 2), (2, 1), (3, 4)):
            assert store.num_tiles(positions(store, number)[0]) == count
            expected = of.tiles.decode(of.tiles.encode(tiles(number, count, of.tiles)).reshape(-1).copy())
            assert torch.equal(read(store, number), expected)
        assert positions(store, 4) == [-1]

    def test_nothing_is_found_where_nothing_is(self, tmp_path):
        store = FeatureStore(tmp_path / "new", SETTINGS)
        assert len(store) == 0
        assert positions(store, 1, 2) == [-1, -1]
        assert not (tmp_path / "new").exists()

    def test_files_without_entries_are_removed(self, tmp_path):
        FeatureStore(tmp_path, SETTINGS).writer().close()
        assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]

    def test_two_writers_at_once(self, tmp_path):
        store = FeatureStore(tmp_path, SETTINGS)
        with store.writer() as one, FeatureStore(tmp_path, SETTINGS).writer() as other:
            for number in range(0, 10, 2):
                one.add([digest(number)], [tiles(number)])
                other.add([digest(number + 1)], [tiles(number + 1)])
                store.refresh()
                assert len(store) == number + 2
                assert torch.equal(read(store, number + 1), tiles(number + 1))
            one.add([digest(1)], [tiles(1)])  # both had it to do
        store.refresh()
        assert len(store) == 10
        for number in range(10):
            assert torch.equal(read(store, number), tiles(number))

    def test_it_travels_to_another_process(self, tmp_path):
        fill(tmp_path, range(3))
        store = FeatureStore(tmp_path, SETTINGS)
        read(store, 0)
        copy = pickle.loads(pickle.dumps(store))
        assert torch.equal(read(copy, 2), tiles(2))

    def test_other_settings_other_folder(self, tmp_path):
        variants = [
            SETTINGS,
            FeatureSettings({**KEY, "tower": "sha256:abd"}, FORMAT),
            FeatureSettings({**KEY, "preprocessing": {"size": 29}}, FORMAT),
            FeatureSettings(KEY, FeatureFormat(3, 8, torch.bfloat16)),
            FeatureSettings(KEY, FeatureFormat(3, 8, torch.float32, is_8bit=True)),
            FeatureSettings(KEY, FeatureFormat(8, 3, torch.float32)),
        ]
        assert len({of.folder(tmp_path) for of in variants}) == len(variants)

    def test_settings_can_be_read_by_people(self, tmp_path):
        fill(tmp_path, range(1))
        found = json.loads((tmp_path / "settings.json").read_text())
        assert found["tower"] == "sha256:abc"
        assert found["tile"] == {"num_tokens": 3, "width": 8, "dtype": "float32", "is_8bit": False}


class TestDamage:
    """Whatever happens to the files: a feature is right, absent, or an error."""

    @pytest.mark.parametrize("suffix", [".bin", ".idx"])
    def test_files_cut_at_any_place(self, tmp_path, suffix):
        fill(tmp_path, range(4), num_tiles=2)
        path = file_of(tmp_path, suffix)
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            store = FeatureStore(tmp_path, SETTINGS)
            found = [number for number in range(4) if positions(store, number)[0] >= 0]
            assert found == list(range(len(found)))
            for number in found:
                assert torch.equal(read(store, number), tiles(number, 2))

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_any_byte_changed(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("store")
        fill(folder, range(3))
        path = data.draw(st.sampled_from(sorted(folder.glob("features-*"))))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with contextlib.suppress(UserError):  # as test_a_foreign_index_is_refused and those after it
            store = FeatureStore(folder, SETTINGS)
            for number in range(3):
                (position,) = positions(store, number)
                with contextlib.suppress(FeatureFileError):
                    assert position < 0 or torch.equal(store.read(position), tiles(number))

    def test_a_changed_feature_is_an_error(self, tmp_path):
        fill(tmp_path, range(1))
        path = file_of(tmp_path, ".bin")
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        with pytest.raises(FeatureFileError, match=r"bin is damaged: the checksum.*Delete it, with the .idx file"):
            read(FeatureStore(tmp_path, SETTINGS), 0)

    def test_a_file_cut_while_it_is_in_use(self, tmp_path):
        fill(tmp_path, range(3))
        store = FeatureStore(tmp_path, SETTINGS)
        read(store, 0)
        os.truncate(file_of(tmp_path, ".bin"), FORMAT.bytes_per_tile)
        with pytest.raises(FeatureFileError, match=r"it ends after 96 bytes, 288 are needed.*computed anew"):
            read(store, 2)
        assert torch.equal(read(store, 0), tiles(0))

    def test_missing_features_are_counted(self, tmp_path):
        fill(tmp_path, range(3))
        file_of(tmp_path, ".bin").unlink()
        store = FeatureStore(tmp_path, SETTINGS)
        assert (len(store), store.num_damaged) == (0, 3)

    def test_a_foreign_index_is_refused(self, tmp_path):
        fill(tmp_path, range(1))
        (tmp_path / "features-x.idx").write_bytes(b"something else" * 10)
        with pytest.raises(UserError, match=r"features-x.idx was not written by this program.*Delete it"):
            FeatureStore(tmp_path, SETTINGS)

    def test_an_index_of_another_version_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(entry_log, "VERSION", 2)
        fill(tmp_path, range(1))
        monkeypatch.undo()
        with pytest.raises(UserError, match=r"has version 2; this program reads version 1. Delete it"):
            FeatureStore(tmp_path, SETTINGS)

    def test_an_index_of_other_settings_is_refused(self, tmp_path):
        fill(tmp_path, range(1))
        (tmp_path / "settings.json").unlink()
        with pytest.raises(UserError, match="belongs to other settings than those of its directory"):
            FeatureStore(tmp_path, FeatureSettings({**KEY, "tower": "other"}, FORMAT))

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xff"])
    def test_damaged_settings_are_refused(self, tmp_path, content):
        fill(tmp_path, range(1))
        (tmp_path / "settings.json").write_bytes(content)
        with pytest.raises(UserError, match=r"settings.json (is not what was written|cannot be read).*Delete"):
            FeatureStore(tmp_path, SETTINGS)


class TestWriting:
    @pytest.mark.parametrize("broken", ["pwrite", "fsync"])
    def test_a_full_disk_ends_it_and_leaves_what_is_complete(self, tmp_path, monkeypatch, broken):
        writer = FeatureStore(tmp_path, SETTINGS).writer()
        writer.add([digest(0)], [tiles(0)])
        real, left = getattr(os, broken), [0]

        def fails(*args):
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1
            return real(*args)

        for left[0] in (0, 1):  # the features, or their entries
            monkeypatch.setattr(os, broken, fails)
            with pytest.raises(RunError, match=r"No space left on device. The 1 tiles before them stay usable"):
                writer.add([digest(1)], [tiles(1)])
            monkeypatch.setattr(os, broken, real)
            assert file_of(tmp_path, ".bin").stat().st_size == FORMAT.bytes_per_tile
            store = FeatureStore(tmp_path, SETTINGS)
            assert (len(store), store.num_damaged) == (1, 0)
            assert torch.equal(read(store, 0), tiles(0))
        writer.add([digest(1)], [tiles(1)])  # somebody made room
        writer.close()
        assert torch.equal(read(FeatureStore(tmp_path, SETTINGS), 1), tiles(1))

    def test_a_real_limit_of_the_system(self, tmp_path):
        def fill_little() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            with contextlib.suppress(RunError):
                fill(tmp_path, range(100))
                return
            os._exit(7)

        process = FORK.Process(target=fill_little)
        process.start()
        process.join(20)
        assert process.exitcode == 7
        store = FeatureStore(tmp_path, SETTINGS)
        assert len(store) == 1000 // FORMAT.bytes_per_tile
        for number in range(len(store)):
            assert torch.equal(read(store, number), tiles(number))

    def test_a_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"settings.json cannot be read"):
            FeatureStore(tmp_path / "file" / "sub", SETTINGS)
        with pytest.raises(RunError, match="Features could not be written"):
            FeatureWriter(tmp_path / "file" / "sub", SETTINGS)

    def test_killed_at_any_moment(self, tmp_path):
        complete = 0
        for seconds in (0.0, 0.01, 0.1, 0.3):
            process = FORK.Process(target=fill, args=(tmp_path, range(10**6), 3))
            process.start()
            time.sleep(seconds)
            process.kill()
            process.join(20)
            store = FeatureStore(tmp_path, SETTINGS)
            assert store.num_damaged == 0
            for number in range(len(store)):
                assert torch.equal(read(store, number), tiles(number, 3))
            complete = max(complete, len(store))
        assert complete > 3

    def test_two_processes_at_once(self, tmp_path):
        processes = [FORK.Process(target=fill, args=(tmp_path, numbers)) for numbers in (range(60), range(40, 100))]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        store = FeatureStore(tmp_path, SETTINGS)
        assert (len(store), store.num_damaged) == (100, 0)
        for number in range(100):
            assert torch.equal(read(store, number), tiles(number))


class TestEntryLog:
    DTYPE = np.dtype([("digest", DIGEST), ("value", "<u8"), (CHECKSUM, "<u4")])

    def entries(self, *values: int) -> np.ndarray:
        return np.array([(np.void(digest(value)), value, 0) for value in values], dtype=self.DTYPE)

    def test_a_reader_sees_what_is_appended(self, tmp_path):
        writer = EntryWriter(tmp_path / "log", self.DTYPE, b"owner")
        reader = EntryReader(tmp_path / "log", self.DTYPE, b"owner")
        assert len(reader.read_new()) == 0
        writer.append(self.entries(1, 2))
        assert reader.read_new()["value"].tolist() == [1, 2]
        writer.append(self.entries(3))
        assert reader.read_new()["value"].tolist() == [3]

    def test_half_an_entry_waits(self, tmp_path):
        writer = EntryWriter(tmp_path / "log", self.DTYPE, b"owner")
        writer.append(self.entries(1, 2))
        whole = (tmp_path / "log").read_bytes()
        reader = EntryReader(tmp_path / "log", self.DTYPE, b"owner")
        (tmp_path / "log").write_bytes(whole[:-1])
        assert reader.read_new()["value"].tolist() == [1]
        (tmp_path / "log").write_bytes(whole)
        assert reader.read_new()["value"].tolist() == [2]
        assert reader.num_damaged == 0

    def test_a_file_that_another_writes_is_not_touched(self, tmp_path):
        EntryWriter(tmp_path / "log", self.DTYPE, b"owner")
        with pytest.raises(FileExistsError):
            EntryWriter(tmp_path / "log", self.DTYPE, b"owner")

    @given(st.lists(st.binary(min_size=16, max_size=16), max_size=20), st.lists(st.binary(min_size=16, max_size=16)))
    def test_digests_are_found_byte_by_byte(self, some, others):
        known = sorted(set(some))
        wanted = [*others, *known, bytes(16)]
        found = find_digests(np.frombuffer(b"".join(known), DIGEST), np.frombuffer(b"".join(wanted), DIGEST))
        assert found.tolist() == [known.index(one) if one in known else -1 for one in wanted]


class _Source:
    """A source of records that holds images itself."""

    name = "source"

    def __init__(self, state: str, images: list[bytes]):
        self.state, self.images, self.num_read = state, images, 0

    def fingerprint(self) -> str:
        return self.state

    def image_bytes(self, index: int, position: int) -> bytes:
        self.num_read += 1
        return self.images[index + position]


class TestContents:
    """Digests of images, remembered by path, size and times, or by the source that holds them."""

    @pytest.fixture(autouse=True)
    def _no_waiting(self, monkeypatch):
        monkeypatch.setattr("llava_ft.data.features.image_contents._SETTLED_SECONDS", 0.0)

    def image(self, path: Path, content: bytes | None = None) -> LocatedImage:
        if content is not None:
            path.write_bytes(content)
        return LocatedImage(ImagePlace(), str(path))

    def contents(self, *images: LocatedImage) -> list[bytes]:
        return [bytes(one) for _, contents in image_contents(images, group=2) for one in contents]

    def remember(self, table: ContentTable, images: list[LocatedImage]) -> None:
        for states, contents in image_contents(images):
            table.add(states, contents)
        table.close()
        table.refresh()

    def found(self, table: ContentTable, images: list[LocatedImage]) -> list[bytes]:
        return [bytes(one) for one in table.find(image_states(images))]

    def test_copies_and_renamed_files_have_the_same_content(self, tmp_path):
        images = [self.image(tmp_path / name, b"picture") for name in ("a", "b", "c")]
        (tmp_path / "c").rename(tmp_path / "d")
        images[2] = self.image(tmp_path / "d")
        assert self.contents(*images) == [digest_of(b"picture")] * 3

    def test_a_second_look_reads_nothing(self, tmp_path):
        images = [self.image(tmp_path / str(number), bytes([number])) for number in range(5)]
        self.remember(ContentTable(tmp_path / "table"), images)
        again = ContentTable(tmp_path / "table")
        assert self.found(again, images) == [digest_of(bytes([number])) for number in range(5)]

    @pytest.mark.parametrize("same_times", [False, True])
    def test_a_changed_file_is_not_taken_for_the_old_one(self, tmp_path, same_times):
        image = self.image(tmp_path / "a", b"old")
        before = (tmp_path / "a").stat()
        table = ContentTable(tmp_path / "table")
        self.remember(table, [image])
        time.sleep(0.02)
        self.image(tmp_path / "a", b"new")
        if same_times:
            os.utime(tmp_path / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert self.found(table, [image]) == [NO_CONTENT]

    def test_a_file_changed_just_now_is_read_later(self, tmp_path, monkeypatch):
        monkeypatch.setattr("llava_ft.data.features.image_contents._SETTLED_SECONDS", 0.3)
        image = self.image(tmp_path / "a", b"new")
        start = time.monotonic()
        assert self.contents(image) == [digest_of(b"new")]
        assert time.monotonic() - start > 0.25

    def test_an_image_in_a_source_is_known_by_the_sources_fingerprint(self, tmp_path):
        table = ContentTable(tmp_path / "table")
        source = _Source("one", [b"a", b"b"])
        images = [LocatedImage(ImagePlace(None, source), embedded_name(index, 0)) for index in range(2)]
        self.remember(table, images)
        assert source.num_read == 2
        assert self.found(table, images) == [digest_of(b"a"), digest_of(b"b")]
        assert source.num_read == 2
        source.state = "two"
        assert self.found(table, images) == [NO_CONTENT] * 2

    def test_files_that_cannot_be_read_have_no_content(self, tmp_path):
        images = [self.image(path) for path in (tmp_path / "missing", tmp_path, Path("\0"))]
        images.append(LocatedImage(ImagePlace(), "relative.jpg"))
        assert [bytes(one) for one in image_states(images)][::2] == [NO_CONTENT] * 2
        assert self.contents(*images) == [NO_CONTENT] * 4

    def test_digests_that_cannot_be_kept(self, tmp_path):
        (tmp_path / "file").write_text("")
        table = ContentTable(tmp_path / "file")
        some = np.frombuffer(digest(1), DIGEST)
        with pytest.raises(RunError, match="digests of images could not be written"):
            table.add(some, some)
