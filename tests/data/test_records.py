"""Records: what is accepted, and one clear error for each thing that is not."""

import pickle

import pytest

from llava_ft.data.records import Sample, Turn, parse_record
from llava_ft.errors import BadSampleError

TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]


def turn(role, value):
    return {"from": role, "value": value}


@pytest.mark.parametrize(
    ("fields", "sample_id", "images"),
    [
        ({}, "", ()),
        ({"id": None, "image": None}, "", ()),
        ({"id": "000000033471"}, "000000033471", ()),
        ({"id": 33471, "image": "coco/a.jpg"}, "33471", ("coco/a.jpg",)),
        ({"id": 0}, "0", ()),
        ({"id": 1.5}, "1.5", ()),
        ({"image": ["a.jpg", "b.png"]}, "", ("a.jpg", "b.png")),
        ({"image": []}, "", ()),
        (
            {"image": "/absolute/ä b.jpg", "model": "x", "width": 3, "source": {"a": [1]}},
            "",
            ("/absolute/ä b.jpg",),
        ),
    ],
)
def test_accepted_fields(fields, sample_id, images):
    sample = parse_record({**fields, "conversations": TALK}, 5)
    assert sample == Sample(5, sample_id, (Turn("human", "Hi"), Turn("gpt", "Ho")), images)


@pytest.mark.parametrize(
    ("turns", "roles", "system"),
    [
        (TALK, ["human", "gpt"], None),
        ([turn("gpt", "Welcome!"), *TALK], ["gpt", "human", "gpt"], None),
        ([turn("system", "Be brief."), *TALK], ["human", "gpt"], "Be brief."),
        ([turn("system", ""), turn("gpt", "Welcome!"), *TALK], ["gpt", "human", "gpt"], ""),
        ([*TALK, turn("human", "Sure?")], ["human", "gpt", "human"], None),
        ([turn("human", ""), turn("gpt", "")], ["human", "gpt"], None),
        ([{**turn("human", "Hi"), "weight": None}, turn("gpt", "\u2028 \U0001f600")], ["human", "gpt"], None),
    ],
)
def test_accepted_turns(turns, roles, system):
    sample = parse_record({"conversations": turns}, 0)
    assert [each.role for each in sample.turns] == roles
    assert sample.system == system


def record(*turns, **fields):
    return {"id": "r7", "conversations": list(turns), **fields}


MALFORMED = [
    (None, "not-an-object", "the record is null, not an object with 'conversations'"),
    ("text", "not-an-object", "the record is the string 'text'"),
    (["a", "b"], "not-an-object", "the record is a list of 2"),
    (7, "not-an-object", "the record is the number 7"),
    (
        {"id": "r7", "image": "a.jpg"},
        "missing-conversations",
        r"no 'conversations' \(keys found: id, image\)",
    ),
    ({}, "missing-conversations", r"no 'conversations' \(keys found: none\)"),
    (
        {"id": "r7", "conversations": None},
        "bad-conversations",
        "'conversations' is null, not a list of turns",
    ),
    ({"id": "r7", "conversations": "Hi"}, "bad-conversations", "'conversations' is the string 'Hi'"),
    ({"id": "r7", "conversations": {"from": "human"}}, "bad-conversations", "'conversations' is an object"),
    (record(), "empty-conversation", "'conversations' is an empty list"),
    (record("Hi", "Ho"), "bad-turn", "turn 0 is the string 'Hi', not an object with 'from' and 'value'"),
    (record(turn("human", "Hi"), None), "bad-turn", "turn 1 is null"),
    (record({"value": "Hi"}), "bad-turn", "turn 0 has no 'from'"),
    (record({"from": "human"}), "bad-turn", "turn 0 has no 'value'"),
    (record({"role": "user", "content": "Hi"}), "bad-turn", "turn 0 has no 'from'"),
    (record(turn("user", "Hi")), "unknown-role", "turn 0 is from 'user'; .* Write 'human'"),
    (record(*TALK, turn("assistant", "x")), "unknown-role", "turn 2 is from 'assistant'; .* Write 'gpt'"),
    (record(turn("Human", "Hi")), "unknown-role", "turn 0 is from 'Human'; .* Write 'human'"),
    (record(turn(None, "Hi")), "unknown-role", "turn 0 is from null; allowed are 'human', 'gpt', 'system'"),
    (record(turn("", "Hi")), "unknown-role", "turn 0 is from ''"),
    (record(turn(["human"], "Hi")), "unknown-role", "turn 0 is from a list of 1"),
    (record(turn("human", None)), "bad-text", "the 'value' of turn 0 is null, not a string"),
    (record(turn("human", 3)), "bad-text", "the 'value' of turn 0 is the number 3"),
    (record(turn("human", "Hi"), turn("gpt", ["Ho"])), "bad-text", "the 'value' of turn 1 is a list of 1"),
    (record(turn("human", "Hi"), turn("gpt", True)), "bad-text", "turn 1 is the truth value true"),
    (record(turn("human", "a\ud83d")), "bad-text", r"turn 0 holds half of a character .* at position 1"),
    (
        record(turn("human", "Hi"), turn("human", "Ho")),
        "roles-not-alternating",
        "0 and 1 are both from 'human'",
    ),
    (record(*TALK, turn("gpt", "x")), "roles-not-alternating", "turns 1 and 2 are both from 'gpt'"),
    (
        record(turn("gpt", "a"), turn("gpt", "b"), *TALK),
        "roles-not-alternating",
        "0 and 1 are both from 'gpt'",
    ),
    (record(turn("gpt", "Welcome!")), "no-human-turn", "no turn is from 'human'"),
    (record(turn("system", "Be brief.")), "no-human-turn", "no turn is from 'human'"),
    (
        record(*TALK, turn("system", "x")),
        "misplaced-system",
        "turn 2 is a 'system' turn; only the first may be",
    ),
    (
        record(turn("system", "a"), turn("system", "b"), *TALK),
        "misplaced-system",
        "turn 1 is a 'system' turn",
    ),
    (record(*TALK, image=7), "bad-image", "'image' is the number 7"),
    (record(*TALK, image={"file": "a.jpg"}), "bad-image", "'image' is an object"),
    (record(*TALK, image=False), "bad-image", "'image' is the truth value false"),
    (record(*TALK, image=""), "bad-image", "'image' is an empty path"),
    (record(*TALK, image=["a.jpg", None]), "bad-image", r"'image'\[1\] is null"),
    (record(*TALK, image=[["a.jpg"]]), "bad-image", r"'image'\[0\] is a list of 1"),
    (record(*TALK, image=["a.jpg", " "]), "bad-image", r"'image'\[1\] is an empty path"),
    (record(*TALK, image="a\0.jpg"), "bad-image", r"'image' is 'a\\x00.jpg', which does not name a file"),
    (record(*TALK, image=".."), "bad-image", r"'image' is '..', which does not name a file"),
    (record(*TALK, image="\udcff.jpg"), "bad-image", "'image' holds half of a character"),
    ({"id": ["r7"], "conversations": TALK}, "bad-id", "'id' is a list of 1. Give a string or a number"),
    ({"id": True, "conversations": TALK}, "bad-id", "'id' is the truth value true"),
    ({"id": float("nan"), "conversations": TALK}, "bad-id", "'id' is nan"),
]


@pytest.mark.parametrize(("value", "kind", "message"), MALFORMED)
def test_malformed_record(value, kind, message):
    with pytest.raises(BadSampleError, match=message) as caught:
        parse_record(value, 12)
    error = caught.value
    assert (error.index, error.kind) == (12, kind)
    has_id = isinstance(value, dict) and value.get("id") == "r7"
    assert error.sample_id == ("r7" if has_id else "")
    assert str(error) == f"Sample 12{' (id ' + repr('r7') + ')' if has_id else ''}: {error.reason}"
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.kind) == (str(error), kind)


def test_long_wrong_value_is_shortened():
    with pytest.raises(BadSampleError) as caught:
        parse_record("x" * 10_000, 0)
    assert len(str(caught.value)) < 200


def test_samples_are_frozen_and_hashable():
    sample = parse_record({"conversations": TALK}, 0)
    assert hash(sample) == hash(parse_record({"conversations": TALK}, 0))
    with pytest.raises(AttributeError):
        sample.index = 1


@pytest.mark.parametrize(
    "question",
    [
        "<video>\nWhy?",
        "Why?\n<video>",
        "In <audio> who speaks?",
        "<AUDIO>",
        "<img>a/b.jpg</img> What?",
        "<|image_pad|>",
    ],
)
def test_marks_of_other_programs_are_refused(question):
    with pytest.raises(BadSampleError, match="would be learnt as text") as caught:
        parse_record({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A."}]}, 0)
    assert caught.value.kind == "unknown-media"


@pytest.mark.parametrize(
    "text",
    [
        "What does the <video> tag do?",
        "Explain `<video>`.",
        "<video><source src='a.mp4'></video> does not play",
        "<video controls>\n<img src='a.png'>",
        "An <audio> element",
        "<img></img>",
    ],
)
def test_what_is_said_about_html_is_text(text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"<video>, <img>a</img>: {text}"}]
    nothing = {"video": None, "videos": [], "audio": {"bytes": None, "path": None}, "speech": ""}
    assert parse_record({"conversations": turns, **nothing}, 0).turns[0].text == text
