"""From a sample to `input_ids` and `labels`.

The whole prompt is tokenised once, split at image placeholders only, as LLaVA does at inference. A token is
supervised when any of its characters belongs to a segment that is to be learnt. LLaVA finds these by
tokenising each turn again and adding up lengths, and masks a whole sample where the sums disagree; characters
cannot disagree (`docs/reference/differences.md` lists what follows from that). Which segments are learnt is a choice
(`Supervise`, `docs/reference/masks.md`); by default what the template says the assistant produces.

An image is one `IMAGE_TOKEN_INDEX` here. `preparation/samples.py` makes it as many as the image has tokens.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from llava_ft.constants import IGNORE_INDEX, IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.conversation import Segment, Template, TurnsError, join_segments
from llava_ft.data.records import Sample, Turn
from llava_ft.errors import BadSampleError, UserError

_SKIP_HINT: Final = "Fix the record or pass --on_bad_sample skip."

Spans = list[tuple[int, int]]
"""First and past-the-end character, or token."""

Supervise = Literal["answers", "last_answer", "all"]
"""What is learnt: what the assistant says, only its last turn with text, or the prompt too."""

SUPERVISE_CHOICES: Final = ("answers", "last_answer", "all")


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A tokenised conversation before images are expanded and anything is cut off.

    `answer_ends` are, for each assistant's turn that has text, in order and supervised or not, the number of tokens up
    to and with its end marker: where the conversation may be cut off. In the `###` templates an answer ends with its
    block, the last one with the conversation.
    """

    index: int  # position of the record in its source
    id: str  # the record's own, "" when it has none
    images: Sequence[str]  # as the record names them
    input_ids: list[int]  # of the vocabulary, and one `IMAGE_TOKEN_INDEX` per image
    target_spans: Spans  # start and end of each supervised stretch of `input_ids`, ascending
    answer_ends: list[int]

    @property
    def labels(self) -> list[int]:
        """The ids that are supervised, and `IGNORE_INDEX` in all other places."""
        labels = [IGNORE_INDEX] * len(self.input_ids)
        for start, end in self.target_spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def image_positions(self) -> list[int]:
        """Where the images are in `input_ids`."""
        return np.flatnonzero(np.asarray(self.input_ids) == IMAGE_TOKEN_INDEX).tolist()


def place_images(text: str, *, wraps_images: bool = False, mm_use_im_start_end: bool = False) -> str:
    """Bring the image placeholders of a human turn into the form of LLaVA's training text.

    A single placeholder moves to the front, on a line of its own, and the turn loses the white space around
    it. Differs from LLaVA: several placeholders stay where they are (LLaVA joins them into one).
    `wraps_images` writes `<Image><image></Image>`, `mm_use_im_start_end` puts `<im_start>` and `<im_end>` around each.
    """
    num_images = text.count(IMAGE_TOKEN)
    if num_images == 0:
        return text
    text = text.strip()
    if num_images == 1:
        rest = text.replace(IMAGE_TOKEN, "").strip()
        text = f"{IMAGE_TOKEN}\n{rest}" if rest else IMAGE_TOKEN
    if wraps_images:
        text = text.replace(IMAGE_TOKEN, f"<Image>{IMAGE_TOKEN}</Image>")
    if mm_use_im_start_end:
        text = text.replace(IMAGE_TOKEN, f"{IM_START_TOKEN}{IMAGE_TOKEN}{IM_END_TOKEN}")
    return text


class SampleTokenizer:
    """Turns samples into ids and labels with one tokenizer (from `load_tokenizer`) and one template.

    Args:
        mm_use_im_start_end: Whether `<im_start>` and `<im_end>` go around each image.
        supervise: "answers": what the assistant says; "last_answer": its last turn that has text; "all": every token of
            the text, the prompt's too, but for the begin token. An assistant's turn of weight 0 is never supervised.

    Raises:
        UserError: `mm_use_im_start_end` without these entries in the vocabulary, or `supervise` is unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        *,
        mm_use_im_start_end: bool = False,
        supervise: Supervise = "answers",
    ):
        if supervise not in SUPERVISE_CHOICES:
            raise UserError(f"supervise is {supervise!r}; it can be {', '.join(SUPERVISE_CHOICES)}.")
        if mm_use_im_start_end:
            vocab = tokenizer.get_added_vocab()
            missing = [token for token in (IM_START_TOKEN, IM_END_TOKEN) if token not in vocab]
            if missing:
                raise UserError(
                    f"mm_use_im_start_end needs {missing[0]} in the tokenizer's vocabulary, and it is not "
                    "there. Add it first (add_image_tokens) or turn the flag off."
                )
        self.tokenizer = tokenizer
        self.template = template
        self.mm_use_im_start_end = mm_use_im_start_end
        self.supervise: Final = supervise
        self._encoder = _PieceEncoder(tokenizer)

    def segments(self, sample: Sample) -> list[Segment]:
        """Write a sample as training text, placeholders in place; target segments are what is supervised."""
        return join_segments(self._supervised(self._turn_segments(sample), sample))

    def __call__(self, sample: Sample) -> TokenizedSample:
        """Tokenise one sample.

        Raises:
            BadSampleError: Kinds: "placeholder-mismatch", "image-in-answer", "image-in-system", "no-supervised-token"
                and those of `TurnsError`.
        """
        segments = self._turn_segments(sample)
        input_ids, spans = self._encoder.encode("".join(segment.text for segment in segments))
        targets: Spans = []
        end = 0
        for segment in join_segments(self._supervised(segments, sample)):
            start, end = end, end + len(segment.text)
            if segment.is_target:
                targets.append((start, end))
        target_spans = _target_tokens(input_ids, spans, targets)
        if not target_spans:
            reason = f"{self._why_unsupervised(sample)}, so there is nothing to learn. {_SKIP_HINT}"
            raise BadSampleError(sample.index, sample.id, "no-supervised-token", reason)
        # Behind the last character of each turn of the assistant that has text and is in the prompt.
        ends: dict[int, int] = {}
        end = 0
        for segment in segments:
            end += len(segment.text)
            if segment.is_target and segment.turn is not None and _has_answer(sample.turns[segment.turn]):
                ends[segment.turn] = end
        starts = [first for first, _ in spans]
        answer_ends = [bisect_left(starts, end) for end in ends.values()]
        return TokenizedSample(sample.index, sample.id, sample.images, input_ids, target_spans, answer_ends)

    def _turn_segments(self, sample: Sample) -> list[Segment]:
        def bad(kind: str, reason: str) -> BadSampleError:
            return BadSampleError(sample.index, sample.id, kind, reason)

        only = "Images are only allowed in turns from 'human'."
        for position, turn in enumerate(sample.turns):
            if turn.role == "gpt" and IMAGE_TOKEN in turn.text:
                reason = f"{IMAGE_TOKEN} stands in an assistant's turn (turn {position}). {only} {_SKIP_HINT}"
                raise bad("image-in-answer", reason)
        if sample.system is not None and IMAGE_TOKEN in sample.system:
            raise bad("image-in-system", f"{IMAGE_TOKEN} stands in the system turn. {only}")
        num_placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in sample.turns)
        if num_placeholders != len(sample.images):
            reason = f"{num_placeholders} {IMAGE_TOKEN} placeholder(s) but {len(sample.images)} image path(s). "
            raise bad("placeholder-mismatch", f"{reason}Each placeholder needs one image. {_SKIP_HINT}")
        place = partial(
            place_images, wraps_images=self.template.wraps_images, mm_use_im_start_end=self.mm_use_im_start_end
        )
        turns = [(turn.role, turn.text if turn.role == "gpt" else place(turn.text)) for turn in sample.turns]
        try:
            return self.template.render_turns(turns, system=sample.system)
        except TurnsError as error:
            raise bad(error.kind, str(error)) from None

    def _supervised(self, segments: Sequence[Segment], sample: Sample) -> list[Segment]:
        """Make targets of the segments that are to be learnt, instead of all that the assistant produces."""
        last = max((position for position, turn in enumerate(sample.turns) if _has_answer(turn)), default=None)

        def is_supervised(segment: Segment) -> bool:
            if not segment.is_target:
                return self.supervise == "all"
            assert segment.turn is not None
            if self.supervise == "last_answer" and segment.turn != last:
                return False
            return sample.turns[segment.turn].weight == 1

        return [Segment(segment.text, is_supervised(segment), segment.turn) for segment in segments]

    def _why_unsupervised(self, sample: Sample) -> str:
        answers = [turn for turn in sample.turns if _has_answer(turn)]
        if not answers:
            return "the assistant says nothing"
        if self.supervise == "last_answer" and any(turn.weight for turn in answers):
            return "its last answer has weight 0"
        if any(turn.weight for turn in answers):
            return f"template {self.template.name!r} leaves its answers out"
        return "all its answers have weight 0"


def tokenize_prompt(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokenise a prompt for inference: begin token if the tokenizer sets one, an `IMAGE_TOKEN_INDEX` per `<image>`."""
    return _PieceEncoder(tokenizer).encode(text)[0]


class _PieceEncoder:
    """Tokenises text around placeholders, and says which characters each token stands for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        # Every piece of text is tokenised alone; only the first keeps the begin token.
        empty = cast("list[int]", tokenizer("")["input_ids"])
        self._begin = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []

    def encode(self, text: str) -> tuple[list[int], Spans]:
        """Tokenise a text; return ids and spans of one length. The begin token stands before the first character."""
        pieces = text.split(IMAGE_TOKEN)
        encoded = self._tokenizer(
            pieces,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        input_ids = list(self._begin)
        spans: Spans = [(-1, -1)] * len(input_ids)
        start = 0
        for position, piece in enumerate(pieces):
            if position:
                input_ids.append(IMAGE_TOKEN_INDEX)
                spans.append((start - len(IMAGE_TOKEN), start))
            input_ids += cast("list[int]", encoded["input_ids"][position])
            offsets = cast("Spans", encoded["offset_mapping"][position])
            spans += [(first + start, last + start) for first, last in offsets]
            start += len(piece) + len(IMAGE_TOKEN)
        return input_ids, spans


def _has_answer(turn: Turn) -> bool:
    return turn.role == "gpt" and bool(turn.text)


def _target_tokens(input_ids: Sequence[int], spans: Spans, targets: Spans) -> Spans:
    """Find the stretches of tokens whose characters touch a target span; all lists are in reading order.

    A token without characters of its own (a blank that the tokenizer puts in front) counts with the character
    it stands before. Images and the begin token are never supervised.
    """
    found: Spans = []
    remaining = iter([*targets, (1 << 62, 1 << 62)])
    target_start, target_end = next(remaining)
    for position, (token, (first, last)) in enumerate(zip(input_ids, spans, strict=True)):
        while target_end <= first:
            target_start, target_end = next(remaining)
        if token == IMAGE_TOKEN_INDEX or target_start >= max(last, first + 1):
            continue
        start = found.pop()[0] if found and found[-1][1] == position else position
        found.append((start, position + 1))
    return found
