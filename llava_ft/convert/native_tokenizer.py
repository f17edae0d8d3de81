"""What a vocabulary of transformers' layout has beyond the native one, and the tokenizer without it.

That layout has an entry for `<image>`, often one for `<pad>`, and rows behind them that no token has. Here images have
no entry, and padding is done with the unknown token, as original LLaVA does.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from llava_ft.checkpoint.save import write_json
from llava_ft.checkpoint.weights import read_json
from llava_ft.constants import IMAGE_TOKEN
from llava_ft.convert.native_record import TOKENIZER_FILES, copy_native_files
from llava_ft.data.tokenizer import load_tokenizer, save_tokenizer

_PAD_TOKEN: Final = "<pad>"
_NOT_NATIVE: Final = ("image_token", "image_token_id", "chat_template", "processor_class", "extra_special_tokens")


def num_native_rows(tokenizer: PreTrainedTokenizerFast, num_rows: int, at_least: int = 0) -> int:
    """Count the rows of a vocabulary without those at its end that only transformers' layout needs.

    Args:
        tokenizer: The tokenizer, with `<image>`.
        num_rows: Rows that the matrices have.
        at_least: Rows that the native model is known to have had, also where no token has them.
    """
    placeholders = {index for token, index in tokenizer.get_added_vocab().items() if token in (IMAGE_TOKEN, _PAD_TOKEN)}
    if not placeholders:
        return num_rows
    while num_rows > at_least and (num_rows - 1 >= len(tokenizer) or num_rows - 1 in placeholders):
        num_rows -= 1
    return num_rows


def write_native_tokenizer(
    tokenizer: PreTrainedTokenizerFast, num_rows: int, directory: Path, recorded_in: Path
) -> PreTrainedTokenizerFast:
    """Write a tokenizer without the entries from `num_rows` on, and return it.

    Args:
        tokenizer: The tokenizer, with `<image>`.
        num_rows: Rows of the native vocabulary.
        directory: Where to.
        recorded_in: An exported model, which may hold the native tokenizer's files.
    """
    kept = {token: index for token, index in tokenizer.get_vocab().items() if index < num_rows}
    if copy_native_files(recorded_in, directory, TOKENIZER_FILES):
        recorded = load_tokenizer(directory)
        if recorded.get_vocab() == kept:
            return recorded
        for name in TOKENIZER_FILES:
            (directory / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        file = Path(folder) / "tokenizer.json"
        content = read_json(file)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < num_rows]
        content["padding"] = None
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        file = Path(folder) / "tokenizer_config.json"
        write_json(file, _native_fields(read_json(file), kept))
        (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)
        native = load_tokenizer(folder)
    native.chat_template = None
    save_tokenizer(native, directory)
    return native


def _native_fields(content: dict[str, Any], kept: dict[str, int]) -> dict[str, Any]:
    """Return the fields of `tokenizer_config.json` without those of transformers' layout and tokens that are gone."""
    content = {name: value for name, value in content.items() if name not in _NOT_NATIVE}
    listed: dict[str, Any] = content.get("added_tokens_decoder") or {}
    content["added_tokens_decoder"] = {index: token for index, token in listed.items() if token["content"] in kept}
    extra: list[str] = content.get("additional_special_tokens") or []
    content["additional_special_tokens"] = [token for token in extra if token in kept]
    if content.get("pad_token") not in kept:
        content["pad_token"] = content.get("unk_token") or content.get("eos_token")
    return content
