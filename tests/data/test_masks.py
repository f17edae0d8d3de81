"""What is supervised, and where a conversation may be cut: laws over all templates, and examples."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.conversation import TEMPLATES, TemplateStyle, get_template
from llava_ft.data.records import Sample, Turn
from llava_ft.data.tokenize import SUPERVISE_CHOICES, SampleTokenizer
from llava_ft.errors import BadSampleError, UserError

from .test_text_properties import outcome, texts, tokenizer_in
from .test_tokenizer import TINY

names = st.sampled_from(sorted(TEMPLATES))
weights = st.sampled_from([0, 1, 1])
ones = st.just(1)


@st.composite
def samples(draw, template, weights=ones):
    """Draw a conversation that the template takes, some answers empty, an open question last at times."""
    if get_template(template).style is TemplateStyle.PLAIN:
        question = Turn("human", IMAGE_TOKEN * draw(st.integers(1, 2)))
        turns = [question, Turn("gpt", draw(texts), draw(weights))]
    else:
        turns = [Turn("gpt", draw(texts), draw(weights))] if draw(st.booleans()) else []
        for _ in range(draw(st.integers(1, 3))):
            question = IMAGE_TOKEN.join(draw(st.lists(texts, min_size=1, max_size=2)))
            turns += [Turn("human", question or "?"), Turn("gpt", draw(texts | st.just("")), draw(weights))]
        if draw(st.booleans()):
            turns.append(Turn("human", "Open"))
    num_images = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    return Sample(0, "", tuple(turns), tuple(f"{i}.jpg" for i in range(num_images)))


def tokenize(sample, template, supervise="answers"):
    make = SampleTokenizer(tokenizer_in(TINY), get_template(template), supervise=supervise)
    return outcome(make, sample)[0]


def unweighted(sample):
    return replace(sample, turns=tuple(replace(turn, weight=1) for turn in sample.turns))


def answers_in_the_prompt(sample, template):
    first = 0 if get_template(template).keeps_leading_answer or sample.turns[0].role == "human" else 1
    return [turn for turn in sample.turns[first:] if turn.role == "gpt" and turn.text]


@given(data=st.data(), template=names)
def test_last_answer_and_weights_only_take_away(data, template):
    sample = data.draw(samples(template, weights))
    whole = tokenize(unweighted(sample), template)
    assume(whole is not None)
    answers = tokenize(sample, template)
    last = tokenize(sample, template, "last_answer")
    for less, more in [(last, answers), (answers, whole)]:
        if less is not None:
            assert less.input_ids == more.input_ids
            assert all(few in (many, IGNORE_INDEX) for few, many in zip(less.labels, more.labels, strict=True))


@given(data=st.data(), template=names)
def test_all_supervises_the_text_but_not_images_nor_the_begin_token(data, template):
    sample = data.draw(samples(template))
    found = tokenize(sample, template, "all")
    assert found is not None
    assert found.input_ids[0] == tokenizer_in(TINY).bos_token_id
    assert found.labels[0] == IGNORE_INDEX
    for token, label in zip(found.input_ids[1:], found.labels[1:], strict=True):
        assert label == (IGNORE_INDEX if token == IMAGE_TOKEN_INDEX else token)


@given(data=st.data(), template=names)
def test_all_with_weights_is_the_rest_of_the_text(data, template):
    """A token that two segments share is learnt if one of them is: it may be missing in neither."""
    sample = data.draw(samples(template, weights))
    found, answers = tokenize(sample, template, "all"), tokenize(unweighted(sample), template)
    assume(found is not None)
    assume(answers is not None)
    weighted = tokenize(sample, template)
    kept = weighted.labels if weighted is not None else [IGNORE_INDEX] * len(found.labels)
    columns = zip(found.input_ids, found.labels, answers.labels, kept, strict=True)
    for token, label, answer, keeps in list(columns)[1:]:
        if token == IMAGE_TOKEN_INDEX:
            assert label == IGNORE_INDEX
        elif answer == IGNORE_INDEX or keeps != IGNORE_INDEX:
            assert label == token


@given(data=st.data(), template=names)
def test_answer_ends(data, template):
    sample = data.draw(samples(template, weights))
    whole = tokenize(unweighted(sample), template)
    assume(whole is not None)
    ends = whole.answer_ends
    assert len(ends) == len(answers_in_the_prompt(sample, template))
    for start, end in pairwise([0, *ends]):
        assert start < end <= len(whole.input_ids)
        assert whole.labels[end - 1] != IGNORE_INDEX
        assert any(label != IGNORE_INDEX for label in whole.labels[start:end])
    if sample.turns[-1].role == "gpt" and sample.turns[-1].text and ends:
        assert ends[-1] == len(whole.input_ids)
    for supervise in SUPERVISE_CHOICES:
        other = tokenize(sample, template, supervise)
        assert other is None or other.answer_ends == ends


@given(data=st.data(), template=names)
def test_a_cut_leaves_the_answers_before_it_whole(data, template):
    sample = data.draw(samples(template))
    style = get_template(template).style
    assume(style is not TemplateStyle.BLOCKS)  # their empty answers leave targets too, and so does an empty caption
    assume(style is not TemplateStyle.PLAIN or sample.turns[1].text)
    if style is TemplateStyle.INST:  # an empty question leaves nothing between two answers
        assume(all(turn.text.strip() for turn in sample.turns if turn.role == "human"))
    found = tokenize(sample, template)
    assume(found is not None)
    runs = target_runs(found.labels)
    assert len(runs) == len(found.answer_ends)
    for position, end in enumerate(found.answer_ends):
        assert target_runs(found.labels[:end]) == runs[: position + 1]


def target_runs(labels):
    runs, run = [], []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            runs.append(run)
            run = []
    return runs


def sample_of(*turns):
    return Sample(3, "seven", tuple(turns), tuple("a" for turn in turns if IMAGE_TOKEN in turn.text))


TALK = sample_of(Turn("human", "One?"), Turn("gpt", "red"), Turn("human", "Two?"), Turn("gpt", "blue"))


@pytest.mark.parametrize(
    ("supervise", "weights", "wanted"),
    [
        ("answers", (1, 1), "S. USER: One? ASSISTANT:[[ red</s>]]USER: Two? ASSISTANT:[[ blue</s>]]"),
        ("answers", (0, 1), "S. USER: One? ASSISTANT: red</s>USER: Two? ASSISTANT:[[ blue</s>]]"),
        ("answers", (1, 0), "S. USER: One? ASSISTANT:[[ red</s>]]USER: Two? ASSISTANT: blue</s>"),
        ("last_answer", (1, 1), "S. USER: One? ASSISTANT: red</s>USER: Two? ASSISTANT:[[ blue</s>]]"),
        ("all", (1, 1), "[[S. USER: One? ASSISTANT: red</s>USER: Two? ASSISTANT: blue</s>]]"),
        ("all", (0, 1), "[[S. USER: One? ASSISTANT:]] red</s>[[USER: Two? ASSISTANT: blue</s>]]"),
    ],
)
def test_segments_show_what_is_supervised(supervise, weights, wanted):
    first, second = weights
    turns = list(TALK.turns)
    turns[1], turns[3] = replace(turns[1], weight=first), replace(turns[3], weight=second)
    make = SampleTokenizer(tokenizer_in(TINY), get_template("v1"), supervise=supervise)
    segments = make.segments(replace(TALK, turns=tuple(turns), system="S."))
    assert "".join(f"[[{part.text}]]" if part.is_target else part.text for part in segments) == wanted


def test_blocks_lose_their_heading_and_the_end_with_weight_0():
    make = SampleTokenizer(tokenizer_in(TINY), get_template("v0"))
    turns = (*TALK.turns[:3], replace(TALK.turns[3], weight=0))
    segments = make.segments(replace(TALK, turns=turns))
    assert [part.text for part in segments if part.is_target] == ["### Assistant: red\n"]


@pytest.mark.parametrize(
    ("supervise", "weights", "reason"),
    [
        ("answers", (0, 0), "all its answers have weight 0, so there is nothing to learn. Fix the record or pass"),
        ("last_answer", (1, 0), "its last answer has weight 0"),
    ],
)
def test_nothing_left_to_learn(supervise, weights, reason):
    first, second = weights
    turns = list(TALK.turns)
    turns[1], turns[3] = replace(turns[1], weight=first), replace(turns[3], weight=second)
    with pytest.raises(BadSampleError, match=reason) as caught:
        SampleTokenizer(tokenizer_in(TINY), get_template("v1"), supervise=supervise)(replace(TALK, turns=tuple(turns)))
    assert caught.value.kind == "no-supervised-token"


def test_an_answer_that_the_template_leaves_out_is_named():
    sample = sample_of(Turn("gpt", "Hello"), Turn("human", "Hi"))
    with pytest.raises(BadSampleError, match="template 'v1' leaves its answers out"):
        SampleTokenizer(tokenizer_in(TINY), get_template("v1"))(sample)


def test_last_answer_is_the_last_one_with_text():
    sample = sample_of(*TALK.turns, Turn("human", "Three?"), Turn("gpt", ""))
    make = SampleTokenizer(tokenizer_in(TINY), get_template("v1"), supervise="last_answer")
    assert [part.text for part in make.segments(sample) if part.is_target] == [" blue</s>"]


def test_all_learns_a_prompt_without_answers():
    found = tokenize(sample_of(Turn("human", "<image>\nWhat?")), "v1", "all")
    assert [token for token, label in zip(found.input_ids, found.labels, strict=True) if label == IGNORE_INDEX] == [
        tokenizer_in(TINY).bos_token_id,
        IMAGE_TOKEN_INDEX,
    ]
    assert found.answer_ends == []


def test_unknown_choice():
    with pytest.raises(UserError, match="supervise is 'prompt'; it can be answers, last_answer, all"):
        SampleTokenizer(tokenizer_in(TINY), get_template("v1"), supervise="prompt")
