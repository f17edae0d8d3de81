"""An answer's text as it grows: what is certain is handed out at once, and nothing has to be taken back.

A template may end an answer with a text, such as `###` or `</s>`, which the model writes token by token. What could be
the beginning of such a text is held back until the next tokens decide. So are white space, which may be the end of the
answer, and the bytes of a character that is not complete.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

_INCOMPLETE_CHARACTER = "\ufffd"


def finished_answer(text: str, stops: Sequence[str]) -> str:
    """Return an answer without what ends it and without the white space around it.

    Args:
        text: What the model wrote, decoded.
        stops: Texts that end an answer; the first of them in `text` counts.
    """
    text = text.strip()
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text


def certain_text(text: str, stops: Sequence[str]) -> str:
    """Return the part of an unfinished answer that no further token can change.

    Args:
        text: What the model has written so far, decoded.
        stops: Texts that end an answer.
    """
    text = text.lstrip()
    if any(stop in text for stop in stops):
        return finished_answer(text, stops)
    text = text.rstrip(_INCOMPLETE_CHARACTER)
    held = max((_overlap(text, stop) for stop in stops), default=0)
    return text[: len(text) - held].rstrip()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class AnswerStreamer(BaseStreamer):
    """Decodes an answer as its tokens come, and writes what is certain of it.

    What was written in the end is `finished_answer` of the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], write: Callable[[str], object]):
        """Set up for one answer.

        Args:
            tokenizer: The model's tokenizer.
            stops: Texts that end an answer.
            write: Takes the next piece of text.
        """
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._write = write
        self._ids: list[int] = []
        self._num_written = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the next token, `(1,)` int64."""
        self._ids += value.flatten().tolist()
        self._write_up_to(certain_text(self._decoded(), self._stops))

    def end(self) -> None:
        """Write what was held back and belongs to the answer."""
        self._write_up_to(finished_answer(self._decoded(), self._stops))

    def _decoded(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _write_up_to(self, text: str) -> None:
        if len(text) > self._num_written:
            self._write(text[self._num_written :])
            self._num_written = len(text)
