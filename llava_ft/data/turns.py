"""The turns of a record, in the two forms in which conversations are published.

LLaVA writes `{"from": "human", "value": "..."}` under `conversations`, OpenAI and Hugging Face write
`{"role": "user", "content": "..."}` under `messages`. The forms differ in names, and in that a `content` may be a list
of parts; what makes a conversation usable is the same for both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from llava_ft.data.record_checks import RecordChecks, is_list, is_mapping, kind_of, shown
from llava_ft.data.sample import Turn

Speaker = Literal["human", "gpt", "system"]
TextOf = Callable[[object, Speaker, str], str]
"""Makes the text of a turn from what is written: the value, who speaks, and where it stands, for messages."""

_TOOL_ROLES: Final = frozenset(
    ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation", "ipython")
)
_TOOL_KEYS: Final = ("tool_calls", "function_call")
_SPEAKERS: Final[Mapping[str, Speaker]] = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""What other programs call the speakers; only used for hints."""


@dataclass(frozen=True, slots=True)
class Form:
    """The names that one way of writing conversations uses.

    Attributes:
        turns: Key of the list of turns.
        role: Key of the speaker, in a turn.
        text: Key of what is said, in a turn.
        names: Name of each speaker.
    """

    turns: str
    role: str
    text: str
    names: Mapping[Speaker, str]


LLAVA: Final = Form("conversations", "from", "value", {"human": "human", "gpt": "gpt", "system": "system"})
OPENAI: Final = Form("messages", "role", "content", {"human": "user", "gpt": "assistant", "system": "system"})


@dataclass(frozen=True, slots=True)
class TurnParser:
    """Checks the turns of one record."""

    form: Form
    checks: RecordChecks
    text_of: TextOf

    def parse(self, value: object) -> tuple[tuple[Turn, ...], str | None]:
        """Check a list of turns; give them without a leading system turn, and the text of that.

        Raises:
            BadSampleError: Kinds: "bad-conversations", "empty-conversation", "bad-turn", "unknown-role", "tool-turn",
                "roles-not-alternating", "misplaced-system", "no-human-turn", "bad-text", "bad-weight" and those of
                `text_of`.
        """
        name = self.form.turns
        if not is_list(value):
            self.checks.fail("bad-conversations", f"'{name}' is {kind_of(value)}, not a list of turns.")
        if not value:
            self.checks.fail("empty-conversation", f"'{name}' is an empty list. It needs at least one question.")
        turns: list[Turn] = []
        system: str | None = None
        for position, item in enumerate(value):
            speaker, text, weight = self._parse_turn(item, f"turn {position}")
            if speaker == "system":
                if position:
                    self.checks.fail("misplaced-system", f"turn {position} is a 'system' turn; only the first may be.")
                system = text
                continue
            if turns and turns[-1].role == speaker:
                self.checks.fail(
                    "roles-not-alternating",
                    f"turns {position - 1} and {position} are both from {self.form.names[speaker]!r}. Questions and "
                    "answers have to alternate; join the two or leave one out.",
                )
            turns.append(Turn(speaker, text, weight))
        if not any(turn.role == "human" for turn in turns):
            human = self.form.names["human"]
            self.checks.fail("no-human-turn", f"no turn is from {human!r}. A conversation needs a question.")
        return tuple(turns), system

    def _parse_turn(self, item: object, where: str) -> tuple[Speaker, str, Literal[0, 1]]:
        form = self.form
        if not is_mapping(item):
            self.checks.fail(
                "bad-turn", f"{where} is {kind_of(item)}, not an object with {form.role!r} and {form.text!r}."
            )
        for key in (form.role, form.text):
            if key not in item:
                other = LLAVA if form is OPENAI else OPENAI
                hint = f" Turns with {other.role!r} belong into {other.turns!r}." if other.role in item else ""
                self.checks.fail(
                    "bad-turn",
                    f"{where} has no {key!r}. Each turn needs {form.role!r} and {form.text!r}.{hint}",
                )
        speaker = self._parse_speaker(item[form.role], where)
        if any(item.get(key) for key in _TOOL_KEYS):
            self._refuse_tools(f"{where} calls a tool")
        return speaker, self.text_of(item[form.text], speaker, where), self._parse_weight(item, speaker, where)

    def _parse_speaker(self, role: object, where: str) -> Speaker:
        names = self.form.names
        for speaker, name in names.items():
            if role == name:
                return speaker
        if isinstance(role, str) and role in _TOOL_ROLES:
            self._refuse_tools(f"{where} is from {role!r}")
        known = ", ".join(repr(name) for name in names.values())
        meant = _SPEAKERS.get(role.strip().lower()) if isinstance(role, str) else None
        hint = f" Write {names[meant]!r}." if meant else ""
        told = shown(role) if isinstance(role, str) else kind_of(role)
        self.checks.fail("unknown-role", f"{where} is from {told}; allowed are {known}.{hint}")

    def _refuse_tools(self, what: str) -> NoReturn:
        self.checks.fail(
            "tool-turn", f"{what}. No template writes calls of tools; take such turns or the whole record out."
        )

    def _parse_weight(self, item: Mapping[str, object], speaker: Speaker, where: str) -> Literal[0, 1]:
        value = item.get("weight")
        if value is None:
            return 1
        if speaker != "gpt":
            answer = self.form.names["gpt"]
            self.checks.fail(
                "bad-weight",
                f"{where} has a 'weight', but is not an answer. Only turns from {answer!r} may have one; leave it out.",
            )
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            self.checks.fail(
                "bad-weight",
                f"the 'weight' of {where} is {kind_of(value)}. Allowed are 1 (learnt) and 0 (only read).",
            )
        return 1 if value else 0
