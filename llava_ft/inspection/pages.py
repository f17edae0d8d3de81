"""Pages to look at data in a browser: templates filled in, with images as thumbnails.

A page loads nothing: styles, charts and pictures are in it, and a content policy forbids the browser anything else.
What comes from records is untrusted: everything is escaped, and control characters are shown as escapes.
"""

import base64
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llava_ft.data.image_files import ImagePlace, load_image
from llava_ft.errors import ImageError, UserError
from llava_ft.terminal import visible

THUMBNAIL_SIDE: Final = 160
"""Pixels of the longer side of a thumbnail."""

_JPEG_QUALITY: Final = 75


def render_page(template: str, **values: Any) -> Iterator[str]:
    """Fill in a template of `templates/`, piece by piece: an iterator among `values` is never held as a whole."""
    environment = Environment(
        loader=PackageLoader("llava_ft.inspection"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    )
    environment.globals["thumbnail"] = thumbnail
    return environment.get_template(template).generate(**values)


def thumbnail(image: str, place: ImagePlace) -> tuple[str, str]:
    """Give an image, as its record names it, as a small JPEG in a `data:` address; or "" and why it cannot be."""
    try:
        picture = load_image(place.content(image), name=place.locate(image))
    except (ImageError, MemoryError) as error:
        return "", str(error) or "too large for the memory"
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode('ascii')}", ""


def write_page(path: Path, parts: Iterable[str]) -> None:
    """Write a page piece by piece; it appears under its name when it is whole.

    Raises:
        UserError: The file cannot be written.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with staged.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(parts)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"The page {path} cannot be written: {error.strerror}. Name another file.") from None
