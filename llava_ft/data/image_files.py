"""Where the images of a data set are: in files below a folder, or in the source of the records itself."""

import os
from dataclasses import dataclass
from typing import Final, Literal

from llava_ft.data.images import (
    EMBEDDED_NAME,
    ImageError,
    ImageSource,
    check_image_file,
    check_image_header,
    load_image,
)
from llava_ft.data.sample import parse_embedded
from llava_ft.data.sources.base import RecordSource

ImageCheck = Literal["none", "exists", "header", "decode"]
"""How much of an image file is read before training."""

IMAGE_CHECKS: Final = ("none", "exists", "header", "decode")
"""From nothing to everything."""


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where the images of one source are.

    Attributes:
        folder: Folder that relative paths start from; None allows absolute paths only.
        source: Holds the images that are embedded in the records; None if there are none.
    """

    folder: str | os.PathLike[str] | None = None
    source: RecordSource | None = None

    def locate(self, image: str) -> str:
        """Name an image so that no other has the name: the path of its file, or its place in the source.

        Raises:
            ImageError: As `resolve_image_path`.
        """
        embedded = parse_embedded(image)
        if embedded is None:
            return resolve_image_path(image, self.folder)
        name = self.source.name if self.source is not None else ""
        return f"{name}#{embedded[0]}/{embedded[1]}"

    def content(self, image: str) -> str | bytes:
        """Give what an image is decoded from: the path of its file, or its bytes.

        Raises:
            ImageError: As `resolve_image_path`, or the source does not have the image.
        """
        embedded = parse_embedded(image)
        if embedded is None:
            return resolve_image_path(image, self.folder)
        if self.source is None:
            raise ImageError(image, "image-missing", "is not in the source of the records")
        return self.source.image_bytes(*embedded)


def resolve_image_path(image: str, image_folder: str | os.PathLike[str] | None) -> str:
    """Find the file that a record names.

    Args:
        image: Path as the record has it: absolute, or relative to `image_folder`.
        image_folder: Folder of the images; None allows absolute paths only.

    Raises:
        ImageError: The path is relative and leaves the folder ("image-outside-folder") or there is no folder
            ("image-without-folder"), or it is an address on the web ("image-is-url").
    """
    if image.startswith(("http://", "https://")):
        raise ImageError(image, "image-is-url", "is an address; download it and give the path of the file")
    if os.path.isabs(image):
        return image
    if image_folder is None:
        raise ImageError(image, "image-without-folder", "is a relative path, but there is no image_folder")
    if os.path.normpath(image).split(os.sep)[0] == os.pardir:
        raise ImageError(
            image,
            "image-outside-folder",
            f"leaves the image folder {os.fspath(image_folder)!r}; give an absolute path if that is meant",
        )
    return os.path.join(image_folder, image)


def check_image(source: ImageSource, level: ImageCheck, *, name: str = EMBEDDED_NAME) -> None:
    """Check one image: that its file "exists", that its "header" can be read, or that all of it can be decoded.

    Args:
        source: Path or content of the file.
        level: How much of it is read; "none" reads nothing.
        name: What content without a path is called in messages.

    Raises:
        ImageError: It cannot be used.
    """
    if level == "exists" and not isinstance(source, bytes):
        check_image_file(source)
    elif level == "header":
        check_image_header(source, name=name)
    elif level == "decode":
        load_image(source, name=name)
