"""The order of merges: SentencePiece's, also where a file has lost it."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer

from llava_ft.data.tokenizer import load_tokenizer, merges_by_score, order_merges_of_meta

LLAMA = os.environ.get("LLAVA_FT_LLAMA_RECORDINGS")


def test_higher_scores_come_first_and_a_tie_goes_to_the_longer_left_part():
    scores = {"a": -9.0, "b": -9.0, "ab": -1.0, "aa": -2.0, "aab": 0.0}
    assert merges_by_score(scores) == [("aa", "b"), ("a", "ab"), ("a", "b"), ("a", "a")]


@pytest.mark.parametrize("is_text", [False, True])
def test_runs_of_blanks_of_meta_s_vocabulary_come_last_and_grow_from_their_left_end(is_text: bool):
    by_id = [("▁", "▁"), ("▁", "t"), ("▁", "▁▁▁"), ("▁▁", "▁▁"), ("▁▁▁", "▁"), ("▁", "the"), ("▁t", "he")]
    model: dict[str, Any] = {
        "vocab": {"▁▁": 259, "▁t": 260, "▁▁▁▁": 268, "▁the": 278},
        "merges": [" ".join(merge) if is_text else list(merge) for merge in by_id],
    }
    order_merges_of_meta(model)
    assert [tuple(merge) for merge in model["merges"]] == [
        ("▁", "t"), ("▁t", "he"), ("▁", "the"), ("▁▁▁", "▁"), ("▁▁", "▁▁"), ("▁", "▁"), ("▁", "▁▁▁"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        {"vocab": {"▁▁": 300}, "merges": [["▁", "▁"], ["a", "b"]]},
        {"vocab": {"a": 259}, "merges": [["▁", "▁"], ["a", "b"]]},
        {"vocab": {"▁▁": 259}},
        {"vocab": {"▁▁": 259}, "merges": ["a b c"]},
        {"vocab": {"▁▁": 259}, "merges": [7]},
        {},
        None,
    ],
)
def test_another_vocabulary_and_a_damaged_file_are_left_as_they_are(model: Any):
    before = repr(model)
    order_merges_of_meta(model)
    assert repr(model) == before


@pytest.mark.skipif(not LLAMA, reason="LLAVA_FT_LLAMA_RECORDINGS names no folder")
def test_a_file_of_transformers_5_gives_the_ids_of_the_sentencepiece_file(tmp_path: Path):
    origin = Path(str(LLAMA)) / "tokenizers/llama32k"
    rewritten: Any = LlamaTokenizer.from_pretrained(origin)
    rewritten.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    expected, got = load_tokenizer(origin), load_tokenizer(tmp_path)
    words = ["the", " ", "  ", " " * 5, " " * 17, "\n", "\t", "é", "漢", "</s>", "def f(x):", "----", "1234"]
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(words, k=rng.randint(1, 12)))
        assert got(text).input_ids == expected(text).input_ids, repr(text)
