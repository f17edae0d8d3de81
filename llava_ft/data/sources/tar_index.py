"""Where the members of tar shards are, in flat arrays. Nothing is unpacked, and nothing in a member is run."""

import os
import re
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from llava_ft.data.sources.index_files import Array
from llava_ft.errors import UserError

JSON, TEXT, IMAGE = 0, 1, 2
"""What a member holds."""

_KINDS: Final = {
    ".json": JSON,
    ".txt": TEXT,
    **dict.fromkeys(
        (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"), IMAGE
    ),
}
_BLOCK: Final = 512
_NUMBERS: Final = re.compile(r"(\d+)")
_COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
MEMBER: Final = np.dtype([("offset", "<i8"), ("size", "<i8"), ("name_end", "<i8"), ("kind", "u1")])


def key_of(name: str) -> str:
    """Give the part of a member's name that the members of one record share: up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def index_shards(files: Sequence[Path]) -> dict[str, Array]:
    """Walk through the headers of all shards.

    Members of one key make one record, in the order in which the keys appear. Members that are neither JSON nor text
    nor images are passed over.

    Returns:
        `members`: `(M,)` of `MEMBER`, those of a record together, images in the order of their names; `names`: `(B,)`
        uint8, their names in a row; `record_ends`: `(R + 1,)` int64, where each record starts and ends in `members`;
        `shard_ends`: `(S + 1,)` int64, where each shard starts and ends in the records; `states`: `(S, 2)` int64, size
        and time of each shard.

    Raises:
        UserError: A shard is missing, compressed, truncated or damaged, or holds links.
    """
    members: list[Array] = []
    names = bytearray()
    record_ends, shard_ends = array("q", [0]), array("q", [0])
    states: list[tuple[int, int]] = []
    num_members = 0
    for file in files:
        rows: list[tuple[int, int, int, int]] = []
        for record in _records_in(file, states):
            for name, offset, size, kind in sorted(record, key=_place_in_record):
                names += name.encode("utf-8", "surrogateescape")
                rows.append((offset, size, len(names), kind))
            record_ends.append(num_members + len(rows))
        shard_ends.append(len(record_ends) - 1)
        num_members += len(rows)
        members.append(np.array(rows, dtype=MEMBER))
    return {
        "members": np.concatenate(members),
        "names": np.frombuffer(bytes(names), dtype=np.uint8),
        "record_ends": np.array(record_ends, dtype=np.int64),
        "shard_ends": np.array(shard_ends, dtype=np.int64),
        "states": np.array(states, dtype=np.int64).reshape(-1, 2),
    }


_Member = tuple[str, int, int, int]
"""Name, offset of the content, its size, and kind."""


def _place_in_record(member: _Member) -> tuple[int, list[str | int]]:
    """Sort by kind, then by name, with numbers in names counted as numbers."""
    pieces: list[str | int] = [int(piece) if piece.isdecimal() else piece for piece in _NUMBERS.split(member[0])]
    return member[3], pieces


def _records_in(file: Path, states: list[tuple[int, int]]) -> list[list[_Member]]:
    """Group the members of one shard by key, and note the shard's state."""
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            _refuse_compressed(file, opened.read(8))
            opened.seek(0)
            with tarfile.open(fileobj=opened, mode="r:") as tar:
                records = _walk(file, tar)
                opened.seek(tar.offset)
                _check_end(file, opened.read(_BLOCK))
    except OSError as error:
        raise UserError(f"Shard {file} cannot be read: {error.strerror or error}. Check --data_path.") from None
    except tarfile.TarError as error:
        raise UserError(
            f"Shard {file} is truncated or not a tar file ({error}). Fetch it again, or leave it out."
        ) from None
    states.append((status.st_size, status.st_mtime_ns))
    return records


def _walk(file: Path, tar: tarfile.TarFile) -> list[list[_Member]]:
    records: dict[str, list[_Member]] = {}
    while (info := tar.next()) is not None:
        tar.__dict__["members"] = []  # They would pile up.
        if info.isdir() or info.name.rpartition("/")[2].startswith("."):
            continue
        if not info.isreg() or info.issparse():
            raise UserError(
                f"Shard {file} holds {info.name!r}, which is a link or not a plain file. Pack the files themselves "
                "(tar --dereference)."
            )
        kind = _KINDS.get(os.path.splitext(info.name)[1].lower())
        if kind is not None:
            member = (info.name, info.offset_data, info.size, kind)
            records.setdefault(key_of(info.name), []).append(member)
    return list(records.values())


def _check_end(file: Path, block: bytes) -> None:
    """Tell the end of an archive from a fault in the middle, where tarfile stops without a word."""
    if len(block) < _BLOCK:
        raise UserError(f"Shard {file} is truncated: the mark of its end is missing. Fetch it again, or leave it out.")
    if block.count(0) != _BLOCK:
        raise UserError(f"Shard {file} is damaged: no member starts where one should. Fetch it again, or leave it out.")


def _refuse_compressed(file: Path, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"Shard {file} is compressed ({name}), and records are read from anywhere in it. Unpack it to a plain "
                ".tar; the images in it are compressed as they are."
            )
