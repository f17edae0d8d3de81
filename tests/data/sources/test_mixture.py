"""The YAML file of a mixture: what it may say, and what it means for one record."""

import json
from dataclasses import replace

import pytest

from llava_ft.data.records import Turn, parse_record
from llava_ft.data.sources.data_path import check_holds_out
from llava_ft.data.sources.mixture import MixtureEntry, open_mixture
from llava_ft.errors import UserError


def write(tmp_path, text):
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    return path


def test_every_key(tmp_path):
    mixture = open_mixture(
        write(
            tmp_path,
            "# a comment\nepoch_size: 1000\nsources:\n"
            "  - {path: a.json, name: chat, image_folder: pictures, weight: 3, held_out: 0.1,\n"
            "     prompt_prefix: 'Briefly: '}\n"
            "  - {path: 'owner/set', split: test, weight: 5e-1, held_out: 7}\n",
        )
    )
    assert mixture.epoch_size == 1000
    assert mixture.entries == (
        MixtureEntry("a.json", "chat", None, "pictures", 3.0, None, 1, 0.1, "Briefly: "),
        MixtureEntry("owner/set", "owner/set", "test", None, 0.5, None, 1, 7, ""),
    )
    counts = open_mixture(write(tmp_path, "sources:\n- {path: a, count: 5}\n- {path: b, repeat: 2}\n- {path: c}\n"))
    assert [(entry.count, entry.repeat) for entry in counts.entries] == [(5, 1), (None, 2), (None, 1)]


def test_paths_count_from_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text(json.dumps([1, 2]))
    (tmp_path / "absolute.json").write_text("[3]")
    text = "sources:\n- {path: a.json, image_folder: ../pictures}\n- {path: '*.json', name: all, image_folder: /here}\n"
    text += f"- {{path: {tmp_path}/absolute.json}}\n- {{path: owner/set, split: test}}\n"
    write(tmp_path / "sub", text)
    monkeypatch.chdir(tmp_path)
    first, second, third, hub = open_mixture("sub/mix.yaml").open_sources()
    for source in (first, second, third):
        source.prepare(tmp_path / "cache")
    assert [list(source.read(0, 1)) for source in (first, second, third)] == [[1], [1], [3]]
    assert [source.image_folder for source in (first, second, third)] == ["sub/../pictures", "/here", None]
    assert [source.name for source in (first, second)] == ["sub/a.json", "all"]
    assert hub.name == "owner/set:test"


def test_a_source_that_cannot_be_opened_is_named(tmp_path):
    mixture = open_mixture(write(tmp_path, "sources:\n- {path: owner/set}\n- {path: none.json}\n"))
    with pytest.raises(UserError, match=r"mix.yaml, source 2: Data file .*none.json does not exist"):
        mixture.open_sources()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"mix.yaml is null, not a mapping. It needs 'sources:'"),
        ("- path: a", r"is a list of 1, not a mapping"),
        ("sources:\n", r"'sources' is missing. Give a list"),
        ("sources: []", r"'sources' is a list of 0"),
        ("sources: a.json", r"'sources' is the string 'a.json'"),
        ("sources: [a.json]", r"source 1: it is the string 'a.json', not a mapping. Write 'path"),
        ("source: []", r"unknown key 'source'. Known: sources, epoch_size. Did you mean 'sources'\?"),
        ("sources: [{path: a, wieght: 1}]", r"source 1: unknown key 'wieght'. .* Did you mean 'weight'\?"),
        ("sources: [{weight: 1}]", r"source 1: there is no 'path'"),
        ("sources: [{path: 7}]", r"'path' is the number 7, not a text. Put it into quotes"),
        ("sources: [{path: a, split: yes}]", r"'split' is the truth value true, not a text"),
        ("sources: [{path: a, weight: 0}]", r"'weight' is the number 0. Allowed are numbers above 0"),
        ("sources: [{path: a, weight: .inf}]", r"'weight' is the number inf"),
        ("sources: [{path: a, weight: much}]", r"'weight' is the string 'much'"),
        ("sources: [{path: a, count: 1.5}]", r"'count' is the number 1.5. Allowed are whole numbers from 1 on"),
        ("sources: [{path: a, repeat: 0}]", r"'repeat' is the number 0"),
        ("sources: [{path: a, repeat: true}]", r"'repeat' is the truth value true"),
        ("sources: [{path: a, held_out: 1.0}]", r"'held_out' is the number 1.0. Allowed are a share between 0 and 1"),
        ("sources: [{path: a, held_out: -1}]", r"'held_out' is the number -1"),
        ("sources: [{path: a, weight: 1, count: 2}]", r"has both 'weight' and 'count'. Give one of them"),
        ("sources: [{path: a, weight: 1, repeat: 2}]", r"has both 'weight' and 'repeat'"),
        ("sources: [{path: a, count: 1, repeat: 2}]", r"has both 'count' and 'repeat'"),
        ("sources: [{path: a, prompt_prefix: 'x <image>'}]", r"'prompt_prefix' holds <image>"),
        ("sources: [{path: a, weight: 1}, {path: b}]", r"'a' has a weight and 'b' has none"),
        ("sources: [{path: a, weight: 1}, {path: b, count: 1}]", r"'a' has a weight and 'b' has none"),
        ("sources: [{path: a}]\nepoch_size: 5", r"'epoch_size' is 5, but no source has a weight"),
        ("sources: [{path: a, weight: 1}]\nepoch_size: 0", r"'epoch_size' is the number 0"),
        ("sources: [{path: a, held_out: 5}, {path: ./a}]", r"'./a' is there twice, .* join the two entries"),
        ("sources: [{path: a, name: x}, {path: b, name: x}]", r"two sources are named 'x'"),
        ("sources: [{path: a, path: b}]", r"line 1: not valid YAML: 'path' is given twice"),
        ("sources:\n - path: a\n  weight: 1", r"line 3: not valid YAML: .* Examples: docs/how-to/mixture.md"),
        ("sources: [{path: a, held_out: !!python/name:os.system x}]", r"not valid YAML: could not determine a constr"),
    ],
)
def test_what_is_refused(text, message, tmp_path):
    (tmp_path / "a").write_text("[1]")
    with pytest.raises(UserError, match=message):
        open_mixture(write(tmp_path, text))


def test_a_run_that_evaluates_needs_something_held_out(tmp_path):
    check_holds_out("chats.json")
    check_holds_out(write(tmp_path, "sources: [{path: a}, {path: b, held_out: 1}]"))
    with pytest.raises(UserError, match=r"mix.yaml holds out no records, and eval_strategy needs some"):
        check_holds_out(write(tmp_path, "sources: [{path: a, held_out: 0}]"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml does not exist. Check --data_path"):
        open_mixture(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 0\)"):
        open_mixture(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        open_mixture(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What?", "P: What?"),
        ("<image>\nWhat?", "<image>\nP: What?"),
        ("<image>\n<image>\n What?", "<image>\n<image>\n P: What?"),
        ("What?\n<image>", "P: What?\n<image>"),
        (" First <image> then <image>", "P:  First <image> then <image>"),
        ("<image>", "<image>P: "),
        ("", "P: "),
    ],
)
def test_prompt_prefix(text, expected):
    said = [("system", "system"), ("gpt", "Welcome!"), ("human", text), ("gpt", "A."), ("human", "Again?")]
    entry = {"id": "x", "image": "a.jpg", "conversations": [{"from": role, "value": value} for role, value in said]}
    sample = parse_record(entry, 3)
    turns = (sample.turns[0], Turn("human", expected), *sample.turns[2:])
    assert parse_record(entry, 3, "P: ") == replace(sample, turns=turns)
