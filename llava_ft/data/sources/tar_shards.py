"""Records in tar shards, in the layout of WebDataset: `0001.json`, `0001.jpg`, `0002.json`, ...

Members are read where they are in the shard; nothing is unpacked to disk.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.records import BrokenRecord, DataUri, EmbeddedImage, is_list, is_mapping
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.index_files import Array, map_array, note_long_search, prepare_arrays
from llava_ft.data.sources.tables import fingerprint_files
from llava_ft.data.sources.tar_index import IMAGE, JSON, TEXT, index_shards, key_of
from llava_ft.errors import ImageError, UserError

_INDEX_VERSION: Final = 1
_BAD: Final = "bad-member"


class TarSource(RecordSource):
    """The records of one or more shards, one after the other."""

    def __init__(self, name: str, files: Sequence[Path], image_folder: str | None = None):
        """Set up for shards.

        Args:
            name: For messages.
            files: The shards, in order.
            image_folder: As in `RecordSource`; for records that name images outside the shard.
        """
        super().__init__(name, image_folder)
        self.files = list(files)
        self._index: Path | None = None
        self._arrays: dict[str, Array] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave out the mapped arrays: a copy in another process maps them itself."""
        return self.__dict__ | {"_arrays": {}}

    def fingerprint(self) -> str:
        """Give a hash of the names, sizes and times of the shards."""
        return fingerprint_files(self.files)

    def prepare(self, cache_dir: Path) -> None:
        """Note where each member is."""
        self._index = Path(cache_dir) / "records" / f"tar-{_INDEX_VERSION}-{self.fingerprint()}"
        prepare_arrays(self._index, self._build)

    def __len__(self) -> int:
        return len(self._array("record_ends")) - 1

    def read(self, start: int, stop: int) -> Iterator[object]:
        """Read the text members of a range of records."""
        shard_ends = self._array("shard_ends")
        while start < stop:
            shard = int(np.searchsorted(shard_ends, start, side="right")) - 1
            last = min(stop, int(shard_ends[shard + 1]))
            with self._open(shard) as file:
                for row in range(start, last):
                    yield self._record(row, file)
            start = last

    def _image_content(self, index: int, value: EmbeddedImage | bytes | DataUri, name: str) -> bytes:
        if not isinstance(value, EmbeddedImage):
            return super()._image_content(index, value, name)
        shard = int(np.searchsorted(self._array("shard_ends"), index, side="right")) - 1
        with self._open(shard) as file:
            content = self._content(int(value.address[0]), file)
        if not content:
            raise ImageError(name, "image-empty", "is an empty file")
        return content

    def _build(self) -> dict[str, Array]:
        note_long_search(self.name, sum(file.stat().st_size for file in self.files if file.exists()))
        arrays = index_shards(self.files)
        if len(arrays["record_ends"]) == 1:
            raise UserError(
                f"Data set {self.name} holds no record. Its shards need members such as 0001.json and 0001.jpg."
            )
        return arrays

    def _array(self, name: str) -> Array:
        if name not in self._arrays:
            assert self._index is not None, "the source is not prepared"
            self._arrays[name] = map_array(self._index, name)
        return self._arrays[name]

    def _open(self, shard: int) -> BinaryIO:
        path = self.files[shard]
        try:
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) != tuple(self._array("states")[shard].tolist()):
                raise UserError(
                    f"Shard {path} changed after it was first read. Leave it as it is during a run, and start again."
                )
            return path.open("rb")
        except OSError as error:
            raise UserError(f"Shard {path} cannot be read: {error.strerror}.") from None

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
        key = key_of(names[places[0]])
        kinds = self._array("members")["kind"]
        of_kind = {kind: [place for place in places if kinds[place] == kind] for kind in (JSON, TEXT, IMAGE)}
        if len(set(names.values())) < len(names) or len(of_kind[JSON]) > 1 or len(of_kind[TEXT]) > 1:
            return BrokenRecord(
                key,
                _BAD,
                f"the shard holds several texts or two members of one name for it: {', '.join(names.values())}. What "
                "belongs together shares its name up to the first dot, and nothing else may.",
            )
        images = {names[place]: EmbeddedImage((place,)) for place in of_kind[IMAGE]}
        if of_kind[JSON]:
            return _json_record(key, self._content(of_kind[JSON][0], file), images)
        if of_kind[TEXT] and images:
            return _caption_record(key, self._content(of_kind[TEXT][0], file), images)
        has, needs = ("a .txt", "an image") if of_kind[TEXT] else ("an image", "a .json or .txt")
        return BrokenRecord(key, _BAD, f"the shard holds {has} for it, but not {needs}. Add it, or take both out.")


def _caption_record(key: str, text: bytes, images: Mapping[str, EmbeddedImage]) -> object:
    try:
        caption = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return BrokenRecord(key, _BAD, f"its .txt is not UTF-8 text (byte {error.start}). Save it as UTF-8.")
    question = "\n".join([IMAGE_TOKEN] * len(images))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"id": key, "images": list(images.values()), "conversations": turns}


def _json_record(key: str, text: bytes, images: Mapping[str, EmbeddedImage]) -> object:
    try:
        value: object = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BrokenRecord(key, _BAD, f"its .json is not valid JSON: {error}. Write the member again.")
    if not isinstance(value, dict):
        return value
    record = cast("dict[str, object]", value)
    if record.get("id") is None:
        record["id"] = key
    if not images:
        return record
    by_name = {name.rpartition("/")[2]: image for name, image in images.items()} | dict(images)
    if not _place_members(record, by_name):
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
