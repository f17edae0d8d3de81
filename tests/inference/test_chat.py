"""A chat: what is asked of the model, what each line does, and what is shown."""

import io
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationMixin

from llava_ft import cli
from llava_ft.conversation import TEMPLATES, TemplateStyle, get_template
from llava_ft.data.inspection.terminal import visible
from llava_ft.data.schema import parse_record
from llava_ft.data.tokenize import SampleTokenizer, tokenize_prompt
from llava_ft.errors import RunError, UserError
from llava_ft.inference.chat import Chat
from llava_ft.inference.chat_files import find_typed_path, piped_lines
from llava_ft.inference.chat_screen import ColumnScreen, PipeScreen, display_width, wrap
from llava_ft.inference.dialogue import Dialogue, Picture, Question
from llava_ft.inference.generate import Sampling, build_prompt, generate_answer
from llava_ft.inference.load import LoadedModel, load_model
from llava_ft.inference.responder import Interrupt, Responder
from llava_ft.inference.voices import Voice, base_and_trained, single_voice
from tests.conftest import RECORDINGS
from tests.inference.terminal import PaintedScreen, Typist
from tests.layouts import native
from tests.training.helpers import train

pytestmark = pytest.mark.usefixtures("in_recordings")

LANDSCAPE, SQUARE = "images/src/landscape.jpg", "images/src/square.png"
LORA = "train/lora/llava-tiny-lora"
V1 = get_template("v1")
SHORT = Sampling(max_new_tokens=8)
CHAT_TEMPLATES = [name for name, template in TEMPLATES.items() if template.style is not TemplateStyle.PLAIN]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        return load_model("ckpt/llava15-tiny")


class Typed:
    """A chat whose output is kept."""

    def __init__(self, voices: list[Voice], sampling: Sampling = SHORT, *, is_interactive: bool = False):
        self.output, self.messages = io.StringIO(), io.StringIO()
        self.chat = Chat(voices, PipeScreen(self.output, self.messages), sampling, is_interactive=is_interactive)

    def take(self, *lines: str) -> list[str]:
        """Carry out lines and return what was written by them on standard output."""
        start = len(self.output.getvalue())
        self.chat.run(iter(lines))
        return self.output.getvalue()[start:].split("\n")[:-1]

    def history(self, *lines: str) -> list[list[str]]:
        """Carry out lines and return the answers of each voice that are in its history then."""
        self.take(*lines)
        return [[answer for _, answer in dialogue.exchanges] for dialogue in self.chat.dialogues]


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


def test_the_first_turn_is_what_generate_asks(loaded: LoadedModel):
    picture = Picture.read(LANDSCAPE)
    prompt = Dialogue(V1).prompt(Question("What is it?", (picture,)))
    assert prompt == build_prompt("What is it?", 1, V1)
    reply = Responder(loaded).answer(prompt, [picture], V1, SHORT)
    assert reply.text == generate_answer(loaded, prompt, [LANDSCAPE], V1, SHORT)


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
    assert "".join(written) == reply.text == generate_answer(loaded, "Hello", [], V1, beams)
    assert kept.answer("Hello", [], V1, SHORT).ids == Responder(loaded).answer("Hello", [], V1, SHORT).ids


def test_why_an_answer_ended(loaded: LoadedModel):
    assert Responder(loaded).answer("Hello", [], V1, Sampling(max_new_tokens=3)).ending == "length"
    interrupt = Interrupt()

    def stop(_: str) -> None:
        interrupt.is_set = True

    stopped = Responder(loaded).answer("Hello", [], V1, Sampling(max_new_tokens=64), write=stop, interrupt=interrupt)
    assert stopped.ending == "interrupted"
    assert len(stopped.ids) < 64
    long_prompt = "a " * (loaded.context_len - 8)
    responder = Responder(loaded)
    num_prompt = len(tokenize_prompt(long_prompt, loaded.tokenizer))
    assert num_prompt < loaded.context_len
    full = responder.answer(long_prompt, [], V1, Sampling(max_new_tokens=512))
    assert full.num_prompt + len(full.ids) <= loaded.context_len
    assert full.ending in ("context", "finished")


def test_each_line_is_a_turn(typed: Typed):
    answers = typed.take("Hello", "", "   ", "And why?")
    assert len(answers) == 2
    dialogue = typed.chat.dialogues[0]
    assert [(question.text, answer) for question, answer in dialogue.exchanges] == [
        ("Hello", answers[0]),
        ("And why?", answers[1]),
    ]


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


# Base and adapter


def same_weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}


@pytest.fixture(scope="module")
def with_new_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a LLaVA model, trained with tokens around images that the base does not have."""
    output = tmp_path_factory.mktemp("lora") / "llava-tiny-lora-tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        train(
            output,
            model_name_or_path="ckpt/llava15-tiny",
            pretrain_mm_mlp_adapter=None,
            mm_use_im_start_end="True",
            max_steps="2",
            learning_rate="5e-2",
            mm_projector_lr="5e-2",
        )
    return output


def test_base_and_adapter_answer_as_each_alone(with_new_tokens: Path):
    loaded = load_model(str(with_new_tokens), adapter="beside")
    before = same_weights(loaded)
    base, adapter = base_and_trained(loaded, None)
    assert (base.name, adapter.name) == ("base", "adapter")
    assert (base.mm_use_im_start_end, adapter.mm_use_im_start_end) == (False, True)
    alone = [
        single_voice(load_model("ckpt/llava15-tiny"), "alone", None),
        single_voice(load_model(str(with_new_tokens), adapter="beside"), "alone", None),
    ]
    sampling = Sampling(max_new_tokens=16)
    lines = (f"/image {LANDSCAPE}", "What is this?", "And why?", "/undo", "Which colour?")
    together = Typed([base, adapter], sampling).history(*lines)
    assert together == [Typed([voice], sampling).history(*lines)[0] for voice in alone]
    assert together[0] != together[1]
    after = same_weights(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logits_of_the_base_are_its_own(with_new_tokens: Path):
    loaded = load_model(str(with_new_tokens), adapter="beside")
    base, _ = base_and_trained(loaded, None)
    ids = torch.tensor([tokenize_prompt("USER: Hello ASSISTANT:", loaded.tokenizer)])
    expected = load_model("ckpt/llava15-tiny").model(input_ids=ids).logits
    with base.speaking():
        got = loaded.model(input_ids=ids).logits[..., : expected.shape[-1]]
    assert torch.equal(got, expected)
    assert not torch.equal(loaded.model(input_ids=ids).logits[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("write", [native.dora, native.lora_im_start_end, native.lora_all_bin, native.rslora])
def test_adapters_of_every_kind_are_switched(write: native.Write, tmp_path: Path):
    checkpoint = write(tmp_path / "adapter")
    loaded = load_model(str(checkpoint.path), adapter="beside")
    base, adapter = base_and_trained(loaded, None)
    ids = torch.tensor([tokenize_prompt("USER: Hello ASSISTANT:", loaded.tokenizer)])
    alone = load_model(str(checkpoint.base)).model(input_ids=ids).logits
    added = load_model(str(checkpoint.path)).model(input_ids=ids).logits
    with base.speaking():
        assert torch.equal(loaded.model(input_ids=ids).logits[..., : alone.shape[-1]], alone)
    with adapter.speaking():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, added, rtol=0, atol=1e-4)
    assert (added[..., : alone.shape[-1]] - alone).abs().max() > 1e-2


def test_a_base_without_projector_answers_with_the_trained_one(caplog: pytest.LogCaptureFixture):
    caplog.set_level("WARNING", "llava_ft")
    base, adapter = base_and_trained(load_model(LORA, adapter="beside"), None)
    assert "has no projector of its own" in caplog.text
    answers = Typed([base, adapter]).take(f"/image {LANDSCAPE}", "What is this?")
    assert [answer.split(":")[0] for answer in answers] == ["base", "adapter"]


def test_a_projector_is_compared_with_that_of_its_base():
    loaded = load_model("train/pretrain_vt32/llava-tiny-pretrain", "ckpt/llava15-tiny")
    base, trained = base_and_trained(loaded, V1)
    assert trained.name == "projector"
    lines = (f"/image {LANDSCAPE}", "What is this?")
    base_alone = Typed([single_voice(load_model("ckpt/llava15-tiny"), "alone", V1)]).history(*lines)[0]
    trained_alone = Typed([single_voice(loaded, "alone", V1)]).history(*lines)[0]
    assert Typed([base, trained]).history(*lines) == [base_alone, trained_alone]
    assert base_alone != trained_alone


def test_settings_that_one_model_cannot_hold_twice_are_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level("WARNING", "llava_ft")
    loaded = load_model("train/pretrain_vt32/llava-tiny-pretrain", "ckpt/llava16-tiny-anyres")
    base_and_trained(loaded, V1)
    assert "image_aspect_ratio square instead of anyres, mm_patch_merge_type flat instead of spatial" in caplog.text


def test_an_interrupted_comparison_is_taken_back(loaded: LoadedModel):
    first = single_voice(loaded, "one", None)
    typed = Typed([first, single_voice(loaded, "two", None)])
    original = first.responder.answer

    def interrupted(*arguments: object, interrupt: Interrupt, **options: object):
        interrupt.is_set = True
        return original(*arguments, interrupt=interrupt, **options)

    first.responder.answer = interrupted
    typed.take("/clear", "Hello")
    assert typed.chat.dialogues[0].exchanges == typed.chat.dialogues[1].exchanges == []
    assert "Stopped. The question was taken back." in typed.messages.getvalue()


# Columns


def painted(write: Callable[[ColumnScreen], None], columns: int = 44, rows: int = 10) -> list[str]:
    output = io.StringIO()
    write(ColumnScreen(output, io.StringIO(), (columns, rows)))
    screen = PaintedScreen(columns, rows)
    screen.feed(output.getvalue())
    return screen.text()


def test_two_answers_stand_side_by_side():
    def write(screen: ColumnScreen) -> None:
        screen.begin(["base", "adapter"])
        for piece in ("It is a small", " red", " hou", "se by the sea.\nYes."):
            screen.write(0, piece)
        for piece in ("A", " house", "."):
            screen.write(1, piece)
        screen.end()

    assert painted(write) == [
        "base                 | adapter",
        "It is a small red    | A house.",
        "house by the sea.",
        "Yes.",
        "",
    ]


def test_the_right_answer_may_be_longer_than_the_left():
    def write(screen: ColumnScreen) -> None:
        screen.begin(["base", "adapter"])
        screen.write(0, "Yes.")
        screen.write(1, "one two three four five six seven eight nine")
        screen.end()
        screen.begin(["base", "adapter"])

    lines = painted(write)
    assert lines[1:4] == [
        "Yes.                 | one two three four",
        "                     | five six seven eight",
        "                     | nine",
    ]
    assert lines[4] == "base                 | adapter"


def test_rows_that_left_the_screen_stay_as_they_are():
    def write(screen: ColumnScreen) -> None:
        screen.begin(["base", "adapter"])
        screen.write(0, "\n".join(f"left {number}" for number in range(20)))
        screen.write(1, "\n".join(f"right {number}" for number in range(22)))
        screen.end()

    lines = painted(write)
    assert lines[1] == "left 0"
    assert lines[20] == "left 19              | right 19"
    assert lines[22] == "                     | right 21"


def test_lines_are_broken_between_words():
    assert wrap("a bb ccc", 4) == ["a bb", "ccc"]
    assert wrap("abcdefgh ij", 4) == ["abcd", "efgh", "ij"]
    assert wrap("  indented\n\nx", 20) == ["  indented", "", "x"]
    assert wrap("漢字かな", 4) == ["漢字", "かな"]
    assert all(display_width(line) <= 7 for line in wrap("wide 漢字 and é or e\u0301 " * 9, 7))


# The command


def run(lines: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return cli.main(["chat", "--model-path", "ckpt/llava15-tiny", "--max-new-tokens", "6", *arguments])


def test_a_pipe_gets_answers_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("What is this?\nAnd why?\n", ["--image-file", LANDSCAPE], monkeypatch) == 0
    printed = capsys.readouterr()
    loaded = load_model("ckpt/llava15-tiny")
    expected = Typed([single_voice(loaded, "model", None)], Sampling(max_new_tokens=6))
    assert printed.out.split("\n")[:-1] == expected.take(f"/image {LANDSCAPE}", "What is this?", "And why?")
    assert "cut after 6 tokens" in printed.err


def test_a_pipe_ends_at_the_first_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("Hello\n/image nowhere.png\nAnd why?\n", [], monkeypatch) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "Image 'nowhere.png' does not exist" in printed.err


def test_two_models_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run("Hello\n", ["--compare-with", "ckpt/llava15-tiny-imse"], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["ckpt/llava15-tiny", "ckpt/llava15-tiny-imse"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "--compare needs an adapter, and ckpt/llava15-tiny is a whole model"),
        (["--compare", "--compare-with", "x"], "--compare and --compare-with exclude each other"),
        (["--compare-with-base", "x"], "--compare-with-base is the base of the model that --compare-with names"),
        (["--conv-mode", "v9"], "Unknown conversation template 'v9'"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--image-file", "nowhere.png"], "Image 'nowhere.png' does not exist"),
    ],
)
def test_wrong_requests_are_refused_before_weights_are_read(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run("Hello\n", arguments, monkeypatch) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Weights:" not in printed.err


def test_somebody_types(tmp_path: Path):
    arguments = ["chat", "--model-path", "ckpt/llava15-tiny", "--max-new-tokens", "1500"]
    shutil.copy(LANDSCAPE, tmp_path / "two words.jpg")
    with Typist(arguments, RECORDINGS, NO_COLOR="1") as terminal:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for("> ")
        terminal.type("\n/image nowhere.png\n")
        terminal.wait_for("does not exist")
        terminal.type("/image README.md\n")
        terminal.wait_for("is not an image")
        terminal.type(f"/image '{tmp_path}/two words.jpg'\n")
        terminal.wait_for(f"Images: {tmp_path}/two words.jpg.")
        terminal.wait_for("> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.press_ctrl_c()
        terminal.wait_for("Ctrl-D or /exit ends.")
        terminal.type("What is this?\n")
        terminal.wait_for("What is this?\r\n")
        terminal.wait_for_more()
        terminal.press_ctrl_c()
        terminal.press_ctrl_c()
        terminal.wait_for("Stopped. ")
        terminal.wait_for("> ")
        terminal.type("/clear\n")
        terminal.wait_for("> ")
        terminal.type("/undo\n/retry\n")
        terminal.wait_for("Nothing has been asked yet")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_answers_stand_in_columns_on_a_wide_terminal():
    arguments = ["chat", "--model-path", LORA, "--compare", "--max-new-tokens", "24"]
    with Typist(arguments, RECORDINGS, NO_COLOR="1", COLUMNS="120", LINES="30") as terminal:
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n")
        written = terminal.wait_for("The answer of")
        terminal.type("/exit\n")
        assert terminal.end() == 0
    screen = PaintedScreen(120, 30)
    screen.feed(written)
    lines = screen.text()
    assert lines[0].split() == ["base", "|", "adapter"]
    pipe = Typed(base_and_trained(load_model(LORA, adapter="beside"), None), Sampling(max_new_tokens=24)).take("Hello")
    for column, answer in zip((slice(0, 58), slice(61, 120)), pipe, strict=True):
        shown = "".join(line[column] for line in lines[1:-1])
        assert shown.replace(" ", "") == visible(answer.split(": ", 1)[1]).replace(" ", "")
