"""A conversation about pictures as it grows, and the prompt that continues it.

Turns are written by the template the model was trained with, images by the function that places them in the training
data, so a prompt is the beginning of the text that the finished conversation would be trained on. The `###` templates
are the exception: LLaVA writes them without line breaks at inference, and so does this program.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.conversation import ChatTurn, Template
from llava_ft.data.image_files import load_image
from llava_ft.data.tokenize import place_images
from llava_ft.errors import UserError


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a conversation. Each is itself alone: the same file given twice is two pictures."""

    path: str
    image: Image  # in mode "RGB"

    @classmethod
    def read(cls, path: str) -> "Picture":
        """Read an image file.

        Raises:
            ImageError: It cannot be read.
        """
        return cls(path, load_image(path))


def with_placeholders(text: str, num_images: int) -> str:
    """Return a question with one `<image>` for each image, in front unless it says where.

    Raises:
        UserError: It has another number of them.
    """
    present = text.count(IMAGE_TOKEN)
    if present not in (0, num_images):
        raise UserError(
            f"The question has {present} {IMAGE_TOKEN} but {num_images} images are given. Each needs one; leave them "
            "out of the question to have the images put in front."
        )
    return text if present else f"{IMAGE_TOKEN}\n" * num_images + text


@dataclass(frozen=True)
class Question:
    """What is asked, and the images given with it.

    Raises:
        UserError: The text has another number of `<image>` than there are pictures.
    """

    text: str  # as it was typed
    pictures: tuple[Picture, ...] = ()
    turn_text: str = field(init=False)  # as a record has it: with one `<image>` for each picture

    def __post_init__(self) -> None:
        object.__setattr__(self, "turn_text", with_placeholders(self.text, len(self.pictures)))


@dataclass
class Dialogue:
    """The finished turns of a conversation with one model."""

    template: Template
    mm_use_im_start_end: bool = False  # whether `<im_start>` and `<im_end>` go around each image
    system: str | None = None  # replaces the template's system text; None keeps it
    exchanges: list[tuple[Question, str]] = field(default_factory=list[tuple[Question, str]])

    def prompt(self, question: Question) -> str:
        """Write the text to be continued by the answer to `question`, with images placed as in training.

        Raises:
            TurnsError: The turns do not fit the template.
        """
        turns: list[ChatTurn] = []
        for asked, answer in [*self.exchanges, (question, "")]:
            placed = place_images(
                asked.turn_text,
                wraps_images=self.template.wraps_images,
                mm_use_im_start_end=self.mm_use_im_start_end,
            )
            # An answer that says `<image>` does not ask for a picture.
            turns += [("human", placed), ("gpt", answer.replace(IMAGE_TOKEN, "< image>"))]
        return self.template.prompt(turns[:-1], system=self.system)

    def pictures(self, question: Question | None = None) -> list[Picture]:
        """Return all pictures in the order of their placeholders."""
        questions = [asked for asked, _ in self.exchanges] + ([] if question is None else [question])
        return [picture for asked in questions for picture in asked.pictures]

    def record(self, record_id: str) -> dict[str, Any]:
        """Return the conversation as a record of LLaVA's data format, which can be trained on."""
        conversations = [{"from": "system", "value": self.system}] if self.system is not None else []
        for asked, answer in self.exchanges:
            conversations += [{"from": "human", "value": asked.turn_text}, {"from": "gpt", "value": answer}]
        record: dict[str, Any] = {"id": record_id}
        paths = [os.path.abspath(picture.path) for picture in self.pictures()]
        if paths:
            record["image"] = paths[0] if len(paths) == 1 else paths
        return {**record, "conversations": conversations}

    def text(self, name: str) -> str:
        """Return the conversation to be read by people; `name` is who answered."""
        lines = [] if self.system is None else [f"System: {self.system}", ""]
        for asked, answer in self.exchanges:
            lines += [f"Image: {picture.path}" for picture in asked.pictures]
            lines += [f"User: {asked.text}", f"{name}: {answer}", ""]
        return "\n".join(lines)


def save_conversation(path: Path, names: Sequence[str], dialogues: Sequence[Dialogue]) -> None:
    """Write a chat with those who have these names: `.json` as records of LLaVA's data format, else as text.

    Raises:
        UserError: The file exists or cannot be written.
    """
    if path.suffix == ".json":
        ids = [path.stem if len(names) == 1 else f"{path.stem}-{name}" for name in names]
        records = [dialogue.record(name) for name, dialogue in zip(ids, dialogues, strict=True)]
        content = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    else:
        content = "\n".join(dialogue.text(name) for name, dialogue in zip(names, dialogues, strict=True))
    try:
        with path.open("x", encoding="utf-8") as opened:
            opened.write(content)
    except FileExistsError:
        raise UserError(f"{path} exists. Choose another name.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Choose another place.") from None
