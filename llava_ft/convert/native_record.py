"""What transformers' layout has no place for, kept beside it so that the way back gives the files it came from.

An exported directory holds a folder `native/` with the small files of its source as they were - configuration,
tokenizer - and `weights.json`: which weight file held which tensors in which order and type, and whether a vision tower
was among them. transformers does not look into folders.

On the way back the vocabulary loses what that layout needs: an entry for `<image>`, often one for `<pad>`, and rows
behind them that no token has. Here images have no entry, and padding is done with the unknown token, as original LLaVA
does.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerFast

from llava_ft.checkpoint.full_model import FullModel
from llava_ft.checkpoint.names import CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, is_derived, native_name
from llava_ft.checkpoint.save import write_json
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.constants import IMAGE_TOKEN
from llava_ft.data.tokenizer import load_tokenizer, save_tokenizer
from llava_ft.errors import CheckpointError
from llava_ft.json_files import read_json
from llava_ft.models.parts import module_part

NATIVE_FOLDER: Final = "native"
TOKENIZER_FILES: Final = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
)  # fmt: skip
_PAD_TOKEN: Final = "<pad>"
_NOT_NATIVE: Final = ("image_token", "image_token_id", "chat_template", "processor_class", "extra_special_tokens")
_WEIGHTS: Final = "weights.json"
_SMALL_FILES: Final = (CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, *TOKENIZER_FILES)


@dataclass(frozen=True)
class WeightRecord:
    """The weight files of a native model."""

    files: dict[str, dict[str, str]]  # for each file the tensors in it, in their order, with their type on disk
    num_rows: int  # of the vocabulary
    tower: str | None  # digest of the vision tower as it was exported; None if the source's own files held it
    config: str  # digest of the exported `config.json`


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a SHA-256 over names, types, shapes and values of tensors, in the order of their names."""
    digests: dict[str, str] = {}
    for name, value in tensors:
        digest = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def write_native_record(directory: Path, whole: FullModel, native: Mapping[str, str]) -> None:
    """Keep in an exported directory what the native model's files were like; `native` are the names of its keys."""
    source = whole.directory.path
    folder = directory / NATIVE_FOLDER
    folder.mkdir()
    if whole.base.directory.layout == "hf":
        copy_files(whole.base.directory.path / NATIVE_FOLDER, folder, TOKENIZER_FILES)
    elif whole.directory.kind == "llava":
        copy_files(source, folder, (*_SMALL_FILES, *(path.name for path in source.glob("*.index.json"))))
        files: dict[str, dict[str, str]] = {}
        for key, info in whole.base.sources[0].files.tensors.items():
            if not is_derived(native_name(key)):
                files.setdefault(info.file.name, {})[key] = str(info.dtype).removeprefix("torch.")
        tower = None
        if not whole.base.holds_vision_tower:
            keys = [key for key, name in native.items() if module_part(name) == "vision tower"]
            tower = tensors_digest((native[key], value) for key, value in WeightFiles.open(directory).stream(keys))
        num_rows = whole.config.vocab_size - whole.num_new_rows
        write_json(folder / _WEIGHTS, asdict(WeightRecord(files, num_rows, tower, config_digest(directory))))
    else:
        save_tokenizer(whole.tokenizer, folder)
    if not any(folder.iterdir()):
        folder.rmdir()


def read_weight_record(directory: Path) -> WeightRecord | None:
    """Return what is known of the native files that an exported model came from; None if nothing is.

    Raises:
        CheckpointError: The record is damaged.
    """
    path = directory / NATIVE_FOLDER / _WEIGHTS
    if not path.is_file():
        return None
    content: dict[str, Any] = read_json(path)
    try:
        record = WeightRecord(
            {str(file): dict(names) for file, names in content["files"].items()},
            int(content["num_rows"]),
            content["tower"],
            str(content["config"]),
        )
        if any(Path(file).name != file for file in record.files):
            raise ValueError("a file is not in the directory")
        return record
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is damaged. Delete it to convert without it, or copy it again.") from None


def copy_files(source: Path, target: Path, names: Iterable[str]) -> bool:
    """Copy those of the files that there are; returns whether there were any."""
    found = [name for name in names if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return bool(found)


def config_digest(directory: Path) -> str:
    """Return a SHA-256 over what a model's `config.json` says."""
    content = read_json(directory / CONFIG)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def num_native_rows(tokenizer: PreTrainedTokenizerFast, num_rows: int, at_least: int = 0) -> int:
    """Count the rows of a vocabulary without those at its end that only transformers' layout needs.

    `at_least` are the rows that the native model is known to have had, also where no token has them.
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

    `recorded_in` is an exported model, which may hold the native tokenizer's files.
    """
    kept = {token: index for token, index in tokenizer.get_vocab().items() if index < num_rows}
    if copy_files(recorded_in / NATIVE_FOLDER, directory, TOKENIZER_FILES):
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
        content = {name: value for name, value in read_json(file).items() if name not in _NOT_NATIVE}
        listed: dict[str, Any] = content.get("added_tokens_decoder") or {}
        content["added_tokens_decoder"] = {index: token for index, token in listed.items() if token["content"] in kept}
        extra: list[str] = content.get("additional_special_tokens") or []
        content["additional_special_tokens"] = [token for token in extra if token in kept]
        if content.get("pad_token") not in kept:
            content["pad_token"] = content.get("unk_token") or content.get("eos_token")
        write_json(file, content)
        (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)
        native = load_tokenizer(folder)
    native.chat_template = None
    save_tokenizer(native, directory)
    return native
