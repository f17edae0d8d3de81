"""Where the images of a data set are, and whether they can be used, before a run depends on them."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final, Literal

from llava_ft.data.images import ImageError, check_image_file, check_image_header, load_image

ImageCheck = Literal["none", "exists", "header", "decode"]
"""How much of an image file is read before training."""

IMAGE_CHECKS: Final = ("none", "exists", "header", "decode")

_FILES_PER_TASK: Final = 128
_MAX_THREADS: Final = 32


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


def check_image(path: str | os.PathLike[str], level: ImageCheck) -> None:
    """Check one file: that it "exists", that its "header" can be read, or that all of it can be decoded.

    Raises:
        ImageError: It cannot be used.
    """
    if level == "exists":
        check_image_file(path)
    elif level == "header":
        check_image_header(path)
    elif level == "decode":
        load_image(path)


def find_bad_images(paths: Iterable[str], level: ImageCheck) -> dict[str, ImageError]:
    """Check many files at once, each of them once, in threads.

    Args:
        paths: The files, in any order.
        level: See `check_image`; "none" checks nothing.

    Returns:
        What is wrong with each file that cannot be used.
    """
    if level == "none":
        return {}

    def check_some(some: list[str]) -> dict[str, ImageError]:
        found: dict[str, ImageError] = {}
        for path in some:
            try:
                check_image(path, level)
            except ImageError as error:
                found[path] = error
        return found

    bad: dict[str, ImageError] = {}
    with ThreadPoolExecutor(min(_MAX_THREADS, 4 * (os.cpu_count() or 1))) as pool:
        for found in pool.map(check_some, list(_in_groups(dict.fromkeys(paths), _FILES_PER_TASK))):
            bad.update(found)
    return bad


def _in_groups(paths: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(paths)
    while group := list(islice(remaining, size)):
        yield group
