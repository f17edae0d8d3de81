"""What is found out about one image: all of it is decoded, once, however many records name it."""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from llava_ft.data.image_files import ImageCheck, ImagePlace, check_image, load_image
from llava_ft.errors import ImageError

IMAGES_PER_TASK: Final = 32


@dataclass(frozen=True, slots=True)
class ImageProblem:
    """Why an image cannot be used.

    Attributes:
        kind: As in `ImageError`.
        reason: The whole message.
        is_found_by_run: Whether the check that a run makes before training would find it too.
    """

    kind: str
    reason: str
    is_found_by_run: bool = True


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """What decoding an image shows.

    Attributes:
        width: In pixels, as the run sees it; 0 if unusable.
        height: In pixels, as the run sees it; 0 if unusable.
        content_key: 8 bytes of hash of the file's content, as a number; 0 if unusable.
        num_bytes: Size of the file.
        problem: Why it cannot be used, else None.
    """

    width: int
    height: int
    content_key: int
    num_bytes: int
    problem: ImageProblem | None = None


@dataclass(frozen=True)
class ImageTask:
    """Some images of one source, to be decoded.

    Attributes:
        place: Where they are.
        images: As the records name them.
        level: The check that the run makes.
        exif_transpose: Whether the run turns pictures as their EXIF orientation says.
    """

    place: ImagePlace
    images: tuple[str, ...]
    level: ImageCheck
    exif_transpose: bool


def examine_images(task: ImageTask) -> list[DecodedImage]:
    """Decode images; whatever is wrong with one is noted and ends nothing."""
    return [_examine(task, image) for image in task.images]


def killed_by(task: ImageTask) -> list[DecodedImage]:
    """Say of images that decoding them ends the process."""
    reason = "ends the process that decodes it: the decoder fails, or memory runs out."
    return [
        DecodedImage(0, 0, 0, 0, ImageProblem("image-crash", f"Image {image!r} {reason}", is_found_by_run=False))
        for image in task.images
    ]


def _examine(task: ImageTask, image: str) -> DecodedImage:
    found_by_run = True
    try:
        found, name = task.place.content(image), task.place.locate(image)
        check_image(found, task.level, name=name)
        found_by_run = False
        picture = load_image(found, exif_transpose=task.exif_transpose, name=name)
        content = found if isinstance(found, bytes) else Path(found).read_bytes()
    except ImageError as error:
        problem = ImageProblem(error.kind, str(error), found_by_run)
    except MemoryError:
        problem = ImageProblem("image-too-large", f"Image {image!r} does not fit into memory.", found_by_run)
    except OSError as error:
        reason = f"Image {image!r} cannot be read: {error.strerror}."
        problem = ImageProblem("image-unreadable", reason, found_by_run)
    else:
        return DecodedImage(*picture.size, content_key(content), len(content))
    return DecodedImage(0, 0, 0, 0, problem)


def content_key(content: bytes) -> int:
    """Give 8 bytes of hash as a number, never 0."""
    return int.from_bytes(blake2b(content, digest_size=8).digest()) or 1
