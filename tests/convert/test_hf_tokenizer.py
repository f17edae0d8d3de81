"""The tokenizer with `<image>` as an entry gives the ids of the one that a text is split for."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava_ft.checkpoint.save import write_json
from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.convert.hf_tokenizer import image_token_id, write_hf_tokenizer
from llava_ft.convert.native_record import num_native_rows, write_native_tokenizer
from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.data.tokenizer import load_tokenizer
from tests.convert.conftest import tokenizer_directory

PIECES = ("<image>", "<image>", " ", "  ", "\n", "</s>", "<s>", "a", "the dog", "USER: ", "é", "漢", "▁", "<im", "age>")


@pytest.fixture(params=[True, False], ids=["legacy", "blank in front only"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tokenizer_directory(tmp_path / "ours", legacy=request.param)


def test_ids_are_those_of_our_tokenizer(directory: Path, tmp_path: Path):
    ours = load_tokenizer(directory)
    image_id = write_hf_tokenizer(ours, tmp_path)
    parts = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
    write_json(tmp_path / "config.json", {"model_type": "llava", **parts})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chance = random.Random(0)
    for _ in range(1500):
        text = "".join(chance.choices(PIECES, k=chance.randint(0, 9)))
        expected = [image_id if index == IMAGE_TOKEN_INDEX else index for index in tokenize_prompt(text, ours)]
        assert theirs(text)["input_ids"] == expected, text


def test_exporting_again_writes_the_same(directory: Path, tmp_path: Path):
    (tmp_path / "again").mkdir()
    first = write_hf_tokenizer(load_tokenizer(directory), tmp_path)
    assert write_hf_tokenizer(load_tokenizer(tmp_path), tmp_path / "again") == first
    assert (tmp_path / "again/tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()


def test_the_entry_is_taken_out_again(directory: Path, tmp_path: Path):
    ours = load_tokenizer(directory)
    write_hf_tokenizer(ours, tmp_path)
    (tmp_path / "native").mkdir()
    (tmp_path / "empty").mkdir()
    native = write_native_tokenizer(load_tokenizer(tmp_path), len(ours), tmp_path / "native", tmp_path / "empty")
    assert native.get_vocab() == ours.get_vocab()
    for text in ("USER: <image>\nWhat?", " two  blanks</s> x"):
        assert tokenize_prompt(text, load_tokenizer(tmp_path / "native")) == tokenize_prompt(text, ours)


def test_rows_behind_the_last_word_are_not_native(directory: Path):
    tokenizer = load_tokenizer(directory)
    assert num_native_rows(tokenizer, 520) == 520
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert image_token_id(tokenizer) == 512
    assert num_native_rows(tokenizer, 520) == 512
    assert num_native_rows(tokenizer, 520, at_least=515) == 515
    tokenizer.add_tokens(["<mine>"])
    assert num_native_rows(tokenizer, 520) == 515
