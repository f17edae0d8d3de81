"""What tokenised records depend on, as one short text: another one means that they have to be made again."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import tokenizers
from transformers import PreTrainedTokenizerFast

from llava_ft.data.sources.base import RecordSource
from llava_ft.data.tokenize import SampleTokenizer

_PACKAGE: Final = Path(__file__).parents[2]
_DECIDING: Final = (
    "conversation.py",
    "data/preparation/tokenized_rows.py",
    "data/records.py",
    "data/sources/*.py",
    "data/tokenize.py",
)
"""Modules that decide what is in a row."""


def made_from(source: RecordSource, tokenize: SampleTokenizer, prompt_prefix: str) -> dict[str, str]:
    """List everything that the tokenised records of a source depend on."""
    return {
        "source": source.name,
        "source_fingerprint": source.fingerprint(),
        "template": repr(tokenize.template),
        "tokenizer": tokenizer_fingerprint(tokenize.tokenizer),
        "supervise": tokenize.supervise,
        "mm_use_im_start_end": str(tokenize.mm_use_im_start_end),
        "prompt_prefix": prompt_prefix,
        "program": _program_fingerprint(),
    }


def key_of(parts: dict[str, str]) -> str:
    """Give the name of the directory that holds what was made from these parts; a source's name does not count."""
    relevant = {name: value for name, value in parts.items() if name != "source"}
    return _digest(json.dumps(relevant, sort_keys=True).encode())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Give a text that changes when the tokenizer may give other ids."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls set these two; they do not change the ids of a text.
    state = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
    begin = tokenizer("")["input_ids"]
    return _digest(json.dumps([tokenizers.__version__, begin, state], sort_keys=True).encode())


@cache
def _program_fingerprint() -> str:
    files = [file for pattern in _DECIDING for file in sorted(_PACKAGE.glob(pattern))]
    return _digest(b"".join(file.read_bytes() for file in files))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
