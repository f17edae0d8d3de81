"""Records in the other forms: messages of OpenAI and Hugging Face, pairs of The Cauldron; their images and weights."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava_ft.data.records import (
    BrokenRecord,
    DataUri,
    EmbeddedImage,
    Sample,
    Turn,
    embedded_name,
    image_values,
    parse_embedded,
    parse_record,
)
from llava_ft.errors import BadSampleError

PNG = "data:image/png;base64,aGk="


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def text(value):
    return {"type": "text", "text": value}


def image(**fields):
    return {"type": "image", **fields}


def record(*messages, **fields):
    return {"id": "r7", "messages": list(messages), **fields}


@pytest.mark.parametrize(
    ("content", "columns", "expected", "images"),
    [
        ("Hi", {}, "Hi", ()),
        ([text("Hi"), text(" there")], {}, "Hi there", ()),
        ([image(image="a.jpg"), text("What?")], {}, "<image>\nWhat?", ("a.jpg",)),
        ([text("What?"), image(path="a.jpg")], {}, "What?<image>", ("a.jpg",)),
        (
            [image(url="a.jpg"), image(image="b.jpg"), text("\nWhat?")],
            {},
            "<image>\n<image>\nWhat?",
            ("a.jpg", "b.jpg"),
        ),
        ([{"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}], {}, "<image>", ("a.jpg",)),
        ([{"type": "image_url", "image_url": "a.jpg"}], {}, "<image>", ("a.jpg",)),
        ([image(), text("or"), image()], {"images": ["a.jpg", "b.jpg"]}, "<image>\nor<image>", ("a.jpg", "b.jpg")),
        ([image(), text("?")], {"image": "a.jpg"}, "<image>\n?", ("a.jpg",)),
        ([image(index=1), image(index=0)], {"images": ["a.jpg", "b.jpg"]}, "<image>\n<image>", ("b.jpg", "a.jpg")),
        ("<image>\n<image>\nSame?", {"images": ["a.jpg", "b.jpg"]}, "<image>\n<image>\nSame?", ("a.jpg", "b.jpg")),
        (
            [text("<image> and"), image(image="c.jpg"), image()],
            {"images": ["a.jpg", "b.jpg"]},
            "<image> and<image>\n<image>",
            ("a.jpg", "c.jpg", "b.jpg"),
        ),
        ("What?", {"images": ["a.jpg"]}, "What?", ("a.jpg",)),
        ([text("x"), image(image=None, path=None, text="", index=None)], {"image": ["a.jpg"]}, "x<image>", ("a.jpg",)),
        ([{**text("What?"), "image": None, "image_url": None}], {}, "What?", ()),
    ],
)
def test_contents(content, columns, expected, images):
    sample = parse_record(record(user(content), assistant("A."), **columns), 3)
    assert sample == Sample(3, "r7", (Turn("human", expected), Turn("gpt", "A.")), images)


def test_a_system_message_and_parts_in_every_role():
    messages = [
        {"role": "system", "content": [text("Be brief.")]},
        assistant("Hello."),
        user("Hi"),
        assistant([text("A.")]),
    ]
    sample = parse_record({"messages": messages}, 0)
    assert sample.system == "Be brief."
    assert sample.turns == (Turn("gpt", "Hello."), Turn("human", "Hi"), Turn("gpt", "A."))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jpg", "a.jpg"),
        (b"hi", b"hi"),
        (PNG, DataUri(PNG)),
        ("DATA:image/jpeg;charset=x;BASE64,aGk=", None),
        ({"bytes": b"hi", "path": "a.jpg"}, b"hi"),
        ({"bytes": None, "path": "a.jpg"}, "a.jpg"),
        ({"path": "a.jpg"}, "a.jpg"),
        ({"bytes": EmbeddedImage(("x",)), "path": None}, EmbeddedImage(("x",))),
        ("file:///data/a%20b.jpg", "/data/a b.jpg"),
        ("file://localhost/data/a.jpg", "/data/a.jpg"),
        ("C:odd:name.jpg", "C:odd:name.jpg"),
    ],
)
@pytest.mark.parametrize("column", ["image", "images", "part"])
def test_images(value, expected, column):
    one = record(user([image(image=value)])) if column == "part" else record(user("<image>"), **{column: value})
    (found,) = image_values(one, 5)
    assert found == (DataUri(value) if expected is None else expected)
    name = found if isinstance(found, str) else "embedded:5/0"
    assert parse_record(one, 5).images == (name,)


def test_embedded_images_are_numbered_by_their_place():
    sample = parse_record(record(user("<image><image><image>"), images=["a.jpg", b"one", PNG]), 12)
    assert sample.images == ("a.jpg", "embedded:12/1", "embedded:12/2")
    assert parse_embedded(embedded_name(12, 2)) == (12, 2)
    assert parse_embedded("a.jpg") is None


@pytest.mark.parametrize("given", [["a.jpg"], "a.jpg"])
def test_image_and_images(given):
    talk = {"conversations": [{"from": "human", "value": "<image>"}]}
    assert parse_record({"images": given, **talk}, 0).images == ("a.jpg",)
    assert parse_record({"images": given, "image": None, **talk}, 0).images == ("a.jpg",)
    assert parse_record({"images": given, "image": [], **talk}, 0).images == ("a.jpg",)
    assert parse_record({"images": given, "image": "a.jpg", **talk}, 0).images == ("a.jpg",)
    with pytest.raises(BadSampleError, match="both 'image' and 'images', and they differ") as caught:
        parse_record({"images": given, "image": "b.jpg", **talk}, 0)
    assert caught.value.kind == "bad-image"


@pytest.mark.parametrize(("weight", "expected"), [(None, 1), (0, 0), (1, 1), (0.0, 0), (1.0, 1), (False, 0), (True, 1)])
def test_weights(weight, expected):
    talk = [{"from": "human", "value": "Hi", "weight": None}, {"from": "gpt", "value": "A.", "weight": weight}]
    for one in ({"conversations": talk}, record(user("Hi"), assistant("A.", weight=weight))):
        (_, answer) = parse_record(one, 0).turns
        assert answer.weight == expected
        assert type(answer.weight) is int


def test_pairs():
    pairs = [{"user": "What?", "assistant": "A.", "source": "x"}, {"user": "And?", "assistant": "B."}]
    sample = parse_record({"texts": pairs, "images": ["a.jpg", "b.jpg"]}, 0)
    assert [turn.text for turn in sample.turns] == ["<image>\n<image>\nWhat?", "A.", "And?", "B."]
    assert sample.images == ("a.jpg", "b.jpg")
    pairs[1]["user"] = "And <image>?"
    assert parse_record({"texts": pairs, "images": ["a.jpg"]}, 0).turns[0].text == "What?"


def test_empty_columns_beside_the_one_in_use():
    """Tables made of several data sets have a column for each form, and null where it is not used."""
    talk = [{"from": "human", "value": "Hi"}]
    assert parse_record({"conversations": talk, "messages": None, "texts": None}, 0).turns[0].text == "Hi"
    assert parse_record({"conversations": None, "messages": [user("Ho")]}, 0).turns[0].text == "Ho"


TALK = (user("Hi"), assistant("A."))
REFUSED = [
    (record(), "empty-conversation", "'messages' is an empty list"),
    ({"id": "r7", "messages": None}, "bad-conversations", "'messages' is null, not a list of turns"),
    ({"id": "r7", "messages": [], "texts": []}, "bad-conversations", "both 'messages' and 'texts'. Leave in the one"),
    (record("Hi"), "bad-turn", "turn 0 is the string 'Hi', not an object with 'role' and 'content'"),
    (record({"role": "user"}), "bad-turn", "turn 0 has no 'content'"),
    (record({"from": "human", "value": "x"}), "bad-turn", "turn 0 has no 'role'. .* belong into 'conversations'"),
    (record({"role": "human", "content": "Hi"}), "unknown-role", "turn 0 is from 'human'; allowed .* Write 'user'"),
    (record({"role": "developer", "content": "x"}), "unknown-role", "Write 'system'"),
    (record({"role": "tool", "content": "x"}), "tool-turn", "turn 0 is from 'tool'. No template writes calls of tools"),
    (record(*TALK, {"role": "function", "content": "x"}), "tool-turn", "turn 2 is from 'function'"),
    (record(user("x"), assistant(None, tool_calls=[{}])), "tool-turn", "turn 1 calls a tool"),
    (record(user("x"), user("y")), "roles-not-alternating", "turns 0 and 1 are both from 'user'"),
    (record(assistant("x")), "no-human-turn", "no turn is from 'user'"),
    (record(user(None)), "bad-text", "the 'content' of turn 0 is null, not a string or a list of parts"),
    (record(user([])), "bad-text", "the 'content' of turn 0 is an empty list"),
    (record(user("a\ud83d")), "bad-text", "the 'content' of turn 0 holds half of a character"),
    (record(user([text(None)])), "bad-text", "the 'text' of part 0 of the 'content' of turn 0 is null"),
    (record(user([text("\ud83d")])), "bad-text", "the 'text' of part 0 .* half of a character"),
    (record(user(["x"])), "bad-part", "part 0 of the 'content' of turn 0 is the string 'x', not an object"),
    (record(user([{"text": "x"}])), "bad-part", "part 0 .* is of type null; allowed are 'text', 'image' and"),
    (record(user([{"type": "depth"}])), "bad-part", "part 0 .* is of type 'depth'"),
    (record(user([{"type": "video"}])), "unknown-media", "part 0 .* is of type 'video'"),
    (record(user([{"type": "input_audio"}])), "unknown-media", "part 0 .* is of type 'input_audio'"),
    (record(*TALK, video="a.mp4"), "unknown-media", "the record has a value under 'video'"),
    (record(*TALK, videos=["a.mp4"]), "unknown-media", "the record has a value under 'videos'"),
    (record(*TALK, audio={"bytes": b"x", "path": None}), "unknown-media", "the record has a value under 'audio'"),
    (record(user("Hi") | {"audio": "a.wav"}), "unknown-media", "turn 0 has a value under 'audio'"),
    (record(user([text("<video>\nWhy?")])), "unknown-media", "turn 0 holds '<video>', which would be learnt as text"),
    (record(user("x"), assistant([image(image="a")])), "image-in-answer", "part 0 of the 'content' of turn 1 is an"),
    (record({"role": "system", "content": [image()]}, *TALK), "image-in-system", "part 0 .* of turn 0 is an image"),
    (record(user([image()])), "placeholder-mismatch", "stands for an image of the record's 'images', which has 0"),
    (record(user([image(), image()]), images=["a"]), "placeholder-mismatch", "part 1 .* which has 1. Each such"),
    (record(user([image(index=3)]), images=["a"]), "placeholder-mismatch", "part 0 .* which has 1"),
    (record(user([{"type": "image_url"}])), "bad-image", "part 0 .* has no address. Write {'url': ...}"),
    (record(user([image(image=7)])), "bad-image", "part 0 of the 'content' of turn 0 is the number 7"),
    (record(user([image(image="https://a.b/c.png")])), "image-is-url", "is an address; download it"),
    (record(*TALK, images=["s3://a/b.png"]), "image-is-url", r"'images'\[0\] is 's3://a/b.png'"),
    (record(*TALK, image="HTTP://a.b/c.png"), "image-is-url", "is an address"),
    (record(*TALK, image="file://host/a.png"), "bad-image", "is written 'file:///absolute/path'"),
    (record(*TALK, image="file:///"), "bad-image", "'image' is '/', which does not name a file"),
    (record(*TALK, image="embedded:0/0"), "bad-image", "start with 'embedded:' are reserved"),
    (record(*TALK, image="data:text/plain;base64,aGk="), "bad-image", "allowed is 'data:image/TYPE;base64,'"),
    (record(*TALK, image="data:image/png,hi"), "bad-image", "allowed is 'data:image/TYPE;base64,'"),
    (record(*TALK, image=b""), "bad-image", "'image' holds no bytes"),
    (record(*TALK, image={}), "bad-image", "'image' is an object. Give the path"),
    (record(*TALK, image={"bytes": b"", "path": "a"}), "bad-image", "'image' holds no bytes"),
    (record(*TALK, image={"bytes": None, "path": None}), "bad-image", "'image' has neither 'bytes' nor a 'path'"),
    (record(*TALK, image={"bytes": "aGk=", "path": "a"}), "bad-image", "the 'bytes' of 'image' are the string 'aGk='"),
    (record(user("x"), assistant("y", weight=2)), "bad-weight", "the 'weight' of turn 1 is the number 2. Allowed"),
    (record(user("x"), assistant("y", weight=0.5)), "bad-weight", "is the number 0.5"),
    (record(user("x"), assistant("y", weight="0")), "bad-weight", "is the string '0'"),
    (record(user("x"), assistant("y", weight=float("nan"))), "bad-weight", "is the number nan"),
    (record({**user("x"), "weight": 1}), "bad-weight", "turn 0 has a 'weight', but is not an answer"),
    ({"id": "r7", "texts": "x"}, "bad-conversations", "'texts' is the string 'x'"),
    ({"id": "r7", "texts": [{"user": "x"}]}, "bad-turn", r"'texts'\[0\] is not an object with 'user' and 'assistant'"),
    ({"id": "r7", "texts": [{"user": 1, "assistant": "x"}]}, "bad-text", "the 'text' of turn 0 is the number 1"),
    (BrokenRecord("r7", "bad-member", "its .json is not valid."), "bad-member", "Sample 12 .* is not valid"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "kind", "message"), REFUSED)
def test_refused(value, kind, message):
    with pytest.raises(BadSampleError, match=message) as caught:
        parse_record(value, 12)
    error = caught.value
    assert (error.index, error.sample_id, error.kind) == (12, "r7", kind)
    assert len(str(error)) < 300


words = st.text(max_size=8).filter(lambda value: "<image>" not in value)


@given(st.lists(st.tuples(words, words, st.sampled_from([0, 1])), min_size=1, max_size=4), st.booleans())
def test_both_forms_give_the_same_sample(pairs, has_system):
    llava = [{"from": "system", "value": "S"}] if has_system else []
    openai = [{"role": "system", "content": "S"}] if has_system else []
    for question, answer, weight in pairs:
        llava += [{"from": "human", "value": question}, {"from": "gpt", "value": answer, "weight": weight}]
        openai += [user([text(question)]), assistant(answer, weight=weight)]
    first = parse_record({"conversations": llava, "image": "a.jpg"}, 1)
    assert first == parse_record({"messages": openai, "image": ["a.jpg"]}, 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url"]) | json_values},
    optional={"text": words | json_values, "image": json_values, "image_url": json_values, "index": json_values},
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]) | json_values,
        "content": st.text(max_size=5) | st.lists(parts | json_values, max_size=3) | json_values,
    },
    optional={"weight": json_values, "tool_calls": json_values},
)


@given(
    st.fixed_dictionaries(
        {}, optional={"messages": st.lists(messages, max_size=3), "texts": json_values, "images": json_values}
    )
)
@example({"messages": [{"role": "user", "content": [{"type": []}]}]})
def test_any_record_is_a_sample_or_a_named_error(value):
    try:
        sample, error = parse_record(value, 4), None
    except BadSampleError as refused:
        sample, error = None, refused
    if sample is not None:
        assert len(image_values(value, 4)) == len(sample.images)
    else:
        assert error.kind
        assert str(error).startswith("Sample 4")
