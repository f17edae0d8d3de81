"""Conversation templates: how turns become one text, and which parts of it the model has to produce.

A template is an immutable value that is passed around; nothing selects one globally. The texts are those of
LLaVA (`llava/conversation.py`), blank for blank, because the published checkpoints were trained with them.
Each template belongs to one of five styles (`TemplateStyle`), after the separator styles of LLaVA.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from llava_ft.constants import IMAGE_TOKEN
from llava_ft.errors import UserError

ChatTurn = tuple[str, str]
"""Role ("human" or "gpt") and text."""


class TemplateStyle(Enum):
    """How turns are joined, for roles H (human) and A (assistant)."""

    BLOCKS = "blocks"
    """Training: `system` and lines `### H: question` and `### A: answer`, ended by `### `;
    inference: `system###H: question###A:`.
    """
    PAIRS = "pairs"
    """`system H: question A: answer</s>`."""
    INST = "inst"
    """`[INST] <<SYS>>system<</SYS>> question [/INST] answer </s>`."""
    CHATML = "chatml"
    """`system<|im_end|>Hquestion<|im_end|>Aanswer<|im_end|>`, the roles carry their own markup."""
    PLAIN = "plain"
    """Image placeholders followed by the caption: for projector pretraining."""


class TurnsError(UserError):
    """The turns do not fit the template.

    Attributes:
        kind: Short, stable name of what is wrong.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the prompt."""

    text: str  # its text
    is_target: bool  # whether the model is trained to produce it
    turn: int | None = None  # position of the turn it is written for; None where it belongs to no turn, or to several


@dataclass(frozen=True, slots=True)
class Template:
    """One conversation format."""

    name: str  # the name it is asked for by
    style: TemplateStyle  # how turns are joined
    system: str  # text before the first turn, without markup; "" for none
    human: str  # the name (or markup) of the human role
    assistant: str  # the name (or markup) of the assistant role
    stop: str  # what ends an answer
    turn_start: str = ""  # INST only: what precedes each `[INST]` after the first
    wraps_images: bool = False  # whether each image placeholder is written `<Image><image></Image>`

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What ends a generated answer; to be cut off the decoded text."""
        return (self.stop,)

    @property
    def keeps_leading_answer(self) -> bool:
        """Whether an assistant's turn before the first question stays in the text (as in LLaVA)."""
        return self.style in (TemplateStyle.BLOCKS, TemplateStyle.PLAIN)

    def render(self, turns: Sequence[ChatTurn], *, system: str | None = None) -> list[Segment]:
        """Write a finished conversation as training text.

        Args:
            turns: Alternating turns. One assistant's turn may precede the first human one; it is left out
                unless `keeps_leading_answer`.
            system: Replaces the template's system text. Templates without any (`plain`) ignore it.

        Returns:
            Segments whose texts, joined, are the prompt. Target segments are what the model is trained to
            produce, the marker that ends an answer included. An empty answer has no target, except in BLOCKS and
            PLAIN.

        Raises:
            TurnsError: The turns do not fit the template, or two turns of one role follow each other.
        """
        return join_segments(self.render_turns(turns, system=system))

    def render_turns(self, turns: Sequence[ChatTurn], *, system: str | None = None) -> list[Segment]:
        """Write a finished conversation as training text, each turn in segments of its own.

        The same as `render`, but for neighbours of one kind, which are not joined. A turn has one target segment at
        most; in BLOCKS the last turn has a second one, for what ends the conversation.

        Raises:
            TurnsError: As in `render`.
        """
        checked = self._checked(turns)
        system = self.system if system is None else system
        if self.style is TemplateStyle.BLOCKS:
            segments = self._render_blocks(checked, system)
        elif self.style is TemplateStyle.PLAIN:
            segments = self._render_plain(checked)
        else:
            segments = self._render_chat(checked, system)
        num_left_out = len(turns) - len(checked)
        return [
            Segment(segment.text, segment.is_target, None if segment.turn is None else segment.turn + num_left_out)
            for segment in segments
        ]

    def prompt(self, turns: Sequence[ChatTurn], *, system: str | None = None) -> str:
        """Write the text to be continued by the model at inference.

        Args:
            turns: Alternating turns. If the last one is the human's, an open assistant's turn is added; an
                assistant's last turn with empty text is left open as well.
            system: Replaces the template's system text.

        Raises:
            TurnsError: The turns do not fit the template.
        """
        turns = self._checked(turns)
        if turns and turns[-1][0] == "human":
            turns = [*turns, ("gpt", "")]
        system = self.system if system is None else system
        if self.style is TemplateStyle.BLOCKS:
            parts = [system, self.stop]
            for role, text in turns:
                parts.append(f"{self._name_of(role)}: {text}{self.stop}" if text else f"{self._name_of(role)}:")
            return "".join(parts)
        if self.style is TemplateStyle.PLAIN:
            return "".join(text + self.stop for _, text in turns if text)
        return "".join(segment.text for segment in self._render_chat(turns, system))

    def _checked(self, turns: Sequence[ChatTurn]) -> list[ChatTurn]:
        """Check that the roles alternate; leave out a leading answer unless the template keeps it."""
        previous = None
        for role, _ in turns:
            if role not in ("human", "gpt"):
                raise TurnsError("unknown-role", f"role {role!r} is neither 'human' nor 'gpt'.")
            if role == previous:
                raise TurnsError("roles-not-alternating", f"two turns of role {role!r} follow each other.")
            previous = role
        if turns and turns[0][0] == "gpt" and not self.keeps_leading_answer:
            turns = turns[1:]
        return list(turns)

    def _name_of(self, role: str) -> str:
        return self.human if role == "human" else self.assistant

    def _render_blocks(self, turns: Iterable[ChatTurn], system: str) -> list[Segment]:
        """Write `###` blocks. LLaVA supervises an assistant's block whole, its heading included."""
        segments = [Segment(f"{system}\n\n", False)]
        for position, (role, text) in enumerate(turns):
            segments.append(Segment(f"{self.stop} {self._name_of(role)}: {text}\n", role == "gpt", position))
        last = segments[-1]
        segments.append(Segment(f"{self.stop} ", last.is_target, last.turn))
        return segments

    def _render_plain(self, turns: Sequence[ChatTurn]) -> list[Segment]:
        """Write the placeholders of the question, and the answer as the caption."""
        num_images = turns[0][1].count(IMAGE_TOKEN) if turns else 0
        if [role for role, _ in turns] != ["human", "gpt"] or num_images == 0:
            raise TurnsError(
                "plain-format",
                f"template {self.name!r} takes exactly one question with {IMAGE_TOKEN} in it and one answer, "
                f"not {len(turns)} turn(s) with {num_images} placeholder(s) in the first. Leave the record "
                "out or choose another template with --version.",
            )
        return [Segment(IMAGE_TOKEN * num_images, False, 0), Segment(turns[1][1] + self.stop, True, 1)]

    def _render_chat(self, turns: Iterable[ChatTurn], system: str) -> list[Segment]:
        """Write PAIRS, INST or CHATML text; turns without text keep only their heading."""
        if self.style is TemplateStyle.INST:
            return self._render_inst(turns, system)
        if self.style is TemplateStyle.PAIRS:
            segments = [Segment(f"{system} ", False)]
            colon, gap, question_end = ":", " ", " "
        else:
            segments = [Segment(f"<|im_start|>system\n{system}{self.stop}", False)]
            colon, gap, question_end = "", "", self.stop
        for position, (role, text) in enumerate(turns):
            segments.append(Segment(self._name_of(role) + colon, False, position))
            if text:
                end = self.stop if role == "gpt" else question_end
                segments.append(Segment(gap + text + end, role == "gpt", position))
        return segments

    def _render_inst(self, turns: Iterable[ChatTurn], system: str) -> list[Segment]:
        """Write `[INST] ... [/INST] answer </s>`; the system text stands inside the first question."""
        segments: list[Segment] = []
        for position, (role, text) in enumerate(turns):
            if role == "gpt":
                segments.append(Segment(f" {text} {self.stop}" if text else "", bool(text), position))
                continue
            if position == 0:
                if not text:
                    raise TurnsError("empty-first-question", f"template {self.name!r} needs a first question.")
                text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}" if system else text
            start = self.turn_start if position else ""
            segments.append(Segment(f"{start}[INST] {text} [/INST]" if text else "", False, position))
        return segments


def join_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Join adjacent segments of one kind, whatever their turns, and drop empty ones."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].is_target == segment.is_target:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.is_target)
        elif segment.text:
            merged.append(Segment(segment.text, segment.is_target))
    return merged


_HUMAN_SYSTEM: Final = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER_SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_MMTAG_SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM: Final = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM: Final = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM: Final = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_CHATML_ROLES: Final = ("<|im_start|>user\n", "<|im_start|>assistant\n")

_TEMPLATES: Final = (
    Template("v0", TemplateStyle.BLOCKS, _HUMAN_SYSTEM, "Human", "Assistant", "###"),
    Template("v1", TemplateStyle.PAIRS, _USER_SYSTEM, "USER", "ASSISTANT", "</s>"),
    Template("llama_2", TemplateStyle.INST, _LLAMA_2_SYSTEM, "USER", "ASSISTANT", "</s>", turn_start="<s>"),
    Template(
        "llava_llama_2",
        TemplateStyle.INST,
        _LLAVA_LLAMA_2_SYSTEM,
        "USER",
        "ASSISTANT",
        "</s>",
        turn_start="<s>",
    ),
    Template("mistral_instruct", TemplateStyle.INST, "", "USER", "ASSISTANT", "</s>"),
    Template("chatml_direct", TemplateStyle.CHATML, "Answer the questions.", *_CHATML_ROLES, "<|im_end|>"),
    Template("mpt", TemplateStyle.CHATML, _MPT_SYSTEM, *_CHATML_ROLES, "<|im_end|>"),
    Template("plain", TemplateStyle.PLAIN, "", "", "", "\n"),
    Template("llava_v0", TemplateStyle.BLOCKS, _HUMAN_SYSTEM, "Human", "Assistant", "###"),
    Template("llava_v1", TemplateStyle.PAIRS, _HUMAN_SYSTEM, "USER", "ASSISTANT", "</s>"),
    Template("v0_mmtag", TemplateStyle.BLOCKS, _MMTAG_SYSTEM, "Human", "Assistant", "###", wraps_images=True),
    Template("v1_mmtag", TemplateStyle.PAIRS, _MMTAG_SYSTEM, "USER", "ASSISTANT", "</s>", wraps_images=True),
)

TEMPLATE_ALIASES: Final = MappingProxyType(
    {"default": "v0", "vicuna_v1": "v1", "mistral_direct": "chatml_direct", "v0_plain": "plain"}
)
"""Second names; the key selects the template named by the value."""

TEMPLATES: Final = MappingProxyType({template.name: template for template in _TEMPLATES})
"""Every template by its own name."""


def template_names() -> list[str]:
    """List every name `get_template` takes, aliases included, in alphabetical order."""
    return sorted([*TEMPLATES, *TEMPLATE_ALIASES])


def get_template(name: str) -> Template:
    """Look up a template by its whole name or alias.

    Raises:
        UserError: No template has this name.
    """
    template = TEMPLATES.get(TEMPLATE_ALIASES.get(name, name))
    if template is None:
        known = template_names()
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(
            f"Unknown conversation template {name!r} (--version).{hint} Known templates: {', '.join(known)}."
        )
    return template
