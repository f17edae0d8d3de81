"""Templates against the recorded texts of the original."""

import dataclasses
import gzip
import json
from functools import cache
from pathlib import Path

import pytest

from llava_ft.conversation import (
    TEMPLATE_ALIASES,
    TEMPLATES,
    Segment,
    TemplateStyle,
    TurnsError,
    get_template,
    template_names,
)
from llava_ft.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
RECORDED_STYLES = {
    "SINGLE": TemplateStyle.BLOCKS,
    "TWO": TemplateStyle.PAIRS,
    "LLAMA_2": TemplateStyle.INST,
    "MPT": TemplateStyle.CHATML,
    "PLAIN": TemplateStyle.PLAIN,
}
IMAGE_FIRST = "<image>\n"
DIALOGS = {
    "one_img": ["<image>\nWhat is it?"],
    "two_turns_img": ["<image>\nWhat is it?", "A cat.", "Colour?"],
    "one_text": ["Hello"],
    "tuple_img": [IMAGE_FIRST + "Look  here"],
    "tuple_img_two_turns": [IMAGE_FIRST + "Look", "A cat.", "Colour?"],
    "two_images": ["<image>\n<image>\nCompare."],
    "empty_string_answer": ["Hi", "", "Again"],
    "no_messages": [],
}
"""What was said in each recorded dialog, human first."""


@cache
def recorded_prompts():
    return json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))["prompts"]


@cache
def recorded_templates():
    with gzip.open(GOLDEN / "conversations_tiny512.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)["templates"]


def turns_of(texts):
    return [(("human", "gpt")[i % 2], text) for i, text in enumerate(texts)]


def test_every_recorded_template_exists_with_its_texts():
    for name, recorded in recorded_templates().items():
        for each in (name, *recorded["aliases"]):
            template = get_template(each)
            assert template.style is RECORDED_STYLES[recorded["sep_style"]]
            markup = "<|im_start|>system\n" if template.style is TemplateStyle.CHATML else ""
            assert markup + template.system == recorded["system"]
            assert [template.human, template.assistant] == recorded["roles"]
            stop = recorded["sep2"] or recorded["sep"]
            assert template.stop == stop
            assert template.wraps_images == ("mmtag" in recorded["version"])
    known = {name for name, recorded in recorded_templates().items() for name in (name, *recorded["aliases"])}
    assert set(template_names()) == known


@pytest.mark.parametrize("entry", recorded_prompts(), ids=lambda e: f"{e['template']}-{e['dialog']}")
def test_prompt_equals_recording(entry):
    template = get_template(entry["template"])
    if entry["dialog"] == "with_its_two_seed_messages":
        # The original's `default` carries an example dialog, which neither training nor evaluation uses.
        assert entry["prompt"].startswith(template.system + "###Human: ")
        assert entry["prompt"].endswith(template.prompt(turns_of(["Hi"])).removeprefix(template.system))
        assert template.prompt([]) == template.system + "###"
        return
    texts = DIALOGS[entry["dialog"]]
    if "error" in entry:
        # The original cannot write an answer in `plain`; a finished caption is followed by the stop marker.
        assert template.style is TemplateStyle.PLAIN
        return
    if template.wraps_images and entry["dialog"].startswith("tuple"):
        # The original's web demo puts the image into an exchange of its own.
        texts = ["<Image><image></Image>", "Received.", texts[0].removeprefix(IMAGE_FIRST), *texts[1:]]
    assert template.prompt(turns_of(texts)) == entry["prompt"]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_render_of_open_conversation_starts_like_the_prompt(name):
    """What a model is trained to continue is what it is asked to continue, but for the `###` layout."""
    template = get_template(name)
    turns = turns_of(["<image>\nWhat?", "A cat."])
    text = "".join(segment.text for segment in template.render(turns))
    prompt = template.prompt(turns[:1])
    if template.style is TemplateStyle.BLOCKS:
        assert text.replace("\n\n### ", "###", 1).replace("\n### ", "###") == prompt + " A cat.###"
    elif template.style is TemplateStyle.PLAIN:
        assert text == "<image>A cat.\n"
    else:
        assert text.startswith(prompt)
        assert text.endswith(template.stop)


TARGETS = {
    TemplateStyle.BLOCKS: ["### Assistant: A\n", "### Assistant: B\n### "],
    TemplateStyle.PAIRS: [" A</s>", " B</s>"],
    TemplateStyle.INST: [" A </s>", " B </s>"],
    TemplateStyle.CHATML: ["A<|im_end|>", "B<|im_end|>"],
}


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_targets_are_the_answers_with_their_stop_marker(name):
    template = get_template(name)
    segments = template.render(turns_of(["Q", "A", "R", "B"]))
    assert [segment.text for segment in segments if segment.is_target] == TARGETS[template.style]


def test_targets_of_plain():
    segments = get_template("plain").render(turns_of(["<image>\nDescribe.", "A hat."]))
    assert segments == [Segment("<image>", False), Segment("A hat.\n", True)]


def test_last_human_turn_is_not_a_target():
    for name in sorted(set(TEMPLATES) - {"plain"}):
        segments = get_template(name).render(turns_of(["Q", "A", "R"]))
        assert [segment.is_target for segment in segments] == [False, True, False]
        assert "A" in segments[1].text
        assert "R" in segments[2].text


def test_leading_answer():
    turns = [("gpt", "Welcome!"), ("human", "Q"), ("gpt", "A")]
    for name in sorted(set(TEMPLATES) - {"plain"}):
        text = "".join(segment.text for segment in get_template(name).render(turns))
        assert ("Welcome!" in text) == (get_template(name).style is TemplateStyle.BLOCKS)


def test_system_override():
    turns = turns_of(["Q", "A"])
    assert get_template("v1").render(turns, system="S.")[0].text == "S. USER: Q ASSISTANT:"
    assert get_template("v1").prompt(turns[:1], system="S.") == "S. USER: Q ASSISTANT:"
    assert get_template("v0").render(turns, system="S.")[0].text == "S.\n\n### Human: Q\n"
    assert get_template("mpt").render(turns, system="S.")[0].text.startswith("<|im_start|>system\nS.<|im_end|>")
    assert get_template("mistral_instruct").prompt(turns[:1], system="S.") == (
        "[INST] <<SYS>>\nS.\n<</SYS>>\n\nQ [/INST]"
    )
    assert get_template("llama_2").prompt(turns[:1], system="") == "[INST] Q [/INST]"


def test_v0_is_not_v1():
    assert get_template("v0").style is TemplateStyle.BLOCKS
    assert get_template("v0") is get_template("default")


def test_aliases_name_templates():
    for alias, name in TEMPLATE_ALIASES.items():
        assert get_template(alias).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vicuna_v2", "Unknown conversation template 'vicuna_v2'.*Did you mean 'vicuna_v1'"),
        ("LLAMA_2", "Did you mean 'llama_2'"),
        ("v0.5", "Unknown conversation template 'v0.5'"),
        ("zzzzzz", r"'zzzzzz' \(--version\). Known templates: chatml_direct, default, "),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(UserError, match=message):
        get_template(name)


@pytest.mark.parametrize(
    ("turns", "kind", "message"),
    [
        ([("human", "Q"), ("human", "R")], "roles-not-alternating", "two turns of role 'human' follow"),
        ([("gpt", "Q"), ("gpt", "R")], "roles-not-alternating", "two turns of role 'gpt' follow"),
        ([("user", "Q")], "unknown-role", "role 'user' is neither 'human' nor 'gpt'"),
    ],
)
def test_turns_that_do_not_fit(turns, kind, message):
    for act in (get_template("v1").render, get_template("v1").prompt):
        with pytest.raises(TurnsError, match=message) as caught:
            act(turns)
        assert caught.value.kind == kind


def test_inst_needs_a_first_question():
    with pytest.raises(TurnsError, match="template 'llama_2' needs a first question") as caught:
        get_template("llama_2").render(turns_of(["", "A"]))
    assert caught.value.kind == "empty-first-question"


def test_templates_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_template("v1").system = "other"
    with pytest.raises(TypeError):
        TEMPLATES["v1"] = get_template("v0")
    assert get_template("v1").stop_strings == ("</s>",)
