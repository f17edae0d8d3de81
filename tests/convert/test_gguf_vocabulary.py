"""Vocabularies in GGUF files: the pieces, scores and types that llama.cpp tokenises with."""

from pathlib import Path

import numpy as np
import pytest

from llava_ft.convert.gguf_vocabulary import TokenType, check_ids, read_vocabulary
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.errors import CheckpointError, RunError
from tests.conftest import RECORDINGS
from tests.convert.gguf_files import LLAVA, export

pytestmark = pytest.mark.usefixtures("in_recordings")


def test_pieces_scores_and_types_are_those_of_sentencepiece(tmp_path: Path):
    from sentencepiece import SentencePieceProcessor

    _, language, _ = export("ckpt/llava15-tiny-imse", tmp_path)
    processor = SentencePieceProcessor(model_file="ckpt/llava15-tiny-imse/tokenizer.model")
    pieces, scores, kinds = (language.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert len(pieces) == len(scores) == len(kinds) == 514
    for index in range(processor.vocab_size()):
        assert pieces[index] == processor.id_to_piece(index)
        assert scores[index] == np.float32(processor.get_score(index))
        assert (kinds[index] == TokenType.CONTROL) == processor.is_control(index)
        assert (kinds[index] == TokenType.BYTE) == processor.is_byte(index)
        assert (kinds[index] == TokenType.UNKNOWN) == processor.is_unknown(index)
    assert pieces[512:] == ["<im_start>", "<im_end>"]
    assert kinds[512:] == [TokenType.CONTROL, TokenType.CONTROL]


def test_rows_without_a_token_get_one_that_no_text_gives():
    tokenizer = load_tokenizer(LLAVA)
    tokenizer.add_tokens(["<a▁box>"])
    vocabulary = read_vocabulary(tokenizer, 516)
    assert [piece.text for piece in vocabulary[512:]] == ["<a box>", "[PAD513]", "[PAD514]", "[PAD515]"]
    assert [piece.kind for piece in vocabulary[512:]] == [TokenType.USER_DEFINED] + [TokenType.UNUSED] * 3
    check_ids(vocabulary, tokenizer)


def test_an_added_token_without_a_row_is_left_out(caplog: pytest.LogCaptureFixture):
    tokenizer = load_tokenizer(LLAVA)
    tokenizer.add_tokens(["<box>"])
    assert len(read_vocabulary(tokenizer, 512)) == 512
    assert "<box> has no row" in caplog.text


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="has 512 pieces, but the model has embeddings for 400"):
        read_vocabulary(load_tokenizer(LLAVA), 400)


@pytest.mark.parametrize("source", [LLAVA, str(RECORDINGS.parent.parent / "data" / "tiny-llava")])
def test_a_vocabulary_is_taken_from_tokenizer_json_alone(tmp_path: Path, source: str):
    load_tokenizer(source).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    check_ids(vocabulary, tokenizer)
    with_scores = read_vocabulary(load_tokenizer(source), len(tokenizer))
    assert [piece.kind for piece in vocabulary] == [piece.kind for piece in with_scores]


def test_other_ids_are_an_error():
    tokenizer = load_tokenizer(LLAVA)
    vocabulary = read_vocabulary(tokenizer, 512)
    upside_down = [piece._replace(score=-piece.score) for piece in vocabulary]
    with pytest.raises(RunError, match="gives other ids for 'What is in the image"):
        check_ids(upside_down, tokenizer)


def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")))
    with pytest.raises(CheckpointError, match=r"kind WordLevel .* convert such a model with llama.cpp's own script"):
        read_vocabulary(words, 2)
