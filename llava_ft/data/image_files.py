"""Images as files: where those of a data set are, and reading them with whatever goes wrong told as one error.

Nothing here needs PyTorch, so processes that only look at images do without it.
"""

import io
import os
import re
import stat
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from llava_ft.data.records import parse_embedded
from llava_ft.data.sources.base import RecordSource
from llava_ft.errors import ImageError, UserError
from llava_ft.geometry import SizeWH

EMBEDDED_NAME: Final = "embedded in the data"  # what an image without a file is called, if nothing better is known

ImageSource = str | os.PathLike[str] | bytes  # an image file by its path, or its content
MAX_SIDE: Final = 65_535
"""Longest side of an image, in pixels: JPEG's limit, kept for every format so that memory stays bounded."""

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The formats of Pillow that files of data are read as; every `Image.open` of the package is given them.

In is what data sets hold: JPEG (with it the MPO of cameras and telephones), PNG (APNG), WEBP, GIF and BMP of the web,
TIFF of scans, microscopes and satellites, PPM (PBM, PGM, PNM) of older research sets. Out is everything else, because a
file chooses its reader by its content, whatever its name says:

- page descriptions: EPS starts Ghostscript, a program that runs what it is given; WMF and EMF are drawn by Windows;
- stubs that hand the file to whoever registered for it: BUFR, GRIB, HDF5;
- JPEG 2000 and AVIF: large decoders, which not every build of Pillow from 10.3 on has;
- formats of editors, games, icons and instruments (PSD, DDS, BLP, ICNS, ICO, TGA, FITS, FLI, PCX, SGI, ...): rare in
  data, little tested, and the ones whose readers wrote outside their memory or unpacked without end (DDS, PSD, FITS).
"""
_READ: Final = "JPEG, PNG, WebP, GIF, BMP, TIFF and PPM"
_FOREIGN: Final = re.compile(
    rb"(?P<SVG>\s*(?:<\?xml[^>]*>\s*)?<svg)|(?P<PDF>%PDF)|(?P<HEIF>....ftyp(?:hei|hev|mif|msf))|(?P<AVIF>....ftypavi)"
    rb"|(?P<video>....ftyp|\x1aE\xdf\xa3|RIFF....AVI )|(?P<JPEG_XL>\xff\x0a|....JXL )"
    rb"|(?P<PostScript>%!PS|\xc5\xd0\xd3\xc6)",
    re.DOTALL,
)
"""How files start that are met in the place of pictures, some of which no reader of Pillow knows."""

ImageCheck = Literal["none", "exists", "header", "decode"]
"""How much of an image file is read before training."""

IMAGE_CHECKS: Final = ("none", "exists", "header", "decode")  # from nothing to everything


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where the images of one source are."""

    folder: str | os.PathLike[str] | None = None  # relative paths start from it; None allows absolute ones only
    source: RecordSource | None = None  # holds the images that are embedded in the records

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
    """Find the file that a record names by an absolute path, or by one relative to `image_folder`.

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


def refuse_unreadable_images(owner: str, images: Sequence[str], place: ImagePlace, *, has_tower: bool) -> None:
    """Refuse a request under which no image of `owner`, a record or source, could be read at all.

    Raises:
        UserError: There are images, but no vision tower, or no folder that their relative paths start from.
    """
    if images and not has_tower:
        raise UserError(
            f"{owner} has images, but the model has no vision tower. Pass --vision_tower, start from a LLaVA "
            "checkpoint, or take the images out of the records."
        )
    relative = next((image for image in images if is_relative(image)), None)
    if relative is None:
        return
    if place.folder is None:
        raise UserError(
            f"{owner} has the image {relative!r}, a relative path, but there is no image folder. Pass --image_folder."
        )
    if not Path(place.folder).is_dir():
        raise UserError(
            f"The image folder {str(place.folder)!r} is not a directory, but {owner} has images in it. Check "
            "--image_folder."
        )


def is_relative(image: str) -> bool:
    """Whether an image of a record is a path that starts from the image folder."""
    return not os.path.isabs(image) and parse_embedded(image) is None


def check_image_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Check that `path` is a regular file with something in it, without opening it; give what the system says of it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ImageError(path, "image-missing", "does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(path, "image-unreadable", f"cannot be reached: {reason}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(path, "image-not-a-file", "is a directory, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "image-not-a-file", "is a pipe, socket or device, not a regular file")
    if status.st_size == 0:
        raise ImageError(path, "image-empty", "is an empty file")
    return status


def check_image_header(
    source: ImageSource, *, exif_transpose: bool = False, name: str = EMBEDDED_NAME
) -> tuple[int, int]:
    """Read the width and height of an image in pixels without decoding it.

    With `exif_transpose` they are those after turning the picture as its EXIF orientation says, for which some PNG
    files have to be decoded. `name` is what content without a path is called in messages.

    Raises:
        ImageError: The file is missing, is not an image, or is too large to be decoded.
    """
    with _opened(source, name) as image:
        return swapped(image.size) if exif_transpose and _is_on_its_side(image) else image.size


def load_image(
    source: ImageSource,
    *,
    exif_transpose: bool = False,
    fast_decode_to: Callable[[SizeWH], SizeWH] | None = None,
    name: str = EMBEDDED_NAME,
) -> Image.Image:
    """Decode an image file as RGB.

    The conversion is Pillow's, as in LLaVA: transparency is dropped, an animation gives its first frame, and
    greys of more than 8 bits are cut off at 255 and not scaled.

    Args:
        source: Path or content of the file.
        exif_transpose: Turn the picture as its EXIF orientation says. LLaVA ignores the orientation.
        fast_decode_to: Lets the JPEG decoder shrink the picture to 1/2, 1/4 or 1/8 while decoding, which is several
            times faster and gives slightly other pixels. The function is given the picture's size and returns the
            smallest that will do, such as `ImageTransform.decode_size`.
        name: What content without a path is called in messages.

    Raises:
        ImageError: The file is missing, not an image, damaged, cut short, or too large to be decoded.
    """
    with _opened(source, name) as image:
        if fast_decode_to is not None:
            turned = exif_transpose and _is_on_its_side(image)
            needed = fast_decode_to(swapped(image.size) if turned else image.size)
            image.draft(None, swapped(needed) if turned else needed)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if exif_transpose else image)


@contextmanager
def _opened(source: ImageSource, name: str) -> Generator[Image.Image]:
    """Open an image of a size that can be decoded.

    Whatever the file system or a Pillow decoder raises, then or in the block, becomes an `ImageError`.
    """
    path = name if isinstance(source, bytes) else source
    if not isinstance(source, bytes):
        check_image_file(source)
    elif not source:
        raise ImageError(path, "image-empty", "is empty")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < 1:
                raise ImageError(path, "image-corrupt", f"has a size of {width} x {height} pixels")
            if max(width, height) > MAX_SIDE:
                reason = f"is {width} x {height} pixels; a side can have {MAX_SIDE} at most"
                raise ImageError(path, "image-too-large", reason)
            yield image
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(path, "image-too-large", f"is too large to be decoded: {error}") from None
    except UnidentifiedImageError:
        raise _unidentified(source, path) from None
    # Decoders meet damaged files with whatever their parsing happens to raise: struct.error, SyntaxError ...
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(path, "image-unreadable", f"cannot be read: {error.strerror}") from None
        kind = "image-truncated" if "truncated" in str(error).lower() else "image-corrupt"
        told = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ImageError(path, kind, f"cannot be decoded: {told}") from None


def _unidentified(source: ImageSource, path: str | os.PathLike[str]) -> ImageError:
    """Say what a file is that is in none of `FORMATS`. Only its first bytes are looked at; no reader is started."""
    if isinstance(source, bytes):
        start = source[:256]
    else:
        with open(source, "rb") as file:
            start = file.read(256)
    known = _FOREIGN.match(start)
    name = known.lastgroup if known else None
    if name is None and len(start) >= 16:  # what Pillow's readers expect to be shown
        Image.init()
        name = next((name for name, (_, accepts) in Image.OPEN.items() if accepts and accepts(start[:16])), None)
    if name is None or name in FORMATS:
        return ImageError(path, "image-corrupt", f"is not an image in a format that is read here ({_READ})")
    told = f"is a file of the format {name.replace('_', ' ')}, whatever its name says; read are {_READ}"
    return ImageError(path, "image-format", f"{told}. Convert it to PNG, or to JPEG if it is a photograph")


def _is_on_its_side(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def swapped(size: tuple[int, int]) -> tuple[int, int]:
    """Give height and width for width and height, or the other way round."""
    return size[1], size[0]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to RGB as LLaVA does; transparency is dropped."""
    if image.mode == "RGB":
        return image.copy()
    # RGB has no transparency; Pillow would otherwise warn about some palettes for every single picture.
    image.info.pop("transparency", None)
    return image.convert("RGB")
