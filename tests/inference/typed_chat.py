"""A chat whose output is kept, for tests."""

import io

from llava_ft.conversation import get_template
from llava_ft.inference.chat import Chat
from llava_ft.inference.console import Screen
from llava_ft.inference.responder import Sampling
from llava_ft.inference.voices import Voice

LANDSCAPE, SQUARE = "images/src/landscape.jpg", "images/src/square.png"
LORA = "train/lora/llava-tiny-lora"
V1 = get_template("v1")
SHORT = Sampling(max_new_tokens=8)


class Typed:
    """A chat whose output is kept."""

    def __init__(self, voices: list[Voice], sampling: Sampling = SHORT, *, is_interactive: bool = False):
        self.output, self.messages = io.StringIO(), io.StringIO()
        self.chat = Chat(voices, Screen(self.output, self.messages), sampling, is_interactive=is_interactive)

    def take(self, *lines: str) -> list[str]:
        """Carry out lines and return what was written by them on standard output."""
        start = len(self.output.getvalue())
        self.chat.run(iter(lines))
        return self.output.getvalue()[start:].split("\n")[:-1]

    def history(self, *lines: str) -> list[list[str]]:
        """Carry out lines and return the answers of each voice that are in its history then."""
        self.take(*lines)
        return [[answer for _, answer in dialogue.exchanges] for dialogue in self.chat.dialogues]
