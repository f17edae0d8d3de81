"""Digests of images, remembered by path, size and times, or by the source that holds them."""

import os
import time
from pathlib import Path

import pytest

from llava_ft.data.features.contents import NO_CONTENT, RunImage, content_digests
from llava_ft.data.features.store import digest_of
from llava_ft.data.image_files import ImagePlace
from llava_ft.data.image_reader import ImageReader, ImageRef
from llava_ft.data.records import embedded_name
from llava_ft.errors import RunError


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


def image_at(name: str, place: ImagePlace | None = None) -> RunImage:
    return RunImage(ImageReader(None, [place or ImagePlace()]), ImageRef(name))


class TestContents:
    @pytest.fixture(autouse=True)
    def _no_waiting(self, monkeypatch):
        monkeypatch.setattr("llava_ft.data.features.contents._SETTLED_SECONDS", 0.0)

    def image(self, path: Path, content: bytes | None = None) -> RunImage:
        if content is not None:
            path.write_bytes(content)
        return image_at(str(path))

    def test_copies_and_renamed_files_have_the_same_content(self, tmp_path):
        images = [self.image(tmp_path / name, b"picture") for name in ("a", "b", "c")]
        (tmp_path / "c").rename(tmp_path / "d")
        images[2] = self.image(tmp_path / "d")
        assert content_digests(tmp_path / "table", images) == [digest_of(b"picture")] * 3

    def test_a_second_look_reads_nothing(self, tmp_path, monkeypatch):
        images = [self.image(tmp_path / str(number), bytes([number])) for number in range(5)]
        contents = content_digests(tmp_path / "table", images)
        assert contents == [digest_of(bytes([number])) for number in range(5)]
        monkeypatch.setattr(RunImage, "content_digest", None)
        assert content_digests(tmp_path / "table", images) == contents

    def test_any_byte_of_the_table_changed(self, tmp_path, monkeypatch):
        images = [self.image(tmp_path / str(number), bytes([number])) for number in range(2)]
        contents = content_digests(tmp_path / "table", images)
        (path,) = (tmp_path / "table").iterdir()
        whole = path.read_bytes()
        monkeypatch.setattr(os, "fsync", lambda _: None)
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert content_digests(tmp_path / "table", images) == contents
            for other in set((tmp_path / "table").iterdir()) - {path}:  # what was read anew
                other.unlink()

    @pytest.mark.parametrize("same_times", [False, True])
    def test_a_changed_file_is_not_taken_for_the_old_one(self, tmp_path, same_times):
        image = self.image(tmp_path / "a", b"old")
        before = (tmp_path / "a").stat()
        content_digests(tmp_path / "table", [image])
        time.sleep(0.02)
        self.image(tmp_path / "a", b"new")
        if same_times:
            os.utime(tmp_path / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert content_digests(tmp_path / "table", [image]) == [digest_of(b"new")]

    def test_a_file_changed_just_now_is_read_later(self, tmp_path, monkeypatch):
        monkeypatch.setattr("llava_ft.data.features.contents._SETTLED_SECONDS", 0.3)
        image = self.image(tmp_path / "a", b"new")
        start = time.monotonic()
        assert content_digests(tmp_path / "table", [image]) == [digest_of(b"new")]
        assert time.monotonic() - start > 0.25

    def test_a_file_that_changes_while_it_is_read_is_read_again(self, tmp_path, monkeypatch):
        image, read = self.image(tmp_path / "a", b"first"), RunImage.content_digest
        changes = [b"second, longer"]

        def read_and_change(image: RunImage) -> bytes:
            content = read(image)
            if changes:
                (tmp_path / "a").write_bytes(changes.pop())
            return content

        monkeypatch.setattr(RunImage, "content_digest", read_and_change)
        assert content_digests(tmp_path / "table", [image]) == [digest_of(b"second, longer")]

    def test_an_image_in_a_source_is_known_by_the_sources_fingerprint(self, tmp_path):
        source = _Source("one", [b"a", b"b"])
        images = [image_at(embedded_name(index, 0), ImagePlace(None, source)) for index in range(2)]
        contents = content_digests(tmp_path / "table", images)
        assert source.num_read == 2
        assert content_digests(tmp_path / "table", images) == contents == [digest_of(b"a"), digest_of(b"b")]
        assert source.num_read == 2
        source.state, source.images = "two", [b"c", b"b"]
        assert content_digests(tmp_path / "table", images) == [digest_of(b"c"), digest_of(b"b")]

    def test_files_that_cannot_be_read_have_no_content(self, tmp_path):
        images = [self.image(path) for path in (tmp_path / "missing", tmp_path, Path("\0"))]
        images.append(image_at("relative.jpg"))
        assert content_digests(tmp_path / "table", images) == [NO_CONTENT] * 4
        assert not (tmp_path / "table").exists()

    def test_digests_that_cannot_be_kept(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="digests of images could not be written"):
            content_digests(tmp_path / "file", [self.image(tmp_path / "image", b"picture")])
