"""The vocabulary of a GGUF file: pieces, scores and types as llama.cpp's SentencePiece tokenizer reads them.

llama.cpp tokenises by itself: it joins the two neighbours whose union has the highest score, and puts a blank before
each stretch of text between special tokens. Whether that gives the ids that the model was trained with is checked, with
SentencePiece's own implementation, on the pieces and scores that go into the file.
"""

import json
import logging
from enum import IntEnum
from typing import Any, Final, NamedTuple, cast

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


class Piece(NamedTuple):
    """An entry of a vocabulary."""

    text: str  # blanks written as U+2581, in user-defined ones as they are
    score: float  # when neighbours are joined, the highest comes first
    kind: TokenType


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, num_rows: int) -> list[Piece]:
    """Take the vocabulary out of a tokenizer, in the order of the ids.

    Args:
        tokenizer: A LLaMA tokenizer, with its SentencePiece file or without.
        num_rows: Rows of the embedding matrix; rows that no token has get an entry that no text gives.

    Raises:
        CheckpointError: It is of another kind, which llama.cpp reads only together with rules of its own.
    """
    spm_model: bytes | None = getattr(tokenizer, "spm_model", None)
    if spm_model is None:
        pieces = _from_merges(tokenizer)
    else:
        from sentencepiece import sentencepiece_model_pb2

        proto = cast("Any", sentencepiece_model_pb2).ModelProto()
        proto.ParseFromString(spm_model)
        pieces = [Piece(piece.piece, float(piece.score), TokenType(piece.type)) for piece in proto.pieces]
    if len(pieces) > num_rows:
        raise CheckpointError(
            f"The tokenizer has {len(pieces)} pieces, but the model has embeddings for {num_rows}. Its files are "
            "another model's; copy those that belong to it."
        )
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if index >= num_rows:
            logger.warning("Vocabulary: %s has no row in the model and is left out.", token.content)
        elif index >= len(pieces):
            kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
            pieces += [*_unused(len(pieces), index), Piece(token.content, _ADDED_SCORE, kind)]
    pieces += _unused(len(pieces), num_rows)
    return [
        piece._replace(text=piece.text.replace(SPIECE_BLANK, " ")) if piece.kind is TokenType.USER_DEFINED else piece
        for piece in pieces
    ]


def vocabulary_fields(pieces: list[Piece], tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> Fields:
    """Return the description of a vocabulary for a GGUF file; `chat_template` is Jinja text, None leaves it out."""
    backend = cast("Any", tokenizer)
    fields: Fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [real(piece.score) for piece in pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in pieces],
        "tokenizer.ggml.add_bos_token": bool(getattr(backend, "add_bos_token", True)),
        "tokenizer.ggml.add_eos_token": bool(getattr(backend, "add_eos_token", False)),
        "tokenizer.ggml.add_space_prefix": True,
    }
    for key, short in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        index = getattr(backend, f"{short}_token_id")
        if isinstance(index, int) and index < len(pieces):
            fields[f"tokenizer.ggml.{key}_token_id"] = index
    if chat_template is not None:
        fields["tokenizer.chat_template"] = chat_template
    return fields


def check_ids(pieces: list[Piece], tokenizer: PreTrainedTokenizerFast) -> None:
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
    for text, score, kind in pieces:
        written = text.replace(" ", SPIECE_BLANK) if kind is TokenType.USER_DEFINED else text
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


def _from_merges(tokenizer: PreTrainedTokenizerFast) -> list[Piece]:
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
    pieces: list[Piece] = []
    for text, index in sorted(model["vocab"].items(), key=lambda item: item[1]):
        pieces += _unused(len(pieces), index)
        kind = TokenType.NORMAL
        if text == tokenizer.unk_token:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        joined = kind is TokenType.NORMAL and len(text) > 1
        pieces.append(Piece(text, -float(ranks.get(text, len(ranks))) if joined else 0.0, kind))
    return pieces


def _unused(start: int, end: int) -> list[Piece]:
    """Return entries that no text gives for some ids."""
    return [Piece(f"[PAD{index}]", _UNUSED_SCORE, TokenType.UNUSED) for index in range(start, end)]
