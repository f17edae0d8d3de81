"""Laws of text handling that hold for every conversation."""

from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.conversation import TEMPLATES, TemplateStyle, get_template
from llava_ft.data.records import Sample, Turn, parse_record
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer
from llava_ft.errors import BadSampleError

from .test_tokenizer import TINY, copy_of, slow_ids

settings.register_profile("text", deadline=None, max_examples=150)
settings.load_profile("text")

CHUNKS = [
    " ", "  ", "\n", "\t", "Hello", "a", "###", "Human", "USER", "ASSISTANT", ":", " ASSISTANT: ", "</s>",
    "<s>", "<unk>", "<", ">", "[INST]", "[/INST]", "<|im_end|>", "<|im_start|>", "<im_start>", "<im_end>",
    "é", "😀", "中文", "{}", "{0}", "%s",
]  # fmt: skip
words = st.lists(st.sampled_from(CHUNKS) | st.text(max_size=4), max_size=8).map("".join)
texts = words.filter(lambda text: IMAGE_TOKEN not in text and "▁" not in text)


@pytest.fixture(scope="module", params=[False, True], ids=["new", "legacy"])
def directory(request, tmp_path_factory):
    return copy_of(TINY, tmp_path_factory.mktemp("tokenizer") / "t", legacy=request.param)


@cache
def tokenizer_in(directory):
    tokenizer = load_tokenizer(directory)
    add_image_tokens(tokenizer, mm_use_im_start_end=True, mm_use_im_patch_token=False)
    return tokenizer


@cache
def make_in(directory, template, im_start_end=False):
    return SampleTokenizer(tokenizer_in(directory), get_template(template), mm_use_im_start_end=im_start_end)


@st.composite
def samples(draw):
    """Draw a sample whose human turns hold placeholders at random places."""
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        question = IMAGE_TOKEN.join(draw(st.lists(texts, min_size=1, max_size=3)))
        turns += [Turn("human", question), Turn("gpt", draw(texts))]
    num_images = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    return Sample(0, "", tuple(turns), tuple(f"{i}.jpg" for i in range(num_images)))


def outcome(act, *arguments):
    """Return what `act` gives and None, or None and its error."""
    try:
        return act(*arguments), None
    except BadSampleError as error:
        return None, error


chat_templates = st.sampled_from(sorted(name for name in TEMPLATES if name != "plain"))


@given(text=words)
def test_ids_equal_the_slow_tokenizer(directory, text):
    wanted = slow_ids(directory, text, legacy=tokenizer_in(directory).legacy, added=("<im_start>", "<im_end>"))
    assert tokenizer_in(directory)(text).input_ids == wanted


@given(sample=samples(), template=chat_templates, im_start_end=st.booleans())
def test_labels_and_placeholders(directory, sample, template, im_start_end):
    make = make_in(directory, template, im_start_end)
    tokenized, error = outcome(make, sample)
    if tokenized is None:
        answers = [turn.text for turn in sample.turns if turn.role == "gpt"]
        assert error.kind == "empty-first-question" or (error.kind == "no-supervised-token" and not any(answers))
        return
    assert tokenized.input_ids.count(IMAGE_TOKEN_INDEX) == len(sample.images)
    assert len(tokenized.labels) == len(tokenized.input_ids)
    for token, label in zip(tokenized.input_ids, tokenized.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        assert token != IMAGE_TOKEN_INDEX or label == IGNORE_INDEX
    assert any(label != IGNORE_INDEX for label in tokenized.labels)
    text = "".join(segment.text for segment in make.segments(sample))
    pieces = [make_pieces(directory, piece) for piece in text.split(IMAGE_TOKEN)]
    wanted = [1, *pieces[0]]
    for piece in pieces[1:]:
        wanted += [IMAGE_TOKEN_INDEX, *piece]
    assert tokenized.input_ids == wanted


def make_pieces(directory, text):
    legacy = tokenizer_in(directory).legacy
    return slow_ids(directory, text, legacy=legacy, added=("<im_start>", "<im_end>"))[1:]


@given(sample=samples(), template=chat_templates)
def test_targets_decode_to_the_answers(directory, sample, template):
    tokenizer, make = tokenizer_in(directory), make_in(directory, template)
    tokenized, _ = outcome(make, sample)
    assume(tokenized is not None)
    if make.template.style is TemplateStyle.INST:  # an empty question leaves nothing between two answers
        assume(all(turn.text.strip() for turn in sample.turns[2::2]))
    stop = make.template.stop
    answers = [turn.text for turn in sample.turns if turn.role == "gpt"]
    runs, run = [], []
    for label in [*tokenized.labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    wanted = {
        TemplateStyle.BLOCKS: [f"### Assistant: {answer}\n" for answer in answers],
        TemplateStyle.PAIRS: [f" {answer}{stop}" for answer in answers if answer],
        TemplateStyle.INST: [f" {answer} {stop}" for answer in answers if answer],
        TemplateStyle.CHATML: [f"{answer}{stop}" for answer in answers if answer],
    }[make.template.style]
    if make.template.style is TemplateStyle.BLOCKS:
        wanted[-1] += "### "
    if tokenizer.legacy:  # blanks are added after special tokens
        runs, wanted = ([text.replace(" ", "") for text in each] for each in (runs, wanted))
    else:  # decoding leaves out one leading space
        wanted = [text.removeprefix(" ") for text in wanted]
    assert runs == wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("<image>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
turn_values = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system"]) | json_values, "value": words | json_values}
)
records = st.fixed_dictionaries(
    {"conversations": st.lists(turn_values | json_values, max_size=4) | json_values},
    optional={"id": json_values, "image": json_values | st.just("a.jpg")},
)


@settings(max_examples=400)
@given(record=records | json_values, template=st.sampled_from(sorted(TEMPLATES)))
def test_any_record_is_a_sample_or_a_named_error(directory, record, template):
    sample, error = outcome(parse_record, record, 9)
    if error is None:
        tokenized, error = outcome(make_in(directory, template), sample)
    if error is None:
        assert len(tokenized.image_positions) == len(sample.images)
    else:
        assert error.index == 9
        assert error.kind
        assert str(error).startswith("Sample 9")


@given(text=st.text(alphabet=st.characters(exclude_categories=()), max_size=6))
def test_every_text_is_encoded_or_refused(directory, text):
    """Also half characters, which Python reads from JSON and no tokenizer takes."""
    record = {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}
    sample, error = outcome(parse_record, record, 0)
    if error is None:
        make_in(directory, "v0")(sample)
    else:
        assert error.kind == "bad-text"
