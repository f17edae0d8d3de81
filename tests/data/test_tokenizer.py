"""Tokenizers: ids of the slow LLaMA tokenizer, saving and loading, damaged directories."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer, save_tokenizer
from llava_ft.errors import UserError

TINY = Path(__file__).parent.parent / "golden" / "tokenizers" / "tiny512"
SPECIAL = ("<unk>", "<s>", "</s>")
TEXTS = [
    "", " ", "  ", "   x", "Hello", " Hello", "▁Hello", "a  b   c    d", "\n", "\n x", "</s>", " </s>",
    "</s> x", "x</s>y", "</s></s>x", "<s>x", "The <unk> token.", "é😀👩‍👩‍👧", "\u200b\ufeff\u00a0", "<0x0A>",
    "x\ty\r\n", "\0", "<im_start>x<im_end>", "<im_start>", " <im_end> y",
    "### Human: hi\n### Assistant: ho\n### ", "USER: a ASSISTANT: b</s>",
]  # fmt: skip


def copy_of(directory, target, **config):
    shutil.copytree(directory, target)
    path = target / "tokenizer_config.json"
    path.chmod(0o644)
    merged = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in merged.items() if value != "absent"}))
    return target


def slow_ids(directory, text, *, legacy, added=()):
    """Tokenise with SentencePiece itself, by the rules of transformers 4's slow LlamaTokenizer."""
    processor = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    size = processor.vocab_size()
    special = {name: processor.piece_to_id(name) for name in SPECIAL}
    special |= {name: size + position for position, name in enumerate(added)}
    pieces, rest = [], text if legacy or not text else "▁" + text
    while rest:
        found = [(rest.find(name), -len(name), name) for name in special if name in rest]
        start, _, name = min(found, default=(len(rest), 0, ""))
        pieces += [(False, rest[:start])] * (start > 0) + [(True, name)] * bool(name)
        rest = rest[start + len(name) :]
    if not legacy and len(pieces) > 1 and pieces[0] == (False, "▁"):
        pieces = pieces[1:]
    ids = [processor.bos_id()]
    for is_special, piece in pieces:
        if is_special:
            ids.append(special[piece])
        elif legacy:
            ids += processor.encode(piece)
        else:
            # Without a blank in front: after a character that joins nothing, whose id is dropped.
            ids += processor.encode("\n" + piece)[2:]
    return ids


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("added", [(), ("<im_start>", "<im_end>")])
def test_ids_equal_the_slow_tokenizer(legacy, added, tmp_path):
    directory = copy_of(TINY, tmp_path / "t", legacy=legacy)
    tokenizer = load_tokenizer(directory)
    add_image_tokens(tokenizer, mm_use_im_start_end=bool(added), mm_use_im_patch_token=False)
    for text in TEXTS:
        assert tokenizer(text).input_ids == slow_ids(directory, text, legacy=legacy, added=added), text


@pytest.mark.parametrize(("flag", "legacy"), [(None, True), ("absent", True), (False, False), (True, True)])
def test_legacy_flag(flag, legacy, tmp_path):
    tokenizer = load_tokenizer(copy_of(TINY, tmp_path / "t", legacy=flag))
    directory = tmp_path / "t"
    assert tokenizer("a</s>b").input_ids == slow_ids(directory, "a</s>b", legacy=legacy)


def test_tokens_and_sides():
    tokenizer = load_tokenizer(TINY)
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == "<unk>"
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 512
    assert tokenizer.model_max_length == 2048
    assert load_tokenizer(TINY, model_max_length=77).model_max_length == 77


def test_keeps_a_padding_token_of_its_own(tmp_path):
    tokenizer = load_tokenizer(copy_of(TINY, tmp_path / "t", pad_token="[PAD]"))
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("[PAD]", 512, 513)


@pytest.mark.parametrize(
    ("start_end", "patch", "names"),
    [
        (False, False, []),
        (True, False, ["<im_start>", "<im_end>"]),
        (False, True, ["<im_patch>"]),
        (True, True, ["<im_patch>", "<im_start>", "<im_end>"]),
    ],
)
def test_add_image_tokens(start_end, patch, names):
    tokenizer = load_tokenizer(TINY)
    flags = {"mm_use_im_start_end": start_end, "mm_use_im_patch_token": patch}
    assert add_image_tokens(tokenizer, **flags) == len(names)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(512, 512 + len(names)))
    assert add_image_tokens(tokenizer, **flags) == 0


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("keep_model", [True, False])
def test_round_trip(legacy, keep_model, tmp_path):
    tokenizer = load_tokenizer(copy_of(TINY, tmp_path / "t", legacy=legacy))
    add_image_tokens(tokenizer, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    wanted = [tokenizer(text).input_ids for text in TEXTS]
    for turn in range(2):
        directory = tmp_path / f"saved{turn}"
        save_tokenizer(tokenizer, directory)
        if not keep_model:
            (directory / "tokenizer.model").unlink(missing_ok=True)
        tokenizer = load_tokenizer(directory)
        assert [tokenizer(text).input_ids for text in TEXTS] == wanted
        assert (len(tokenizer), tokenizer.pad_token, tokenizer.padding_side) == (515, "<unk>", "right")
        assert tokenizer.model_max_length == 2048
    assert (directory / "tokenizer.model").exists() == keep_model


def test_saved_files_are_those_of_the_slow_tokenizer(tmp_path):
    tokenizer = load_tokenizer(TINY)
    add_image_tokens(tokenizer, mm_use_im_start_end=True, mm_use_im_patch_token=False)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert config["legacy"] is False
    assert config["additional_special_tokens"] == ["<im_start>", "<im_end>"]
    assert {index: token["content"] for index, token in config["added_tokens_decoder"].items()} == {
        "0": "<unk>", "1": "<s>", "2": "</s>", "512": "<im_start>", "513": "<im_end>",
    }  # fmt: skip


def test_added_tokens_of_older_layouts(tmp_path):
    directory = copy_of(TINY, tmp_path / "t")
    (directory / "added_tokens.json").write_text('{"<im_end>": 513, "<im_start>": 512}')
    tokenizer = load_tokenizer(directory)
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [512, 513]
    assert tokenizer("a<im_end>").input_ids == slow_ids(TINY, "a<im_end>", legacy=False, added=("x", "<im_end>"))


def test_normalized_flag_of_older_layouts_is_ignored(tmp_path):
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False}
    directory = copy_of(TINY, tmp_path / "t", eos_token=token, legacy=True)
    assert load_tokenizer(directory)("a</s>b").input_ids == slow_ids(TINY, "a</s>b", legacy=True)


def test_add_bos_token_off(tmp_path):
    tokenizer = load_tokenizer(copy_of(TINY, tmp_path / "t", add_bos_token=False))
    assert tokenizer("a").input_ids == slow_ids(TINY, "a", legacy=False)[1:]
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")("a").input_ids == tokenizer("a").input_ids


def test_chat_template_survives(tmp_path):
    directory = copy_of(TINY, tmp_path / "t")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    save_tokenizer(load_tokenizer(directory), tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == "{{ messages }}"


def test_copies_for_workers():
    tokenizer = load_tokenizer(TINY)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other(" x</s>").input_ids == tokenizer(" x</s>").input_ids
        assert other.spm_model == tokenizer.spm_model


def other_tokenizer(directory):
    """Write a byte-level BPE tokenizer with a begin token, as newer models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", len(alphabet))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
    fast.save_pretrained(directory)
    return fast


def test_other_tokenizers_are_left_as_they_are(tmp_path):
    fast = other_tokenizer(tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    for text in TEXTS:
        assert tokenizer(text).input_ids == fast(text).input_ids
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|end|>")
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert [again(text).input_ids for text in TEXTS] == [fast(text).input_ids for text in TEXTS]
    assert not (tmp_path / "saved" / "tokenizer.model").exists()


def write(directory, **files):
    directory.mkdir()
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_bytes(content)
    return directory


LLAMA_CONFIG = b'{"tokenizer_class": "LlamaTokenizer"}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer: neither tokenizer.model nor tokenizer.json .found: nothing"),
        ({"config__json": b"{}"}, "found: config.json"),
        ({"tokenizer__model": b""}, r"tokenizer.model \(0 bytes\) is not a SentencePiece model"),
        ({"tokenizer__model": b"\xff" * 50}, "is not a SentencePiece model: damaged, truncated"),
        (
            {"tokenizer__model": (TINY / "tokenizer.model").read_bytes()[:3000]},
            r"\(3000 bytes\) is not a Sent",
        ),
        ({"tokenizer__json": b"{", "tokenizer_config__json": LLAMA_CONFIG}, "tokenizer.json cannot be read"),
        ({"tokenizer__json": b"{}", "tokenizer_config__json": LLAMA_CONFIG}, "tokenizer.json is damaged"),
        ({"tokenizer__json": b"{}"}, "The tokenizer in .* cannot be loaded: "),
        ({"tokenizer_config__json": b"[1]"}, "tokenizer_config.json holds a JSON list"),
        ({"tokenizer_config__json": b'{"eos_token": 3}'}, "eos_token is 3"),
    ],
)
def test_damaged_directory(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_tokenizer(write(tmp_path / "t", **files))


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match=r"none does not exist\. Give a model directory"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file\. Give a model directory"):
        load_tokenizer(tmp_path / "file")


def test_added_tokens_that_do_not_fit(tmp_path):
    directory = copy_of(TINY, tmp_path / "t")
    (directory / "added_tokens.json").write_text('{"<im_start>": 32000}')
    with pytest.raises(UserError, match="'<im_start>' should have id 32000, but 512 is the next free one"):
        load_tokenizer(directory)


@pytest.mark.parametrize("change", ["unigram", "collapses_blanks"])
def test_other_kinds_of_sentencepiece(change, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((TINY / "tokenizer.model").read_bytes())
    if change == "unigram":
        proto.trainer_spec.model_type = 1
    else:
        proto.normalizer_spec.remove_extra_whitespaces = True
    with pytest.raises(UserError, match="is a SentencePiece model, but not one of LLaMA's kind"):
        load_tokenizer(write(tmp_path / "t", tokenizer__model=proto.SerializeToString()))


def test_a_llava_model_of_llama_3_kind(tmp_path, recwarn):
    """transformers knows no `llava_llama`, whose rope_scaling it then takes for that of no model."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<end>": 3}, [("a", "b")]))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path)
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", "rope_scaling": scaling}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("abb").input_ids == [2, 1]
    assert not [warning for warning in recwarn if "model of type" in str(warning.message)]
