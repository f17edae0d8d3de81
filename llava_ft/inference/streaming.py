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
    """Return a decoded answer without what ends it, the first of `stops` in it, and without white space around it."""
    text = text.strip()
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text


def certain_text(text: str, stops: Sequence[str]) -> str:
    """Return the part of a decoded, unfinished answer that no further token can change."""
    text = text.lstrip()
    if any(stop in text for stop in stops):
        return finished_answer(text, stops)
    text = text.rstrip(_INCOMPLETE_CHARACTER)
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]  # what may become an end mark
    return text[: len(text) - max(begun, default=0)].rstrip()


class AnswerStreamer(BaseStreamer):
    """Decodes one answer as its tokens come, and hands what is certain of it to `write`, piece by piece.

    What was written in the end is `finished_answer` of the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], write: Callable[[str], object]):
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
