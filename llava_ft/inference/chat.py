"""`llava-ft chat`, a conversation in the terminal: questions, images and commands in, answers out.

The loop reads a line at a time. Standard output gets answers only, so it can be piped; everything else goes to standard
error. Where nobody types the questions, the first that cannot be answered ends the chat with an error.
"""

import argparse
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TextIO

import transformers

from llava_ft.checkpoint.directory import identify, resolve_model_path
from llava_ft.constants import IMAGE_TOKEN
from llava_ft.conversation import get_template
from llava_ft.errors import RunError, UserError
from llava_ft.inference.console import Screen, find_typed_path, piped_lines, typed_lines
from llava_ft.inference.dialogue import Dialogue, Picture, Question, save_conversation
from llava_ft.inference.load import load_by_flags
from llava_ft.inference.responder import Sampling, prompt_entries
from llava_ft.inference.voices import Voice, base_and_trained, single_voice

_HELP: Final = """\
/image PATH    give an image with the next question; several times for several; alone: list them
/drop          leave the images out that were given for the next question
/retry         answer the last question again
/undo          take back the last question and its answer
/clear         begin anew: forget questions, answers and images; the system text is kept
/system TEXT   set the system text; alone: show it
/save FILE     write the conversation: .json as a record that can be trained on, anything else as text
/help          this list
/exit          end; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one. A question that begins with a slash is
written with two."""


@dataclass
class Chat:
    """The state of a chat, and what each line does to it."""

    voices: Sequence[Voice]  # who answers, one after the other
    screen: Screen
    sampling: Sampling
    seed: int = 0  # of the first answer; each further one takes the next
    is_interactive: bool = False  # whether somebody types the questions; then errors are shown and the chat goes on
    pending: list[Picture] = field(default_factory=list[Picture])  # images for the next question
    dialogues: list[Dialogue] = field(init=False)  # the history of each voice
    num_answers: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.dialogues = [Dialogue(voice.template, voice.mm_use_im_start_end) for voice in self.voices]

    def run(self, lines: Iterator[str]) -> None:
        """Take lines until they end or one of them is `/exit`.

        Raises:
            UserError: A line cannot be carried out and nobody is there to read why.
            RunError: An answer failed, likewise.
        """
        # Ctrl-C ends an answer, see `_ask`; a second one, behind that, must not end the chat. Lines have it as a key.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if self.is_interactive else None
        try:
            for line in lines:
                try:
                    if not self.take(line):
                        return
                except (UserError, RunError) as error:
                    if not self.is_interactive:
                        raise
                    self.screen.notice(str(error))
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def take(self, line: str) -> bool:
        """Carry out one line; returns whether the chat goes on.

        Raises:
            UserError: It cannot be carried out; nothing has changed.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._ask(Question(line.removeprefix("/"), tuple(self.pending)))
            return True
        name, _, argument = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/drop": lambda _: self.pending.clear(),
            "/retry": self._retry,
            "/undo": self._undo,
            "/clear": self._clear,
            "/system": self._system,
            "/save": self._save,
            "/help": lambda _: self.screen.notice(_HELP),
        }
        if name not in actions:
            raise UserError(
                f"There is no command {name}. Commands are {', '.join([*actions, '/exit'])}. To ask something that "
                "begins with a slash, write two."
            )
        actions[name](argument.strip())
        return True

    def _image(self, path: str) -> None:
        if path:
            if any(voice.responder.loaded.image_transform is None for voice in self.voices):
                raise UserError("Images cannot be given: the model is text-only. Load a LLaVA model to ask about them.")
            self.pending.append(Picture.read(find_typed_path(path)))
        if self.is_interactive or not path:
            earlier = self.dialogues[0].pictures()
            shown = [*(f"{picture.path} (asked about)" for picture in earlier), *(p.path for p in self.pending)]
            self.screen.notice(f"Images: {', '.join(shown) or 'none'}.")

    def _undo(self, _: str) -> None:
        self._last_question()
        for dialogue in self.dialogues:
            dialogue.exchanges.pop()

    def _clear(self, _: str) -> None:
        for dialogue in self.dialogues:
            dialogue.exchanges.clear()
        self.pending.clear()

    def _system(self, text: str) -> None:
        if IMAGE_TOKEN in text:
            raise UserError(f"The system text has an {IMAGE_TOKEN}. Images belong to questions: /image PATH.")
        for dialogue in self.dialogues:
            dialogue.system = text or dialogue.system
        if not text:
            first = self.dialogues[0]
            self.screen.notice(first.template.system if first.system is None else first.system)

    def _save(self, path: str) -> None:
        self._last_question()
        if not path:
            raise UserError("/save needs the name of a file, such as /save chat.json.")
        target = Path(path).expanduser()
        save_conversation(target, [voice.name for voice in self.voices], self.dialogues)
        self.screen.notice(f"Written to {target}.")

    def _retry(self, _: str) -> None:
        question = self._last_question()
        if self.sampling.temperature == 0:
            self.screen.notice("With --temperature 0 the answer to the same question is the same.")
        before = [[*dialogue.exchanges] for dialogue in self.dialogues]
        self._undo("")
        is_answered = False
        try:
            is_answered = self._ask(question)
        finally:
            if not is_answered:
                for dialogue, exchanges in zip(self.dialogues, before, strict=True):
                    dialogue.exchanges = exchanges

    def _last_question(self) -> Question:
        if not self.dialogues[0].exchanges:
            raise UserError("Nothing has been asked yet. Type a question first.")
        return self.dialogues[0].exchanges[-1][0]

    def _ask(self, question: Question) -> bool:
        """Have every voice answer; returns whether all of them did. One that Ctrl-C stops has said what it wrote.

        Raises:
            UserError: One of them cannot read the conversation with this question; nobody has answered then.
        """
        prompts = [dialogue.prompt(question) for dialogue in self.dialogues]
        pictures = self.dialogues[0].pictures(question)
        for voice, prompt in zip(self.voices, prompts, strict=True):  # what one cannot read, nobody answers
            prompt_entries(voice.responder.loaded, prompt, pictures)
        written = [""] * len(self.voices)
        notices: list[str] = []
        was_stopped = False
        with self.screen.answers([voice.name for voice in self.voices]) as show:

            def write(number: int, text: str) -> None:
                written[number] += text
                show(number, text)

            try:
                if self.is_interactive:
                    signal.signal(signal.SIGINT, _interrupt_once)
                for number, (voice, prompt) in enumerate(zip(self.voices, prompts, strict=True)):
                    transformers.set_seed(self.seed + self.num_answers)
                    with voice.speaking():
                        reply = voice.responder.answer(
                            prompt, pictures, voice.template, self.sampling, write=partial(write, number)
                        )
                    # What was written may differ: bytes that are no character in the end may have looked like one.
                    written[number] = reply.text
                    whose = f"The answer of {voice.name}" if len(self.voices) > 1 else "The answer"
                    if reply.ending == "length":
                        notices.append(f"{whose} was cut after {len(reply.ids)} tokens (--max-new-tokens).")
                    elif reply.ending == "context":
                        notices.append(f"{whose} was cut: the context is full. Begin anew with /clear, or /undo.")
                    elif not reply.text:
                        notices.append(f"{whose} is empty.")
                if self.is_interactive:  # here, so that Ctrl-C at the very end is caught below
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                was_stopped = True
            finally:
                if self.is_interactive:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.num_answers += 1
        if was_stopped and not all(written):
            self.screen.notice("Stopped. The question was taken back.")
            return False
        for dialogue, answer in zip(self.dialogues, written, strict=True):
            dialogue.exchanges.append((question, answer))
        self.pending = [picture for picture in self.pending if picture not in question.pictures]
        for text in [*notices, *(["Stopped. What was written stays in the conversation."] if was_stopped else [])]:
            self.screen.notice(text)
        return True


def _interrupt_once(_signal: int, _frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_chat(options: argparse.Namespace, stdin: TextIO, output: TextIO, messages: TextIO) -> None:
    """Hold the conversation that a command line asks for; `output` gets answers alone, `messages` all the rest.

    Raises:
        UserError: The request is wrong, or a line of a pipe cannot be carried out.
    """
    sampling = Sampling.from_flags(options)
    template = get_template(options.conv_mode) if options.conv_mode else None
    if options.compare and options.compare_with:
        raise UserError(
            "--compare and --compare-with exclude each other: the first compares an adapter with its base, the second "
            "two models. Give one of them."
        )
    if options.compare_with_base and not options.compare_with:
        raise UserError("--compare-with-base is the base of the model that --compare-with names. Give that too.")
    if options.compare and identify(resolve_model_path(options.model_path)).kind not in ("lora", "projector"):
        raise UserError(
            f"--compare needs an adapter, and {options.model_path} is a whole model. Give the other model with "
            "--compare-with."
        )
    pictures = [Picture.read(path) for path in options.image_file]

    transformers.logging.set_verbosity_error()  # its advice on generation flags is of no use to somebody who chats
    if options.compare:
        beside = load_by_flags(options, options.model_path, options.model_base, adapter="beside")
        voices = base_and_trained(beside, template)
    else:
        first = load_by_flags(options, options.model_path, options.model_base)
        voices = [single_voice(first, options.model_path, template)]
        if options.compare_with:
            second = load_by_flags(options, options.compare_with, options.compare_with_base)
            voices.append(single_voice(second, options.compare_with, template))
    if pictures and any(voice.responder.loaded.image_transform is None for voice in voices):
        raise UserError("--image-file is given, but the model is text-only. Load a LLaVA model to ask about images.")

    is_interactive = stdin.isatty()
    screen = Screen(output, messages, is_interactive=is_interactive)
    chat = Chat(voices, screen, sampling, seed=options.seed, is_interactive=is_interactive, pending=pictures)
    if is_interactive:
        names = " and ".join(voice.name for voice in voices)
        screen.notice(f"{names}, template {voices[0].template.name}. /help lists the commands, Ctrl-D ends.")
    chat.run(typed_lines(stdin, output, messages) if is_interactive else piped_lines(stdin))
