"""Laws of cutting conversations off, on numbers and through a whole data set."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_ft.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ft.conversation import get_template
from llava_ft.data.preparation.truncation import find_cut, first_predicted
from llava_ft.data.records import parse_record
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.errors import UserError
from tests.data.conftest import TOKENS_PER_IMAGE, record, turns

laws = settings(deadline=None, max_examples=400)


@st.composite
def conversations(draw):
    """Draw tokens as a tokenizer gives them: questions with images, then answers, some not supervised."""
    num_tokens = draw(st.integers(0, 2))
    images, spans, ends = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        for _ in range(draw(st.integers(0, 2))):
            num_tokens += draw(st.integers(0, 2))
            images.append((num_tokens, draw(st.integers(1, 9))))
            num_tokens += 1
        num_tokens += draw(st.integers(0, 4))
        answer = draw(st.integers(0, 5))
        if answer and draw(st.booleans()):
            spans.append((num_tokens, num_tokens + answer))
        num_tokens += answer
        if answer:
            ends.append(num_tokens)
    return num_tokens + draw(st.integers(0, 3)), images, spans, ends


def expanded(num_tokens, images):
    return num_tokens + sum(size - 1 for position, size in images if position < num_tokens)


def predicted(spans, cut):
    return sum(max(0, min(end, cut) - max(start, 1)) for start, end in spans)


def cut_down(conversation, cut):
    """Give what a cut leaves, as a conversation of its own."""
    _, images, spans, ends = conversation
    return (
        cut,
        [image for image in images if image[0] < cut],
        [(start, min(end, cut)) for start, end in spans if start < cut],
        [end for end in ends if end <= cut],
    )


class TestLaws:
    @laws
    @given(conversations(), st.integers(1, 60))
    def test_fits_and_keeps_something_to_predict(self, conversation, max_length):
        num_tokens, images, spans, _ = conversation
        cut = find_cut(*conversation, max_length)
        if cut is None:
            # No cut at all would have done: what has to be predicted first is beyond the limit.
            first = first_predicted(spans)
            assert first is None or expanded(first + 1, images) > max_length
            return
        assert 0 <= cut <= num_tokens
        assert expanded(cut, images) <= max_length
        assert cut == num_tokens or predicted(spans, cut) > 0

    @laws
    @given(conversations(), st.integers(1, 60))
    def test_idempotent(self, conversation, max_length):
        cut = find_cut(*conversation, max_length)
        if cut:
            assert find_cut(*cut_down(conversation, cut), max_length) == cut

    @laws
    @given(conversations(), st.integers(1, 60))
    def test_whole_answers_stay_if_one_does(self, conversation, max_length):
        num_tokens, images, spans, ends = conversation
        cut = find_cut(*conversation, max_length)
        if cut is None or cut == num_tokens:
            return
        whole = [end for end in ends if expanded(end, images) <= max_length and predicted(spans, end)]
        if whole:
            assert cut == max(whole)
        else:  # Inside the first supervised answer, as far as there is room.
            assert expanded(cut + 1, images) > max_length

    @laws
    @given(conversations(), st.integers(1, 59))
    def test_more_room_keeps_more(self, conversation, max_length):
        fewer, more = find_cut(*conversation, max_length), find_cut(*conversation, max_length + 1)
        assert (fewer or 0) <= (more or 0)

    @laws
    @given(conversations())
    def test_what_fits_is_left_alone(self, conversation):
        num_tokens, images = conversation[:2]
        assert find_cut(*conversation, expanded(num_tokens, images)) == num_tokens


DIALOGUE = {
    "id": "d",
    "image": ["square.png", "rgba.png"],
    "conversations": turns("<image>\nOne?", "yes, one", "<image>\nTwo?", "no, not two", "Sure?", "yes and no " * 20),
}


class TestTruncate:
    def test_turns_go_from_the_end(self, build, tokenize):
        ends = tokenize(parse_record(DIALOGUE, 0)).answer_ends
        kept = [ends[0] + 15, ends[1] + 30, ends[2] + 30]
        whole = build([DIALOGUE]).train.lengths[0]
        assert whole == kept[2]
        for limit in range(kept[0], whole + 2):
            datasets = build([DIALOGUE], model_max_length=limit)
            assert datasets.train.lengths[0] == max(length for length in kept if length <= limit)
            assert datasets.report.num_truncated == int(limit < whole)
            assert datasets.report.num_lost_tokens == whole - datasets.train.lengths[0]
            assert datasets.report.truncated_ids == ["d"] * (limit < whole)

    def test_the_first_answer_loses_its_tail_and_never_all_of_it(self, build):
        entry = record("r", image="square.png", answer="one two three four five six seven")
        whole = build([entry]).train[0]
        supervised = (whole["labels"] != IGNORE_INDEX).nonzero().flatten().tolist()
        for limit in range(supervised[0] + 1, len(whole["labels"])):
            item = build([entry], model_max_length=limit).train[0]
            assert item["input_ids"].tolist() == whole["input_ids"][:limit].tolist()
            assert item["labels"].tolist() == whole["labels"][:limit].tolist()
        with pytest.raises(UserError, match=r"(?s)truncated-answer: 1\).*'r'\): of its \d+ tokens"):
            build([entry], model_max_length=supervised[0])

    @pytest.mark.parametrize("limit", range(58, 330, 9))
    def test_images_are_whole_and_those_behind_the_cut_go(self, build, limit):
        datasets = build([DIALOGUE, record()], model_max_length=limit, on_bad_sample="skip")
        whole = build([DIALOGUE, record()]).train[0]
        for item in (datasets.train[position] for position in range(len(datasets.train))):
            num_images = len(item.get("pixel_values", []))
            assert len(item["input_ids"]) <= limit
            assert int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == num_images * TOKENS_PER_IMAGE
            assert (item["labels"][1:] != IGNORE_INDEX).any()
            if item["index"] == 0:
                length = len(item["input_ids"])
                assert item["input_ids"].tolist() == whole["input_ids"][:length].tolist()
                assert item["labels"].tolist() == whole["labels"][:length].tolist()
                assert len(datasets.train.image_refs(0)) == num_images

    def test_all_text_supervised(self, build, tokenizer):
        tokenize = SampleTokenizer(tokenizer, get_template("v1"), supervise="all")
        item = build([record(answer="word " * 50)], tokenize=tokenize, model_max_length=10).train[0]
        assert len(item["input_ids"]) == 10
        assert (item["labels"][1:] != IGNORE_INDEX).all()


class TestOtherPolicies:
    RECORDS = (record("short"), record("long", answer="word " * 100), record("longer", answer="word " * 200))

    def test_drop_leaves_them_out(self, build, caplog):
        datasets = build(list(self.RECORDS), model_max_length=100, truncation="drop")
        assert [datasets.train.describe(item["index"]) for item in datasets.train] == ["0 (id 'short')"]
        report = datasets.report
        assert (report.num_usable, report.num_too_long, report.num_truncated) == (1, 2, 0)
        assert report.too_long_ids == ["long", "longer"]
        assert report.num_lost_tokens == sum(build(list(self.RECORDS)).train.lengths[1:])
        assert "2 records are too long and left out" in report.describe()
        assert any("are longer than model_max_length = 100" in message for message in caplog.messages)

    @pytest.mark.parametrize("policy", ["error", "skip"])
    def test_error_refuses_the_run(self, build, policy):
        longest = max(build(list(self.RECORDS)).train.lengths)
        with pytest.raises(UserError) as caught:
            build(list(self.RECORDS), model_max_length=100, truncation="error", on_bad_sample=policy)
        message = str(caught.value)
        assert "2 of 3 records of" in message
        assert f"longer than model_max_length = 100 (the longest has {longest} tokens): long, longer." in message
        assert "--truncation truncate" in message

    def test_none_left(self, build):
        with pytest.raises(UserError, match=r"2 of 2 records of .* are longer .* so none is left"):
            build(list(self.RECORDS[1:]), model_max_length=100, truncation="drop")

    @pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
    def test_what_fits_is_used_by_all(self, build, policy):
        assert build(list(self.RECORDS), truncation=policy).report.num_usable == 3

    def test_unknown_policy(self, build):
        with pytest.raises(UserError, match="truncation is 'cut'; it can be error, drop, truncate"):
            build([record()], truncation="cut")
