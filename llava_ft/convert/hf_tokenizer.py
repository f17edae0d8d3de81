"""The tokenizer's files for transformers' layout, in which `<image>` is an entry of the vocabulary.

Here a text is split at `<image>` and every piece tokenised alone, as original LLaVA does; there `<image>` is found by
the tokenizer itself. The ids come out equal if a piece behind an image begins as a text of its own does. Where a blank
goes in front of every stretch of text (`legacy`), it does. Where it goes in front of the first stretch only, the
tokenizer is given a rule that writes the blank behind each image, and `<image>` is looked for after that rule.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from llava_ft.checkpoint.save import write_json
from llava_ft.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.data.tokenizer import SentencePieceTokenizer
from llava_ft.errors import CheckpointError

_PROBES: Final = (
    f"USER: {IMAGE_TOKEN}\nWhat is this? ASSISTANT:",
    f"USER: What is {IMAGE_TOKEN} and what {IMAGE_TOKEN}{IMAGE_TOKEN}? ASSISTANT: Nothing.</s>USER: Why?  ASSISTANT:",
    f"{IMAGE_TOKEN}\n",
    f" {IMAGE_TOKEN}  two blanks\n\n{IMAGE_TOKEN}</s>{IMAGE_TOKEN} x",
    f"[INST] <<SYS>>\nx\n<</SYS>>\n\n{IMAGE_TOKEN}\ny [/INST] z </s><s>[INST] é▁ä 漢字 [/INST]",
    f"<|im_start|>user\n{IMAGE_TOKEN}\ny<|im_end|><|im_start|>assistant\n",
)
"""Texts on which the written tokenizer is compared with ours."""

NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
"""Special tokens with a part of their own."""

_IMAGE_THEN_BLANK: Final = f"{IMAGE_TOKEN} "


def write_hf_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> int:
    """Write the files of a tokenizer of ours with `<image>` as an entry, and return its id.

    Raises:
        CheckpointError: The tokenizer cannot be made to give the same ids.
    """
    backend, image_id = _with_image_token(tokenizer)
    _compare(backend, tokenizer, image_id)
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(directory / "tokenizer.json"))
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key in NAMED_TOKENS}
    added = cast("list[dict[str, Any]]", json.loads(backend.to_str())["added_tokens"])
    fields: dict[str, Any] = {
        "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
        "add_eos_token": bool(getattr(tokenizer, "add_eos_token", False)),
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "additional_special_tokens": [
            token["content"] for token in added if token["special"] and token["content"] not in named.values()
        ],
        **named,
        "clean_up_tokenization_spaces": False,
        "image_token": IMAGE_TOKEN,
        "model_max_length": int(cast("Any", tokenizer).model_max_length),
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer"
        if isinstance(tokenizer, SentencePieceTokenizer)
        else "PreTrainedTokenizerFast",
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        fields["legacy"] = tokenizer.legacy
    write_json(directory / "tokenizer_config.json", fields)
    write_json(directory / "special_tokens_map.json", {**named, "image_token": IMAGE_TOKEN})
    return image_id


def begin_separator(tokenizer: PreTrainedTokenizerFast, start: str) -> str | None:
    """Say what has to stand between a written begin token and a prompt that begins with `start`, so that ids are equal.

    That is "" or a blank; None if neither gives the same ids, or the tokenizer sets no begin token.
    """
    expected = tokenize_prompt(start, tokenizer)
    if not tokenizer.bos_token or expected[:1] != [tokenizer.bos_token_id]:
        return None
    for separator in ("", " "):
        text = f"{tokenizer.bos_token}{separator}{start}"
        if cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"]) == expected:
            return separator
    return None


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that `<image>` has, or will get: the first one that no token has."""
    return tokenizer.get_added_vocab().get(IMAGE_TOKEN, len(tokenizer))


def _with_image_token(tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer, int]:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    known = [token for token in content["added_tokens"] if token["content"] == IMAGE_TOKEN]
    # Whether a blank is put in front of the first stretch of text and of no other.
    blank_only_in_front = '"prepend_scheme": "first"' in json.dumps(content.get("pre_tokenizer"))
    for token in known:
        token |= {"normalized": blank_only_in_front, "lstrip": False, "rstrip": False, "special": True}
    backend = Tokenizer.from_str(json.dumps(content))
    if blank_only_in_front:
        rules = [
            normalizers.Replace(IMAGE_TOKEN, _IMAGE_THEN_BLANK),
            normalizers.Replace(Regex(rf"{_IMAGE_THEN_BLANK}(?={IMAGE_TOKEN}|\z)"), IMAGE_TOKEN),
        ]
        backend.normalizer = normalizers.Sequence([*rules, *([backend.normalizer] if backend.normalizer else [])])
    if not known:
        token: Any = AddedToken(IMAGE_TOKEN, normalized=blank_only_in_front, special=True)
        backend.add_special_tokens([token])  # pyright: ignore[reportUnknownMemberType]
    else:  # added tokens are looked up by what the normalizer makes of them
        backend = Tokenizer.from_str(backend.to_str())
    index = backend.token_to_id(IMAGE_TOKEN)
    assert index is not None
    return backend, index


def _compare(backend: Tokenizer, tokenizer: PreTrainedTokenizerFast, image_id: int) -> None:
    for text in _PROBES:
        expected = [image_id if index == IMAGE_TOKEN_INDEX else index for index in tokenize_prompt(text, tokenizer)]
        got: Sequence[int] = backend.encode(text).ids
        if list(got) != expected:
            raise CheckpointError(
                f"The tokenizer with {IMAGE_TOKEN} as an entry would give other ids than the one the model was trained "
                f"with, for {text!r}: {list(got)} instead of {expected}. Keep the native layout."
            )
