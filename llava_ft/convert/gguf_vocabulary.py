"""The vocabulary of a GGUF file: pieces, scores and types as llama.cpp's SentencePiece tokenizer reads them.

llama.cpp tokenises by itself: it joins the two neighbours whose union has the highest score, and puts a blank before
each stretch of text between special tokens. Whether that gives the ids that the model was trained with is checked, with
SentencePiece's own implementation, on the pieces and scores that go into the file.
"""

import json
import logging
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, cast

from transformers import PreTrainedTokenizerFast

from llava_ft.conversation import TEMPLATES
from llava_ft.convert.gguf_file import Fields, real
from llava_ft.data.tokenizer import SPIECE_BLANK
from llava_ft.errors import CheckpointError, RunError

logger = logging.getLogger(__name__)


class TokenType(IntEnum):
    """What a piece is, by the numbers that SentencePiece and GGUF share."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ADDED_SCORE: Final = -1000.0
_UNUSED_SCORE: Final = -10000.0
_BPE_MODEL: Final = 2
_SAMPLES: Final = (
    "What is in the image?",
    "  two  blanks,   three and a tab\tand\nnew\n\nlines ",
    "1234567890 + 3.14159 = ?",
    "Zürich, naïve façade — “quotes” … 100 %",
    "图像里有什么？ 画像には何がありますか。 Что на картинке? 🦙🖼️",
    "def main():\n    return {'a': [1, 2]}  # comment",
)


@dataclass(frozen=True)
class Vocabulary:
    """The entries of a vocabulary, in the order of their ids."""

    pieces: list[str]  # blanks written as U+2581, in user-defined ones as they are
    scores: list[float]  # when neighbours are joined, the highest comes first
    types: list[TokenType]


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, num_rows: int) -> Vocabulary:
    """Take the vocabulary out of a tokenizer.

    Args:
        tokenizer: A LLaMA tokenizer, with its SentencePiece file or without.
        num_rows: Rows of the embedding matrix; rows that no token has get an entry that no text gives.

    Raises:
        CheckpointError: It is of another kind, which llama.cpp reads only together with rules of its own.
    """
    spm_model: bytes | None = getattr(tokenizer, "spm_model", None)
    if spm_model is None:
        vocabulary = _from_merges(tokenizer)
    else:
        from sentencepiece import sentencepiece_model_pb2

        vocabulary, proto = Vocabulary([], [], []), cast("Any", sentencepiece_model_pb2).ModelProto()
        proto.ParseFromString(spm_model)
        for piece in proto.pieces:
            _append(vocabulary, piece.piece, float(piece.score), TokenType(piece.type))
    if len(vocabulary.pieces) > num_rows:
        raise CheckpointError(
            f"The tokenizer has {len(vocabulary.pieces)} pieces, but the model has embeddings for {num_rows}. Its "
            "files are another model's; copy those that belong to it."
        )
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if index >= num_rows:
            logger.warning("Vocabulary: %s has no row in the model and is left out.", token.content)
        elif index >= len(vocabulary.pieces):
            _fill(vocabulary, index)
            _append(vocabulary, token.content, _ADDED_SCORE, _type_of_added(token.special))
    _fill(vocabulary, num_rows)
    return vocabulary


def vocabulary_fields(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> Fields:
    """Return the description of a vocabulary for a GGUF file; `chat_template` is Jinja text, None leaves it out."""
    backend = cast("Any", tokenizer)
    fields: Fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary.pieces,
        "tokenizer.ggml.scores": [real(score) for score in vocabulary.scores],
        "tokenizer.ggml.token_type": [int(kind) for kind in vocabulary.types],
        "tokenizer.ggml.add_bos_token": bool(getattr(backend, "add_bos_token", True)),
        "tokenizer.ggml.add_eos_token": bool(getattr(backend, "add_eos_token", False)),
        "tokenizer.ggml.add_space_prefix": True,
    }
    for key, index in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if isinstance(index, int) and index < len(vocabulary.pieces):
            fields[f"tokenizer.ggml.{key}_token_id"] = index
    if chat_template is not None:
        fields["tokenizer.chat_template"] = chat_template
    return fields


def check_ids(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that SentencePiece gives a tokenizer's ids from the exported pieces, scores and types.

    Raises:
        RunError: It gives others.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = cast("Any", sentencepiece_model_pb2).ModelProto()
    proto.trainer_spec.model_type = _BPE_MODEL
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True):
        written = piece.replace(" ", SPIECE_BLANK) if kind is TokenType.USER_DEFINED else piece
        proto.pieces.add(piece=written, score=score, type=int(kind))
    processor = cast("Any", SentencePieceProcessor)(model_proto=proto.SerializeToString())
    for sample in (*_SAMPLES, *(template.system for template in TEMPLATES.values())):
        expected = tokenizer(sample, add_special_tokens=False)["input_ids"]
        got = processor.encode(sample)
        if got != expected:
            raise RunError(
                f"The exported vocabulary gives other ids for {sample!r}: {got} instead of {expected}. Nothing was "
                "written. llama.cpp cannot tokenise as this model's tokenizer does."
            )


def _from_merges(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Take pieces from a `tokenizer.json`: the rank of the first merge that gives a piece stands in for its score."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError(
            f"The vocabulary is of kind {model.get('type')} without byte pieces, not LLaMA's SentencePiece one. Only "
            "that kind is exported to GGUF; convert such a model with llama.cpp's own script after --format hf."
        )
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), rank)
    vocabulary = Vocabulary([], [], [])
    for piece, index in sorted(model["vocab"].items(), key=lambda item: item[1]):
        _fill(vocabulary, index)
        kind = TokenType.NORMAL
        if piece == tokenizer.unk_token:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = _type_of_added(added[index]["special"])
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            kind = TokenType.BYTE
        joined = kind is TokenType.NORMAL and len(piece) > 1
        _append(vocabulary, piece, -float(ranks.get(piece, len(ranks))) if joined else 0.0, kind)
    return vocabulary


def _type_of_added(is_special: bool) -> TokenType:
    return TokenType.CONTROL if is_special else TokenType.USER_DEFINED


def _append(vocabulary: Vocabulary, piece: str, score: float, kind: TokenType) -> None:
    vocabulary.pieces.append(piece.replace(SPIECE_BLANK, " ") if kind is TokenType.USER_DEFINED else piece)
    vocabulary.scores.append(score)
    vocabulary.types.append(kind)


def _fill(vocabulary: Vocabulary, length: int) -> None:
    """Add entries that no text gives up to a length."""
    for index in range(len(vocabulary.pieces), length):
        _append(vocabulary, f"[PAD{index}]", _UNUSED_SCORE, TokenType.UNUSED)
