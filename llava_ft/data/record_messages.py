"""Content of a message that is a list of parts, as OpenAI and Hugging Face write it: text and images in turn."""

from collections.abc import Mapping, Sequence
from typing import Final

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.record_checks import RecordChecks, is_list, is_mapping, kind_of, shown
from llava_ft.data.record_images import ImageValue, check_image_value
from llava_ft.data.turns import Speaker

_IMAGE_KEYS: Final = ("image", "path", "url", "image_url", "bytes")
"""Where a part of type `image` may hold its image."""


class ContentReader:
    """Turns contents into text with placeholders, and collects the images in the order of these.

    A part that holds its image brings it along. A part without one, and an `<image>` written in the text, takes the
    next image of the record's own `images`.
    """

    def __init__(self, columns: Sequence[ImageValue], checks: RecordChecks):
        """Set up for one record.

        Args:
            columns: Images under the record's own `image` or `images`.
            checks: Of this record.
        """
        self._columns = columns
        self._unused = dict.fromkeys(range(len(columns)))
        self._checks = checks
        self._images: list[ImageValue] = []

    def images(self) -> list[ImageValue]:
        """Give all images; those that no placeholder took stand last, so that their number is seen to be wrong."""
        return [*self._images, *(self._columns[place] for place in self._unused)]

    def text_of(self, content: object, speaker: Speaker, where: str) -> str:
        """Make the text of one message.

        Raises:
            BadSampleError: Kinds: "bad-text", "bad-part", "bad-image", "image-is-url", "image-in-answer",
                "image-in-system", "placeholder-mismatch".
        """
        place = f"the 'content' of {where}"
        if isinstance(content, str):
            return self._plain_text(content, speaker, place)
        if not is_list(content) or not content:
            told = "an empty list" if is_list(content) else kind_of(content)
            self._checks.fail("bad-text", f"{place} is {told}, not a string or a list of parts.")
        text = ""
        for number, part in enumerate(content):
            piece = self._part(part, speaker, f"part {number} of {place}")
            is_after_image = text.endswith(IMAGE_TOKEN) and not piece.startswith("\n")
            text += f"\n{piece}" if is_after_image and piece else piece
        return text

    def _plain_text(self, text: str, speaker: Speaker, where: str) -> str:
        self._checks.check_text(text, where, "bad-text")
        if speaker == "human":
            for _ in range(text.count(IMAGE_TOKEN)):
                if self._unused:
                    self._take(next(iter(self._unused)))
        return text

    def _part(self, part: object, speaker: Speaker, where: str) -> str:
        if not is_mapping(part):
            self._checks.fail("bad-part", f"{where} is {kind_of(part)}, not an object with a 'type'.")
        kind = part.get("type")
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                self._checks.fail("bad-text", f"the 'text' of {where} is {kind_of(text)}, not a string.")
            return self._plain_text(text, speaker, f"the 'text' of {where}")
        if kind not in ("image", "image_url"):
            told = shown(kind) if isinstance(kind, str) else kind_of(kind)
            self._checks.fail("bad-part", f"{where} is of type {told}; allowed are 'text', 'image' and 'image_url'.")
        if speaker != "human":
            found = "image-in-system" if speaker == "system" else "image-in-answer"
            self._checks.fail(found, f"{where} is an image. Images are only allowed in messages from 'user'.")
        self._add_image(part, where, needs_own=kind == "image_url")
        return IMAGE_TOKEN

    def _add_image(self, part: Mapping[str, object], where: str, *, needs_own: bool) -> None:
        for key in _IMAGE_KEYS:
            value = part.get(key)
            if key == "image_url" and is_mapping(value):
                value = value.get("url")
            if value is not None:
                self._images.append(check_image_value(value, where, self._checks))
                return
        if needs_own:
            self._checks.fail("bad-image", f"{where} has no address. Write {{'url': ...}} under 'image_url'.")
        place = part.get("index")
        if place is None:
            place = next(iter(self._unused), None)
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(self._columns):
            self._checks.fail(
                "placeholder-mismatch",
                f"{where} stands for an image of the record's 'images', which has {len(self._columns)}. Each such "
                "part needs one; add it there, or write its path under 'image'.",
            )
        self._take(place)

    def _take(self, place: int) -> None:
        self._images.append(self._columns[place])
        self._unused.pop(place, None)
