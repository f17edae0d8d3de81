"""A conversation about pictures as it grows, and the prompt that continues it.

Turns are written by the template the model was trained with, images by the function that places them in the training
data, so a prompt is the beginning of the text that the finished conversation would be trained on. The `###` templates
are the exception: LLaVA writes them without line breaks at inference, and so does this program.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.conversation import ChatTurn, Template
from llava_ft.data.image_files import load_image
from llava_ft.data.tokenize import place_images
from llava_ft.errors import UserError


@dataclass(frozen=True, eq=False)
class Picture:
    """An image of a conversation. Each is itself alone: the same file given twice is two pictures.

    Attributes:
        path: The file it came from.
        image: Its pixels, in mode "RGB".
    """

    path: str
    image: Image

    @classmethod
    def read(cls, path: str) -> "Picture":
        """Read an image file.

        Raises:
            ImageError: It cannot be read.
        """
        return cls(path, load_image(path))


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        text: As it was typed.
        pictures: Images given with it.
    """

    text: str
    pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        """Check that text and pictures fit each other.

        Raises:
            UserError: The text has another number of `<image>` than there are pictures.
        """
        present = self.text.count(IMAGE_TOKEN)
        if present not in (0, len(self.pictures)):
            raise UserError(
                f"The question has {present} {IMAGE_TOKEN} but {len(self.pictures)} images are given. Each needs one; "
                "leave them out of the question to have the images put in front."
            )

    @property
    def turn_text(self) -> str:
        """The text as a record has it: with one `<image>` for each picture, in front unless it says where."""
        if IMAGE_TOKEN in self.text:
            return self.text
        return f"{IMAGE_TOKEN}\n" * len(self.pictures) + self.text


@dataclass
class Dialogue:
    """The finished turns of a conversation with one model.

    Attributes:
        template: How turns are written.
        mm_use_im_start_end: Whether `<im_start>` and `<im_end>` go around each image.
        system: Replaces the template's system text; None keeps it.
        exchanges: Questions with their answers.
    """

    template: Template
    mm_use_im_start_end: bool = False
    system: str | None = None
    exchanges: list[tuple[Question, str]] = field(default_factory=list[tuple[Question, str]])

    def turns(self, question: Question | None = None) -> list[ChatTurn]:
        """Return all turns with images placed as in training; `question` is the last one, if given."""
        turns: list[ChatTurn] = []
        for asked, answer in self.exchanges:
            # An answer that says `<image>` does not ask for a picture.
            turns += [("human", self._placed(asked)), ("gpt", answer.replace(IMAGE_TOKEN, "< image>"))]
        return turns if question is None else [*turns, ("human", self._placed(question))]

    def prompt(self, question: Question) -> str:
        """Write the text to be continued by the answer to `question`.

        Raises:
            TurnsError: The turns do not fit the template.
        """
        return self.template.prompt(self.turns(question), system=self.system)

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

    def _placed(self, question: Question) -> str:
        return place_images(
            question.turn_text,
            wraps_images=self.template.wraps_images,
            mm_use_im_start_end=self.mm_use_im_start_end,
        )


def ask_for_fewer(num_tokens: int, context_len: int, pictures: Sequence[Picture]) -> str:
    """Say that a conversation has become longer than the model can read, and what helps."""
    images = f", the tokens of {len(pictures)} image{'s' if len(pictures) > 1 else ''} among them" if pictures else ""
    return (
        f"With this question the conversation is {num_tokens:,} tokens long{images}, but the model's context is "
        f"{context_len:,}. Ask in fewer words, take back earlier questions (/undo), or begin anew (/clear)."
    )
