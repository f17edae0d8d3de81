"""The Jinja templates write what our templates write."""

import random
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from llava_ft.conversation import TEMPLATES, Template, get_template
from llava_ft.convert.chat_template import chat_template
from llava_ft.convert.hf_tokenizer import begin_separator
from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.inference.generate import build_prompt
from tests.convert.conftest import tokenizer_directory

TEXTS = ("Hi", "  a b\n", "<image>\nWhat?", "x\n\n", "{{ y }} {% z %}", 'a "quoted" \\n', "é▁漢", "</s>", "")
IMAGE = {"type": "image"}


def render(template: str, messages: list[dict], *, open_answer: bool = True, **values: str) -> str:
    prompts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=open_answer, **values)
    return prompts[0]


def random_turns(chance: random.Random) -> list[tuple[str, str]]:
    role = chance.choice(["human", "human", "human", "gpt"])
    turns: list[tuple[str, str]] = []
    for _ in range(chance.randint(1, 5)):
        turns.append((role, chance.choice(TEXTS)))
        role = "gpt" if role == "human" else "human"
    return [(role, text or "z") if role == "human" else (role, text) for role, text in turns]


def as_messages(turns: list[tuple[str, str]], system: str | None, chance: random.Random) -> list[dict]:
    named = {"human": "user", "gpt": "assistant"}
    contents = [text if chance.random() < 0.5 else [{"type": "text", "text": text}] for _, text in turns]
    spoken = [{"role": named[role], "content": text} for (role, _), text in zip(turns, contents, strict=True)]
    return ([] if system is None else [{"role": "system", "content": system}]) + spoken


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_conversations_are_written_as_by_our_template(template: Template):
    chance = random.Random(0)
    written = chat_template(template)
    for _ in range(60):
        turns, system = random_turns(chance), chance.choice([None, "Be brief.", "", "S\n"])
        expected = template.prompt(turns, system=system)
        if template.wraps_images:
            expected = expected.replace("<image>", "<Image><image></Image>")
        assert render(written, as_messages(turns, system, chance), bos_token="<s>") == expected


@pytest.mark.parametrize("with_tokens", [False, True])
def test_images_without_a_place_stand_in_front_of_the_question(with_tokens: bool):
    template = get_template("v1")
    message = {"role": "user", "content": [{"type": "text", "text": "Compare"}, IMAGE, IMAGE]}
    written = render(chat_template(template, mm_use_im_start_end=with_tokens), [message])
    assert written == build_prompt("Compare", 2, template, mm_use_im_start_end=with_tokens)


def test_images_with_a_place_in_the_text_stay_there():
    message = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is <image> here?"}]}
    assert render(chat_template(get_template("v1")), [message]).count("<image>") == 1


def test_a_finished_conversation_is_not_opened_again():
    turns = [("human", "Hi"), ("gpt", "Yes")]
    messages = as_messages(turns, None, random.Random(0))
    template = get_template("v1")
    assert render(chat_template(template), messages, open_answer=False) == template.prompt(turns)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "follow each other"),
        ([{"role": "tool", "content": "a"}], "found tool"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "at the beginning"),
    ],
)
def test_what_a_template_cannot_write_is_an_error(messages: list[dict], reason: str):
    with pytest.raises(TemplateError, match=reason):
        render(chat_template(get_template("v1")), messages)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["v1", "v0", "llava_llama_2", "mpt"])
def test_a_written_begin_token_gives_the_ids_of_one_that_is_added(name: str, legacy: bool, tmp_path: Path):
    tokenizer = load_tokenizer(tokenizer_directory(tmp_path, legacy=legacy))
    template = get_template(name)
    begin = begin_separator(tokenizer, template.prompt([("human", "x")]))
    assert begin is not None
    messages = [{"role": "user", "content": "What is this?"}]
    text = render(chat_template(template, begin=begin), messages, bos_token="<s>")
    expected = tokenize_prompt(render(chat_template(template), messages), tokenizer)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
