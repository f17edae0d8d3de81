"""Load, extend and save tokenizers so that ids equal those LLaVA was trained with.

LLaVA's models were trained with slow SentencePiece tokenizers of transformers 4. Version 5 has only fast ones. Their
ids differ for runs of spaces (merges are ordered by id, not by score) and where text starts with a space or follows a
special token. So a SentencePiece tokenizer is built here from `tokenizer.model`: merges ordered by score, and the
leading blank added as the `legacy` flag of `tokenizer_config.json` asks:

- `legacy` true (also when the flag is absent): before every stretch of text between special tokens;
- `legacy` false: before the first stretch only.

Any other tokenizer is left as the library loads it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llava_ft.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN
from llava_ft.errors import UserError
from llava_ft.json_files import Fields, read_json

SPIECE_BLANK: Final = "▁"
"""How SentencePiece writes a space."""

_META_BLANKS: Final = 259
"""Id of two blanks in the vocabulary of LLaMA and LLaMA 2, which Vicuna has too."""

_SPM_FILE: Final = "tokenizer.model"
_FAST_FILE: Final = "tokenizer.json"
_CONFIG_FILE: Final = "tokenizer_config.json"
_SPM_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast")
"""Tokenizer classes whose `tokenizer.model` is a SentencePiece model of this kind; the first is what is written."""

_GENERIC_CLASSES: Final = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_NAMED_TOKENS: Final = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_BPE_MODEL: Final = 2
_NORMAL_PIECE, _CONTROL_PIECE, _USER_PIECE = 1, 3, 4
"""Values of SentencePiece's `ModelProto.SentencePiece.Type`; `_BPE_MODEL` is a `TrainerSpec.ModelType`."""

_TOKEN_FIELDS: Final = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


class SentencePieceTokenizer(PreTrainedTokenizerFast):
    """A SentencePiece (BPE) tokenizer with the ids of transformers 4's slow one.

    `save_pretrained` also writes what loaders of the slow one read: `tokenizer.model`, the class name, the
    `legacy` flag and the added tokens.

    `spm_model` is the content of `tokenizer.model`; None when the directory had only a `tokenizer.json`.
    """

    def __init__(self, *args: Any, legacy: bool = True, spm_model: bytes | None = None, **kwargs: Any):
        super().__init__(*args, legacy=legacy, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        self.legacy = legacy
        self.spm_model = spm_model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write the tokenizer so that `load_tokenizer` and slow loaders give the same ids."""
        written = super().save_pretrained(  # pyright: ignore[reportUnknownMemberType]
            save_directory, *args, **kwargs
        )
        directory = Path(save_directory)
        config_path = directory / _CONFIG_FILE
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config.update(
            tokenizer_class=_SPM_CLASSES[0],
            legacy=self.legacy,
            add_bos_token=self.add_bos_token,
            add_eos_token=self.add_eos_token,
            added_tokens_decoder={
                str(index): {name: getattr(token, name) for name in _TOKEN_FIELDS}
                for index, token in sorted(self.added_tokens_decoder.items())
            },
        )
        for name in ("backend", "is_local", "spm_model", "extra_special_tokens", "local_files_only"):
            config.pop(name, None)
        named = {str(token) for name in _NAMED_TOKENS if (token := getattr(self, name)) is not None}
        config["additional_special_tokens"] = [
            token.content
            for _, token in sorted(self.added_tokens_decoder.items())
            if token.special and token.content not in named
        ]
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.spm_model is None:
            return written
        (directory / _SPM_FILE).write_bytes(self.spm_model)
        return (*written, str(directory / _SPM_FILE))


def load_tokenizer(path: str | Path, *, model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model directory.

    Padding is on the right. Without a padding token the unknown token (or else the end token) takes that
    part, so the vocabulary does not grow. `model_max_length` replaces what the directory says.

    Raises:
        UserError: There is no such directory, it holds no tokenizer, or a file in it is damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"Tokenizer directory {directory} {what}. Give a model directory with a tokenizer in it.")
    config = _read_config(directory)
    tokenizer_class = config.get("tokenizer_class")
    has_spm = (directory / _SPM_FILE).is_file()
    has_fast = (directory / _FAST_FILE).is_file()
    if has_spm and (tokenizer_class in _SPM_CLASSES or (tokenizer_class in _GENERIC_CLASSES and not has_fast)):
        tokenizer = _load_from_spm(directory, config)
    elif has_fast and tokenizer_class in _SPM_CLASSES:
        tokenizer = _load_from_json(directory, config)
    elif has_fast or has_spm or (directory / "vocab.json").is_file() or (directory / "vocab.txt").is_file():
        tokenizer = _load_other(directory)
    else:
        found = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise UserError(
            f"Tokenizer directory {directory} holds no tokenizer: neither {_SPM_FILE} nor {_FAST_FILE} "
            f"(found: {found}). Copy the tokenizer files of the base model there."
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write a tokenizer into a directory, which is created. The same as `tokenizer.save_pretrained`."""
    tokenizer.save_pretrained(str(directory))  # pyright: ignore[reportUnknownMemberType]


def add_image_tokens(
    tokenizer: PreTrainedTokenizerFast, *, mm_use_im_start_end: bool, mm_use_im_patch_token: bool
) -> int:
    """Add the vocabulary entries the flags ask for, in LLaVA's order: `<im_patch>`, `<im_start>`, `<im_end>`.

    Returns:
        The number of new entries; 0 for a tokenizer that has them.
    """
    contents = [IM_PATCH_TOKEN] * mm_use_im_patch_token + [IM_START_TOKEN, IM_END_TOKEN] * mm_use_im_start_end
    tokens: list[Any] = [AddedToken(content, normalized=False, special=True) for content in contents]
    return tokenizer.add_tokens(tokens, special_tokens=True) if tokens else 0


class _TokenizerFields(Fields):
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    additional_special_tokens: list[str | dict[str, Any]] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    legacy: bool | None = None
    tokenizer_class: str | None = None
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None


def _read_json(path: Path, schema: type[Fields] | None = None) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    return read_json(path, schema) if path.is_file() else {}


def _read_config(directory: Path) -> dict[str, Any]:
    """Merge `tokenizer_config.json` over `special_tokens_map.json`, named tokens as `AddedToken` or None."""
    config = _read_json(directory / "special_tokens_map.json", _TokenizerFields) | {
        key: value
        for key, value in _read_json(directory / _CONFIG_FILE, _TokenizerFields).items()
        if value is not None or key not in _NAMED_TOKENS
    }
    for name in _NAMED_TOKENS:
        if config.get(name) is not None:
            config[name] = _as_added_token(config[name], directory, special=True)
    chat_template = directory / "chat_template.jinja"
    if chat_template.is_file():
        config["chat_template"] = chat_template.read_text(encoding="utf-8")
    return config


def _as_added_token(value: object, directory: Path, *, special: bool) -> AddedToken:
    """Make an AddedToken of a string or of its JSON form."""
    if isinstance(value, str):
        value = {"content": value}
    fields = cast("dict[str, Any]", value if isinstance(value, dict) else {})
    if not isinstance(fields.get("content"), str):
        raise UserError(f"Tokenizer directory {directory}: {value!r} is not the description of a token.")
    flags = {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    special = bool(fields.get("special", special))
    # Normalisation is always off: the slow tokenizer finds added tokens in the text as it stands.
    return AddedToken(fields["content"], normalized=False, special=special, **flags)


def _load_from_spm(directory: Path, config: dict[str, Any]) -> SentencePieceTokenizer:
    path = directory / _SPM_FILE
    data = path.read_bytes()
    proto = _parse_spm(data, path)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    mergeable = {p.piece: p.score for p in proto.pieces if p.type in (_NORMAL_PIECE, _USER_PIECE)}
    trained = proto.trainer_spec
    merges = merges_by_score(mergeable)
    backend = Tokenizer(
        BPE(vocab, merges, unk_token=trained.unk_piece, fuse_unk=True, byte_fallback=trained.byte_fallback)
    )
    # The slow class's own defaults, for directories that name no tokens.
    for name, content in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
        config.setdefault(name, _as_added_token(content, directory, special=True))
    legacy = config.get("legacy")
    legacy = True if legacy is None else bool(legacy)
    _set_leading_blank(backend, legacy)
    pieces = [
        AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL_PIECE)
        for piece in proto.pieces
        if piece.type in (_CONTROL_PIECE, _USER_PIECE)
    ]
    _add_tokens(backend, pieces)
    _restore_added_tokens(backend, directory, config)
    return _wrap(backend, config, legacy, data)


def _parse_spm(data: bytes, path: Path) -> Any:
    """Parse a SentencePiece file and check that it is of the kind that is built here."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    # The module makes its classes when it is imported: a type checker cannot see them.
    spm = cast("Any", sentencepiece_model_pb2)
    proto = spm.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        proto = spm.ModelProto()
    if not proto.pieces:
        raise UserError(
            f"Tokenizer file {path} ({len(data)} bytes) is not a SentencePiece model: damaged, truncated or "
            "of another kind. Copy it again from its origin."
        )
    rules = proto.normalizer_spec
    changes_text = rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.add_dummy_prefix
    if proto.trainer_spec.model_type != _BPE_MODEL or changes_text:
        raise UserError(
            f"Tokenizer file {path} is a SentencePiece model, but not one of LLaMA's kind (BPE that leaves "
            "the text as it is). Set its own tokenizer_class in tokenizer_config.json."
        )
    return proto


def _set_leading_blank(backend: Tokenizer, legacy: bool) -> None:
    """Write spaces as blanks and put one blank in front, of every stretch of text or of the first."""
    to_blank = normalizers.Replace(" ", SPIECE_BLANK)
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPIECE_BLANK), to_blank])
        backend.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    else:
        # Metaspace puts nothing in front of text that starts with its own replacement character. The slow
        # tokenizer does, so the first step uses a space as that character: after the normalizer no text holds
        # one. The second step writes it as a blank.
        backend.normalizer = to_blank
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=SPIECE_BLANK, prepend_scheme="never", split=False),
            ]
        )
    steps = [decoders.Replace(SPIECE_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)


def _add_tokens(backend: Tokenizer, tokens: Iterable[AddedToken]) -> None:
    for token in tokens:
        if token.special:
            backend.add_special_tokens([token])  # pyright: ignore[reportUnknownMemberType]
        else:
            backend.add_tokens([token])  # pyright: ignore[reportUnknownMemberType]


def _restore_added_tokens(backend: Tokenizer, directory: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens that the directory has beyond `tokenizer.model`, at the ids it says."""
    listed: dict[int, AddedToken] = {}
    for entry in _read_json(directory / _FAST_FILE).get("added_tokens", []):
        listed[int(entry["id"])] = _as_added_token(entry, directory, special=False)
    for content, index in _read_json(directory / "added_tokens.json").items():
        listed[int(index)] = _as_added_token(content, directory, special=True)
    for index, entry in cast("dict[str, object]", config.get("added_tokens_decoder") or {}).items():
        listed[int(index)] = _as_added_token(entry, directory, special=False)
    for index, token in sorted(listed.items()):
        _add_tokens(backend, [token])
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"Tokenizer directory {directory}: added token {token.content!r} should have id {index}, but "
                f"{backend.token_to_id(token.content)} is the next free one. Its files are of different "
                "models; copy all of them from one."
            )
    named = [config[name] for name in _NAMED_TOKENS if config.get(name) is not None]
    additional = cast("list[object]", config.get("additional_special_tokens") or [])
    _add_tokens(backend, named + [_as_added_token(token, directory, special=True) for token in additional])


def _wrap(
    backend: Tokenizer, config: Mapping[str, Any], legacy: bool, spm_model: bytes | None
) -> SentencePieceTokenizer:
    passed_on = ("model_max_length", "chat_template", "use_default_system_prompt")
    return SentencePieceTokenizer(
        tokenizer_object=backend,
        legacy=legacy,
        spm_model=spm_model,
        add_bos_token=config.get("add_bos_token", True),
        add_eos_token=config.get("add_eos_token", False),
        clean_up_tokenization_spaces=False,
        **{name: config[name] for name in (*_NAMED_TOKENS, *passed_on) if config.get(name) is not None},
    )


def _load_from_json(directory: Path, config: Mapping[str, Any]) -> SentencePieceTokenizer:
    """Load a tokenizer of which only the fast file is there; its merges count as written, but for Meta's."""
    path = directory / _FAST_FILE
    content = _read_json(path)
    order_merges_of_meta(content.get("model"))
    for token in content.get("added_tokens", []):
        token["normalized"] = False
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"Tokenizer file {path} is damaged: {error}. Copy it again from its origin.") from None
    legacy = config.get("legacy")
    if legacy is None:
        legacy = '"prepend_scheme": "first"' not in json.dumps(content.get("pre_tokenizer"))
    _set_leading_blank(backend, bool(legacy))
    return _wrap(backend, config, bool(legacy), None)


def _load_other(directory: Path) -> PreTrainedTokenizerFast:
    # These bring PyTorch, which processes that only tokenise do without.
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

    # transformers would read our own kinds of models as configurations of no kind, and fail over `rope_scaling`.
    is_known = _read_json(directory / "config.json").get("model_type") in CONFIG_MAPPING
    config = None if is_known else PreTrainedConfig()
    try:
        tokenizer = cast("Any", AutoTokenizer).from_pretrained(
            str(directory), config=config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the library's many loaders raise is about this directory
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            raise UserError(
                f"The tokenizer in {directory} needs Python code from that directory (auto_map), and code that comes "
                f"with a model is never run. A tokenizer with a {_FAST_FILE} of a class of transformers is needed."
            ) from None
        raise UserError(
            f"The tokenizer in {directory} cannot be loaded: {reason}. Check that its files are complete."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"The tokenizer in {directory} is a {type(tokenizer).__name__}, which gives no character "
            f"positions. A tokenizer with a {_FAST_FILE} is needed."
        )
    return tokenizer


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List every way to put two pieces together, in the order in which SentencePiece prefers them.

    SentencePiece joins the neighbours whose union has the highest score, the leftmost on a tie. Scores tie
    among runs of blanks, where "leftmost" means that the run grows from its left end: longer left part first.
    """
    merges = [
        (-score, -position, piece[:position], piece[position:])
        for piece, score in scores.items()
        for position in range(1, len(piece))
        if piece[:position] in scores and piece[position:] in scores
    ]
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def order_merges_of_meta(model: Any) -> None:
    """Put the merges of Meta's vocabulary into SentencePiece's order, in place; any other model is left as it is.

    transformers 5 writes them in the order of their ids, which is that of the scores but for runs of blanks: these have
    the lowest score of all, and grow from their left end. The file does not hold the scores.
    """
    try:
        if model["vocab"][SPIECE_BLANK * 2] != _META_BLANKS:
            return
        merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
        rank = {left + right: index for index, (left, right) in reversed(list(enumerate(merges)))}
    except (KeyError, TypeError, ValueError):
        return  # `Tokenizer.from_str` says what is wrong with it
    runs = [merge for merge in merges if not "".join(merge).strip(SPIECE_BLANK)]
    others = [merge for merge in merges if "".join(merge).strip(SPIECE_BLANK)]
    others.sort(key=lambda merge: (rank["".join(merge)], -len(merge[0])))
    model["merges"] = [list(merge) for merge in others + sorted(runs, key=lambda merge: -len(merge[0]))]
