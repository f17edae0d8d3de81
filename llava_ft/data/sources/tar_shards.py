"""Records in tar shards, in the layout of WebDataset: `0001.json`, `0001.jpg`, `0002.json`, ...

Members are read where they are in the shard; nothing is unpacked to disk, and nothing in a member is run. (The loaders
of the webdataset and datasets libraries read shards in order, or copy all of them into tables first.)
"""

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.records import BrokenRecord, DataUri, EmbeddedImage, is_list, is_mapping
from llava_ft.data.sources.base import Array, IndexedSource, fingerprint_files
from llava_ft.errors import ImageError, UserError

_BAD: Final = "bad-member"
_JSON, _TEXT, _IMAGE = 0, 1, 2
"""What a member holds."""

_IMAGE_SUFFIXES: Final = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"
)  # fmt: skip
_KINDS: Final = {".json": _JSON, ".txt": _TEXT, **dict.fromkeys(_IMAGE_SUFFIXES, _IMAGE)}
_MEMBER: Final = np.dtype([("offset", "<i8"), ("size", "<i8"), ("name_end", "<i8"), ("kind", "u1")])
_NUMBERS: Final = re.compile(r"(\d+)")
_BLOCK: Final = 512
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class TarSource(IndexedSource):
    """The records of one or more shards, one after the other."""

    index_kind = "tar-2"

    def fingerprint(self) -> str:
        """Give a hash of the names, sizes and times of the shards."""
        return fingerprint_files(self.files)

    def _read_file(self, place: int, file: BinaryIO, records: range) -> Iterator[object]:
        return (self._record(row, file) for row in records)

    def _image_content(self, index: int, value: EmbeddedImage | bytes | DataUri, name: str) -> bytes:
        if not isinstance(value, EmbeddedImage):
            return super()._image_content(index, value, name)
        with self._open(self._file_of(index)) as file:
            content = self._content(int(value.address[0]), file)
        if not content:
            raise ImageError(name, "image-empty", "is an empty file")
        return content

    def _find_records(self) -> dict[str, Array]:
        """Walk through the headers of all shards: members of one key make one record, in the order of their keys.

        Returns:
            `members`: `(M,)` of `_MEMBER`, those of a record together, images in the order of their names; `names`:
            `(B,)` uint8, their names in a row; `record_ends`: `(R + 1,)` int64, where each record starts and ends in
            `members`; `file_ends`.
        """

        def by_kind_and_name(member: _Member) -> tuple[int, list[str | int]]:  # numbers in names counted as numbers
            pieces = _NUMBERS.split(member[0])
            return member[3], [int(piece) if piece.isdecimal() else piece for piece in pieces]

        members: list[Array] = []
        names = bytearray()
        record_ends, file_ends = array("q", [0]), [0]
        num_members = 0
        for place, path in enumerate(self.files):
            records: dict[str, list[_Member]] = {}
            with self._open(place) as file:
                for member in _members_of(file, path):
                    records.setdefault(_key_of(member[0]), []).append(member)
            rows: list[tuple[int, int, int, int]] = []
            for record in records.values():
                for name, offset, size, kind in sorted(record, key=by_kind_and_name):
                    names += name.encode("utf-8", "surrogateescape")
                    rows.append((offset, size, len(names), kind))
                record_ends.append(num_members + len(rows))
            num_members += len(rows)
            members.append(np.array(rows, dtype=_MEMBER))
            file_ends.append(len(record_ends) - 1)
        if not num_members:
            raise UserError(
                f"Data set {self.name} holds no record. Its shards need members such as 0001.json and 0001.jpg."
            )
        return {
            "members": np.concatenate(members),
            "names": np.frombuffer(bytes(names), dtype=np.uint8),
            "record_ends": np.array(record_ends, dtype=np.int64),
            "file_ends": np.array(file_ends),
        }

    def _content(self, member: int, file: BinaryIO) -> bytes:
        found = self._array("members")[member]
        file.seek(int(found["offset"]))
        return file.read(int(found["size"]))

    def _name(self, member: int) -> str:
        ends = self._array("members")["name_end"]
        first = int(ends[member - 1]) if member else 0
        return self._array("names")[first : int(ends[member])].tobytes().decode("utf-8", "replace")

    def _record(self, row: int, file: BinaryIO) -> object:
        ends = self._array("record_ends")
        places = range(int(ends[row]), int(ends[row + 1]))
        names = {place: self._name(place) for place in places}
        key = _key_of(names[places[0]])
        kinds = self._array("members")["kind"]
        of_kind = {kind: [place for place in places if kinds[place] == kind] for kind in (_JSON, _TEXT, _IMAGE)}
        if len(set(names.values())) < len(names) or len(of_kind[_JSON]) > 1 or len(of_kind[_TEXT]) > 1:
            return BrokenRecord(
                key,
                _BAD,
                f"the shard holds several texts or two members of one name for it: {', '.join(names.values())}. What "
                "belongs together shares its name up to the first dot, and nothing else may.",
            )
        images = {names[place]: EmbeddedImage((place,)) for place in of_kind[_IMAGE]}
        if of_kind[_TEXT] and images and not of_kind[_JSON]:
            try:
                caption = self._content(of_kind[_TEXT][0], file).decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                return BrokenRecord(key, _BAD, f"its .txt is not UTF-8 text (byte {error.start}). Save it as UTF-8.")
            question = "\n".join([IMAGE_TOKEN] * len(images))
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
            return {"id": key, "images": list(images.values()), "conversations": turns}
        if not of_kind[_JSON]:
            has, needs = ("a .txt", "an image") if of_kind[_TEXT] else ("an image", "a .json or .txt")
            return BrokenRecord(key, _BAD, f"the shard holds {has} for it, but not {needs}. Add it, or take both out.")
        try:
            value: object = json.loads(self._content(of_kind[_JSON][0], file).decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            return BrokenRecord(key, _BAD, f"its .json is not valid JSON: {error}. Write the member again.")
        if not isinstance(value, dict):
            return value
        record = cast("dict[str, object]", value)
        if record.get("id") is None:
            record["id"] = key
        by_name = {name.rpartition("/")[2]: image for name, image in images.items()} | images
        if images and not _place_members(record, by_name):
            # A path from before the shard was packed says nothing about its members.
            record.pop("image", None)
            record["images"] = list(images.values())
        return record


def _place_members(record: dict[str, object], by_name: Mapping[str, EmbeddedImage]) -> bool:
    """Put members where the record names them; say whether it names any."""
    found = False

    def placed(value: object) -> object:
        nonlocal found
        if isinstance(value, str) and value in by_name:
            found = True
            return by_name[value]
        return value

    for column in ("image", "images"):
        value = record.get(column)
        if value is not None:
            record[column] = [placed(item) for item in value] if is_list(value) else placed(value)
    messages = record.get("messages")
    for message in messages if is_list(messages) else ():
        parts = message.get("content") if is_mapping(message) else None
        for part in parts if is_list(parts) else ():
            if isinstance(part, dict):
                fields = cast("dict[str, object]", part)
                for name in ("image", "path", "url"):
                    if name in fields:
                        fields[name] = placed(fields[name])
    return found


_Member = tuple[str, int, int, int]
"""Name, offset of the content, its size, and kind."""


def _key_of(name: str) -> str:
    """Give the part of a member's name that the members of one record share: up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _members_of(file: BinaryIO, path: Path) -> Iterator[_Member]:
    """Walk through a shard. Members that are neither JSON nor text nor images are passed over.

    Raises:
        UserError: The shard is compressed, truncated or damaged, or holds links.
    """
    start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"Shard {path} is compressed ({name}), and records are read from anywhere in it. Unpack it to "
                "a plain .tar; the images in it are compressed as they are."
            )
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.__dict__["members"] = []  # They would pile up.
                if info.isdir() or info.name.rpartition("/")[2].startswith("."):
                    continue
                if not info.isreg() or info.issparse():
                    raise UserError(
                        f"Shard {path} holds {info.name!r}, which is a link or not a plain file. Pack the files "
                        "themselves (tar --dereference)."
                    )
                kind = _KINDS.get(os.path.splitext(info.name)[1].lower())
                if kind is not None:
                    yield info.name, info.offset_data, info.size, kind
            file.seek(tar.offset)
            end = file.read(_BLOCK)
    except OSError as error:
        raise UserError(f"Shard {path} cannot be read: {error.strerror or error}. Check --data_path.") from None
    except tarfile.TarError as error:
        raise UserError(
            f"Shard {path} is truncated or not a tar file ({error}). Fetch it again, or leave it out."
        ) from None
    # tarfile stops without a word at a fault in the middle, as it does at the end.
    if len(end) < _BLOCK:
        raise UserError(f"Shard {path} is truncated: the mark of its end is missing. Fetch it again, or leave it out.")
    if end.count(0) != _BLOCK:
        raise UserError(f"Shard {path} is damaged: no member starts where one should. Fetch it again, or leave it out.")
