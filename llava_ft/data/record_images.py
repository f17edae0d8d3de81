"""The images of a record: paths, or content that comes with the record."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Final
from urllib.parse import unquote, urlsplit

from llava_ft.data.record_checks import RecordChecks, is_list, is_mapping, kind_of, shown
from llava_ft.data.sample import EMBEDDED
from llava_ft.errors import ImageError

_BAD: Final = "bad-image"
_COLUMNS: Final = ("image", "images")
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI: Final = re.compile(r"data:image/[\w.+-]+(;[\w.=-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """Stands in a raw record for the content of an image, which the source reads when it is needed.

    Attributes:
        address: Where in the record's row the content is; the source that made it knows how to follow it.
    """

    address: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class DataUri:
    """An image written into the record as `data:image/...;base64,...`."""

    text: str


ImageValue = str | bytes | DataUri | EmbeddedImage
"""One image of a record: a path, or where its content is."""


def column_images(record: Mapping[str, object], checks: RecordChecks) -> list[ImageValue]:
    """Check the images under the record's own `image` or `images`.

    Raises:
        BadSampleError: One of them is not an image ("bad-image"), or an address on the web ("image-is-url").
    """
    given = {name: record[name] for name in _COLUMNS if record.get(name) is not None}
    if len(given) == 2:
        first, second = (list(value) if is_list(value) else [value] for value in given.values())
        if first and second and first != second:
            checks.fail(_BAD, "it has both 'image' and 'images', and they differ. Leave one of the two out.")
        given = {"image": given["image"]} if first else {"images": given["images"]}
    for name, value in given.items():
        if is_list(value):
            return [check_image_value(item, f"'{name}'[{place}]", checks) for place, item in enumerate(value)]
        return [check_image_value(value, f"'{name}'", checks)]
    return []


def check_image_value(value: object, where: str, checks: RecordChecks) -> ImageValue:
    """Check one image, in any of the ways it can be written.

    Args:
        value: A path, a `file://` or `data:` address, the content as bytes, or an object with `bytes` and `path`.
        where: Its place in the record, for messages.
        checks: Of this record.

    Raises:
        BadSampleError: It is none of these ("bad-image"), or an address on the web ("image-is-url").
    """
    if isinstance(value, EmbeddedImage):
        return value
    if isinstance(value, bytes):
        if not value:
            checks.fail(_BAD, f"{where} holds no bytes. For a record without image leave it out.")
        return value
    if is_mapping(value):
        return _check_struct(value, where, checks)
    if isinstance(value, str):
        return _check_path(value, where, checks)
    checks.fail(_BAD, f"{where} is {kind_of(value)}. Give the path of a file as a string.")


def _check_struct(value: Mapping[str, object], where: str, checks: RecordChecks) -> ImageValue:
    """Check what the image column of a Hugging Face data set holds; its bytes come before its path."""
    if not value or not set(value) <= {"bytes", "path"}:
        checks.fail(
            _BAD, f"{where} is an object. Give the path of a file as a string, or an object with 'bytes' and 'path'."
        )
    content, path = value.get("bytes"), value.get("path")
    if content is None and path is None:
        checks.fail(_BAD, f"{where} has neither 'bytes' nor a 'path'. For a record without image leave it out.")
    if content is None:
        return check_image_value(path, f"the 'path' of {where}", checks)
    if not isinstance(content, (bytes, EmbeddedImage)):
        checks.fail(
            _BAD,
            f"the 'bytes' of {where} are {kind_of(content)}. In a text file write the image as "
            "'data:image/jpeg;base64,...' instead.",
        )
    return check_image_value(content, where, checks)


def _check_path(path: str, where: str, checks: RecordChecks) -> ImageValue:
    if path[:5].lower() == "data:":
        if not _DATA_URI.match(path):
            checks.fail(_BAD, f"{where} is {shown(path)}; allowed is 'data:image/TYPE;base64,' followed by the image.")
        return DataUri(path)
    if not path.strip():
        checks.fail(_BAD, f"{where} is an empty path. For a record without image leave it out.")
    if path[:7].lower() == "file://":
        path = _path_of_file_address(path, where, checks)
    elif _ADDRESS.match(path):
        checks.fail(
            "image-is-url",
            f"{where} is {shown(path)}, which is an address; download it and give the path of the file.",
        )
    if path.startswith(EMBEDDED):
        checks.fail(
            _BAD, f"{where} is {shown(path)}; names that start with {EMBEDDED!r} are reserved. Write './' first."
        )
    if "\0" in path or PurePosixPath(path).name in ("", "..") or PureWindowsPath(path).name == "":
        checks.fail(_BAD, f"{where} is {shown(path)}, which does not name a file.")
    checks.check_text(path, where, _BAD)
    return path


def _path_of_file_address(address: str, where: str, checks: RecordChecks) -> str:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        checks.fail(_BAD, f"{where} is {shown(address)}; a file on this machine is written 'file:///absolute/path'.")
    return unquote(address[len("file://") + len(parts.netloc) :])


def decode_content(value: bytes | DataUri, name: str) -> bytes:
    """Give the file content of an image that is written in the record itself.

    Args:
        value: From `check_image_value`.
        name: Name of the image, for messages.

    Raises:
        ImageError: The base64 text is damaged ("image-corrupt").
    """
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value.text.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(name, "image-corrupt", f"is not base64 text: {error}") from None
