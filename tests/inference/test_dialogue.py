"""A chat: what is asked of the model, and what each line does."""

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import GenerationMixin

from llava_ft.conversation import TEMPLATES, TemplateStyle, get_template
from llava_ft.data.records import parse_record
from llava_ft.data.tokenize import SampleTokenizer, tokenize_prompt
from llava_ft.errors import RunError, UserError
from llava_ft.inference.console import find_typed_path, piped_lines
from llava_ft.inference.dialogue import Dialogue, Picture, Question
from llava_ft.inference.generate import build_prompt
from llava_ft.inference.load import LoadedModel, load_model
from llava_ft.inference.responder import AnswerStreamer, Responder, Sampling
from llava_ft.inference.voices import single_voice
from tests.conftest import RECORDINGS
from tests.inference.typed_chat import LANDSCAPE, SHORT, SQUARE, V1, Typed

pytestmark = pytest.mark.usefixtures("in_recordings")

CHAT_TEMPLATES = [name for name, template in TEMPLATES.items() if template.style is not TemplateStyle.PLAIN]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        return load_model("ckpt/llava15-tiny")


@pytest.fixture
def typed(loaded: LoadedModel) -> Typed:
    return Typed([single_voice(loaded, "model", None)])


def conversation(template: str, *, mm_use_im_start_end: bool = False) -> Dialogue:
    dialogue = Dialogue(get_template(template), mm_use_im_start_end)
    pictures = [Picture.read(LANDSCAPE), Picture.read(SQUARE), Picture.read(SQUARE)]
    dialogue.exchanges += [
        (Question("What is this?", (pictures[0],)), "A field."),
        (Question("And in winter?"), "White."),
        (Question("Compare <image> with <image>.", (pictures[1], pictures[2])), "They are the same."),
    ]
    return dialogue


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_prompt_is_how_the_training_text_begins(name: str, loaded: LoadedModel):
    dialogue = conversation(name)
    question, answer = dialogue.exchanges.pop()
    prompt = dialogue.prompt(question)
    dialogue.exchanges.append((question, answer))
    sample = parse_record(dialogue.record("chat"), 0)
    segments = SampleTokenizer(loaded.tokenizer, get_template(name)).segments(sample)
    text = "".join(segment.text for segment in segments)
    if get_template(name).style is TemplateStyle.BLOCKS:  # written without line breaks at inference, as in LLaVA
        text = text.replace("\n\n###", "###").replace("### ", "###").replace(".\n", ".").replace("?\n", "?")
    assert text.startswith(prompt)
    assert text[len(prompt) :].lstrip().startswith(answer)


def test_a_prompt_has_the_tokens_around_images_that_training_has(loaded: LoadedModel):
    dialogue = conversation("v1", mm_use_im_start_end=True)
    question, _ = dialogue.exchanges.pop()
    prompt = dialogue.prompt(question)
    assert "USER: <im_start><image><im_end>\nWhat is this? ASSISTANT: A field.</s>USER: And in winter?" in prompt
    assert prompt.endswith("USER: Compare <im_start><image><im_end> with <im_start><image><im_end>. ASSISTANT:")


def test_the_first_turn_is_what_generate_asks():
    picture = Picture.read(LANDSCAPE)
    prompt = Dialogue(V1).prompt(Question("What is it?", (picture,)))
    assert prompt == build_prompt("What is it?", 1, V1)


def test_an_answer_that_says_image_asks_for_none():
    dialogue = Dialogue(V1, exchanges=[(Question("What do you write for pictures?"), "I write <image>.")])
    assert "<image>" not in dialogue.prompt(Question("Thanks."))


def test_questions_and_images_have_to_fit():
    with pytest.raises(UserError, match="The question has 1 <image> but 0 images are given"):
        Question("What is <image>?")


@pytest.mark.parametrize("path", ["ckpt/llava15-tiny", "ckpt/llava16-tiny-anyres"])
def test_what_is_kept_in_memory_changes_no_answer(path: str):
    loaded = load_model(path)
    kept, template = Responder(loaded), V1
    dialogue = Dialogue(template)
    questions = [
        Question("What is this?", (Picture.read(LANDSCAPE),)),
        Question("And why?"),
        Question("And this one? <image>", (Picture.read(SQUARE),)),
        Question("Which is larger?"),
    ]
    reused: list[int] = []
    for question in questions:
        prompt, pictures = dialogue.prompt(question), dialogue.pictures(question)
        reply = kept.answer(prompt, pictures, template, SHORT)
        afresh = Responder(loaded).answer(prompt, pictures, template, SHORT)
        assert reply.ids == afresh.ids
        assert afresh.num_reused == 0
        assert reply.num_prompt == afresh.num_prompt
        reused.append(reply.num_reused)
        dialogue.exchanges.append((question, reply.text))
    assert reused[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(reused))


def test_another_picture_is_read_although_its_tokens_look_the_same(loaded: LoadedModel):
    kept = Responder(loaded)
    ids: list[list[int]] = []
    for path in (LANDSCAPE, SQUARE):
        picture = Picture.read(path)
        prompt = Dialogue(V1).prompt(Question("What is this?", (picture,)))
        reply = kept.answer(prompt, [picture], V1, SHORT)
        assert reply.ids == Responder(loaded).answer(prompt, [picture], V1, SHORT).ids
        system = prompt.index("<image>")
        assert reply.num_reused <= len(tokenize_prompt(prompt[:system], loaded.tokenizer))
        ids.append(reply.ids)
    assert ids[0] != ids[1]


def test_the_same_prompt_again_reads_its_last_token_only(loaded: LoadedModel):
    kept = Responder(loaded)
    first = kept.answer("Hello", [], V1, SHORT)
    again = kept.answer("Hello", [], V1, SHORT)
    assert (again.ids, again.num_reused) == (first.ids, first.num_prompt - 1)


def test_an_answer_that_broke_off_leaves_no_memory(loaded: LoadedModel):
    def fail(_: str) -> None:
        raise KeyboardInterrupt

    kept = Responder(loaded)
    expected = kept.answer("Hello", [], V1, SHORT).ids
    with pytest.raises(KeyboardInterrupt):
        kept.answer("Hello you", [], V1, SHORT, write=fail)
    again = kept.answer("Hello", [], V1, SHORT)
    assert (again.ids, again.num_reused) == (expected, 0)


def test_too_little_memory_ends_an_answer_and_not_the_chat(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    typed = Typed([single_voice(loaded, "model", None)], is_interactive=True)
    (answer,) = typed.take("Hello")
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", exhausted)
        typed.take("And why?")
        with pytest.raises(RunError, match="The memory of the GPU is too small for this conversation"):
            Typed([single_voice(loaded, "model", None)]).take("Hello")
    assert typed.take("/clear", "Hello") == [answer]


def test_beams_answer_without_memory(loaded: LoadedModel):
    beams = Sampling(max_new_tokens=6, num_beams=3)
    kept, written = Responder(loaded), list[str]()
    kept.answer("Hello", [], V1, SHORT)
    reply = kept.answer("Hello", [], V1, beams, write=written.append)
    assert reply.num_reused == 0
    assert "".join(written) == reply.text == Responder(loaded).answer("Hello", [], V1, beams).text
    assert kept.answer("Hello", [], V1, SHORT).ids == Responder(loaded).answer("Hello", [], V1, SHORT).ids


def test_why_an_answer_ended(loaded: LoadedModel):
    assert Responder(loaded).answer("Hello", [], V1, Sampling(max_new_tokens=3)).ending == "length"
    long_prompt = "a " * (loaded.context_len - 8)
    responder = Responder(loaded)
    num_prompt = len(tokenize_prompt(long_prompt, loaded.tokenizer))
    assert num_prompt < loaded.context_len
    full = responder.answer(long_prompt, [], V1, Sampling(max_new_tokens=512))
    assert full.num_prompt + len(full.ids) <= loaded.context_len
    assert full.ending in ("context", "finished")


def test_a_stopped_answer_stays_as_far_as_it_was_written(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    def stop_after(text: str, *, is_interactive: bool) -> Typed:
        typed = Typed([single_voice(loaded, "model", None)], Sampling(max_new_tokens=64), is_interactive=is_interactive)
        put = AnswerStreamer.put

        def stop(streamer: AnswerStreamer, value: torch.Tensor) -> None:
            put(streamer, value)
            if len(typed.output.getvalue()) >= len(text):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(AnswerStreamer, "put", stop)
            typed.take("Hello")
        return typed

    typed = stop_after("four", is_interactive=True)
    ((_, answer),) = typed.chat.dialogues[0].exchanges
    assert typed.output.getvalue() == answer + "\n"
    assert "Stopped. What was written stays in the conversation." in typed.messages.getvalue()
    assert Typed([single_voice(loaded, "model", None)]).take("Hello")[0].startswith(answer[:4])
    typed = stop_after("", is_interactive=True)
    assert typed.chat.dialogues[0].exchanges == []
    assert "Stopped. The question was taken back." in typed.messages.getvalue()
    with pytest.raises(KeyboardInterrupt):
        stop_after("four", is_interactive=False)


def test_each_line_is_a_turn(typed: Typed):
    answers = typed.take("Hello", "", "   ", "And why?")
    assert len(answers) == 2
    dialogue = typed.chat.dialogues[0]
    assert [(question.text, answer) for question, answer in dialogue.exchanges] == [
        ("Hello", answers[0]),
        ("And why?", answers[1]),
    ]


def test_the_history_has_the_answer_as_it_is_decoded_in_the_end(typed: Typed):
    typed.take(f"/image {SQUARE}", "Hi")  # bytes: the first ones look like characters until the next ones come
    ((question, answer),) = typed.chat.dialogues[0].exchanges
    prompt = Dialogue(V1).prompt(question)
    reply = Responder(typed.chat.voices[0].responder.loaded).answer(prompt, question.pictures, V1, SHORT)
    assert typed.output.getvalue() != answer + "\n"
    assert answer == reply.text


def test_an_image_belongs_to_the_next_question(typed: Typed):
    typed.take(f"/image {LANDSCAPE}", f"/image {SQUARE}", "What are these?", "And why?")
    first, second = (question for question, _ in typed.chat.dialogues[0].exchanges)
    assert [picture.path for picture in first.pictures] == [LANDSCAPE, SQUARE]
    assert first.turn_text == "<image>\n<image>\nWhat are these?"
    assert second.pictures == ()
    typed.take("/image")
    assert f"Images: {LANDSCAPE} (asked about), {SQUARE} (asked about)." in typed.messages.getvalue()


def test_images_can_be_left_out_again(typed: Typed):
    typed.take(f"/image {LANDSCAPE}", "/drop", "Hello")
    assert typed.chat.dialogues[0].pictures() == []


def test_turns_are_taken_back_and_answered_again(typed: Typed):
    first, second = typed.take("Hello", "And why?")
    assert typed.take("/retry") == [second]
    typed.take("/undo")
    assert typed.take("And why?") == [second]
    typed.take("/clear", f"/image {LANDSCAPE}", "/clear")
    assert typed.take("Hello") == [first]
    assert typed.chat.dialogues[0].pictures() == []


def test_retrying_draws_another_answer_and_the_seed_repeats_all(loaded: LoadedModel):
    def answers() -> list[str]:
        sampling = Sampling(temperature=1.0, max_new_tokens=8)
        return Typed([single_voice(loaded, "model", None)], sampling).take("Hello", "/retry", "/retry")

    assert len(set(answers())) == 3
    assert answers() == answers()


def test_the_system_text_can_be_set(typed: Typed):
    typed.take("/system You are terse.", "/system")
    assert typed.messages.getvalue().endswith("You are terse.\n")
    prompt = typed.chat.dialogues[0].prompt(Question("Hello"))
    assert prompt == "You are terse. USER: Hello ASSISTANT:"
    with pytest.raises(UserError, match="The system text has an <image>"):
        typed.take("/system See <image>.")


def test_a_slash_may_begin_a_question(typed: Typed):
    typed.take("//usr/bin is what?")
    assert typed.chat.dialogues[0].exchanges[0][0].text == "/usr/bin is what?"
    with pytest.raises(UserError, match="There is no command /usr/bin"):
        typed.take("/usr/bin is what?")


@pytest.mark.parametrize("command", ["/retry", "/undo", "/save chat.json"])
def test_what_needs_a_question_says_so(command: str, typed: Typed):
    with pytest.raises(UserError, match="Nothing has been asked yet"):
        typed.take(command)


def test_exit_ends_and_nothing_after_it_is_read(typed: Typed):
    assert typed.take("/exit", "Hello") == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.png", "does not exist"),
        ("README.md", "is not an image"),
        ("images", "is a directory"),
    ],
)
def test_an_image_that_cannot_be_used_changes_nothing(path: str, reason: str, loaded: LoadedModel):
    typed = Typed([single_voice(loaded, "model", None)], is_interactive=True)
    answer = typed.take("Hello")
    assert typed.take("/clear", f"/image {path}", "Hello") == answer
    assert reason in typed.messages.getvalue()
    with pytest.raises(UserError, match=reason):
        Typed([single_voice(loaded, "model", None)]).take(f"/image {path}", "Hello")


def test_a_question_that_is_too_long_changes_nothing(loaded: LoadedModel):
    typed = Typed([single_voice(loaded, "model", None)], is_interactive=True)
    typed.take("Hello")
    assert typed.take("word " * 3000) == []
    assert "but the model's context is 2,048" in typed.messages.getvalue()
    assert len(typed.chat.dialogues[0].exchanges) == 1
    with pytest.raises(UserError, match=r"tokens long, but the model's context is 2,048\. Ask in fewer words"):
        Typed([single_voice(loaded, "model", None)]).take("word " * 3000)


def test_a_text_only_model_takes_no_images():
    with pytest.raises(UserError, match="the model is text-only"):
        Typed([single_voice(load_model("ckpt/base-llm"), "model", None)]).take(f"/image {LANDSCAPE}")


def test_a_saved_chat_can_be_trained_on(typed: Typed, tmp_path: Path, loaded: LoadedModel):
    typed.take("/system Be brief.", f"/image {LANDSCAPE}", "What is this?", "And why?", f"/save {tmp_path}/chat.json")
    records = json.loads((tmp_path / "chat.json").read_text())
    sample = parse_record(records[0], 0)
    assert Path(sample.images[0]).samefile(LANDSCAPE)
    assert sample.system == "Be brief."
    assert [turn.role for turn in sample.turns] == ["human", "gpt", "human", "gpt"]
    tokenized = SampleTokenizer(loaded.tokenizer, V1)(sample)
    dialogue = typed.chat.dialogues[0]
    question, _ = dialogue.exchanges.pop()
    prompt_ids = tokenize_prompt(dialogue.prompt(question), loaded.tokenizer)
    assert tokenized.input_ids[: len(prompt_ids)] == prompt_ids
    dialogue.exchanges.append((question, ""))
    with pytest.raises(UserError, match="exists"):
        typed.take(f"/save {tmp_path}/chat.json")
    typed.take(f"/save {tmp_path}/chat.txt")
    assert "User: And why?" in (tmp_path / "chat.txt").read_text()
    with pytest.raises(UserError, match="cannot be written"):
        typed.take(f"/save {tmp_path}/nowhere/chat.txt")


def test_paths_are_found_as_people_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("two words.png", "it's.png"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_typed_path("'~/two words.png'") == f"{tmp_path}/two words.png"
    assert find_typed_path("~/two words.png") == f"{tmp_path}/two words.png"
    assert find_typed_path(f"{tmp_path}/two\\ words.png") == f"{tmp_path}/two words.png"
    assert find_typed_path(f"{tmp_path}/it's.png") == f"{tmp_path}/it's.png"
    assert find_typed_path("nowhere.png") == "nowhere.png"


def test_lines_of_a_pipe():
    assert list(piped_lines(io.StringIO("one\r\ntwo \\\nthree\n\nfour"))) == ["one", "two \nthree", "", "four"]
    with pytest.raises(UserError, match="Standard input is not utf-8"):
        list(piped_lines(io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")))
