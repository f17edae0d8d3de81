"""What is handed out of an answer while it grows."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.inference.responder import AnswerStreamer, certain_text, finished_answer
from tests.conftest import RECORDINGS

STOPS = ("###", "</s>")


@pytest.mark.parametrize(
    ("text", "certain"),
    [
        ("", ""),
        ("  Yes", "Yes"),
        ("Yes ", "Yes"),
        ("Yes #", "Yes"),
        ("Yes ##", "Yes"),
        ("Yes ###", "Yes"),
        ("Yes ### Human: and", "Yes"),
        ("Yes # no", "Yes # no"),
        ("Yes </", "Yes"),
        ("Yes </p", "Yes </p"),
        ("caf\ufffd", "caf"),
        ("a \ufffd\ufffd", "a"),
    ],
)
def test_what_may_still_change_is_held_back(text: str, certain: str):
    assert certain_text(text, STOPS) == certain


def test_an_answer_ends_at_the_first_end_mark():
    assert finished_answer(" No.###", STOPS) == "No."
    assert finished_answer("a </s> b ###", STOPS) == "a"
    assert finished_answer(" a # b ", STOPS) == "a # b"


@given(st.text(alphabet="ab #<s/>\n\ufffd", max_size=12), st.text(alphabet="ab #<s/>\n", max_size=12))
def test_what_was_handed_out_is_never_taken_back(text: str, more: str):
    if any(stop in text for stop in STOPS):
        more = ""  # generation ends there
    if not text.endswith("\ufffd"):
        assert finished_answer(text + more, STOPS).startswith(certain_text(text, STOPS))


@given(st.text(max_size=30))
@example("Yes #")  # held back until the end, and then part of the answer
def test_the_pieces_are_the_answer(text: str):
    tokenizer = load_tokenizer(RECORDINGS / "ckpt/base-llm")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    streamer = AnswerStreamer(tokenizer, STOPS, pieces.append)
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == finished_answer(tokenizer.decode(ids, skip_special_tokens=True), STOPS)
    assert all(pieces)
