"""From a sample to `input_ids` and `labels`.

The whole prompt is tokenised once, split at image placeholders only, as LLaVA does at inference. A token is
supervised when any of its characters belongs to a target segment of the template. LLaVA finds the targets by
tokenising each turn again and adding up lengths, and masks a whole sample where the sums disagree; characters
cannot disagree (`docs/differences.md` lists what follows from that).

An image is one `IMAGE_TOKEN_INDEX` here. `expand_and_truncate` makes it as many as the image has tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

from transformers import PreTrainedTokenizerFast

from llava_ft.constants import IGNORE_INDEX, IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.conversation import Segment, Template, TurnsError
from llava_ft.data.schema import Sample
from llava_ft.errors import BadSampleError, UserError

_SKIP_HINT: Final = "Fix the record or pass --on_bad_sample skip."

Offsets = list[tuple[int, int]]
"""First and past-the-end character of each token."""


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A tokenised conversation before images are expanded.

    Attributes:
        input_ids: Vocabulary ids, and one `IMAGE_TOKEN_INDEX` per image.
        labels: As long as `input_ids`: the id where it is supervised, elsewhere `IGNORE_INDEX`.
        num_images: Number of `IMAGE_TOKEN_INDEX` in `input_ids`.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int


@dataclass(frozen=True, slots=True)
class ExpandedSample:
    """A tokenised conversation as the model sees it.

    Attributes:
        input_ids: Vocabulary ids, and one `IMAGE_TOKEN_INDEX` per image token.
        labels: As long as `input_ids`; `IGNORE_INDEX` at every image token.
        num_images_kept: Images that are left after truncation; they are the first ones.
        was_truncated: Whether anything was cut off.
    """

    input_ids: list[int]
    labels: list[int]
    num_images_kept: int
    was_truncated: bool


def place_images(text: str, *, wraps_images: bool = False, mm_use_im_start_end: bool = False) -> str:
    """Bring the image placeholders of a human turn into the form of LLaVA's training text.

    A single placeholder moves to the front, on a line of its own, and the turn loses the white space around
    it. Differs from LLaVA: several placeholders stay where they are (LLaVA joins them into one).

    Args:
        text: What the human says.
        wraps_images: Whether the template writes `<Image><image></Image>`.
        mm_use_im_start_end: Whether `<im_start>` and `<im_end>` go around each placeholder.
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
    """Turns samples into ids and labels with one tokenizer and one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: Template, *, mm_use_im_start_end: bool = False):
        """Set up for one tokenizer and template.

        Args:
            tokenizer: From `load_tokenizer`.
            template: From `get_template`.
            mm_use_im_start_end: Whether `<im_start>` and `<im_end>` go around each image.

        Raises:
            UserError: `mm_use_im_start_end` without these entries in the vocabulary.
        """
        if mm_use_im_start_end:
            vocab = tokenizer.get_added_vocab()
            missing = [token for token in (IM_START_TOKEN, IM_END_TOKEN) if token not in vocab]
            if missing:
                raise UserError(
                    f"mm_use_im_start_end needs {missing[0]} in the tokenizer's vocabulary, and it is not "
                    "there. Add it first (add_image_tokens) or turn the flag off."
                )
        self.template = template
        self.mm_use_im_start_end = mm_use_im_start_end
        self._encoder = _PieceEncoder(tokenizer)

    def segments(self, sample: Sample) -> list[Segment]:
        """Write the sample as training text, placeholders in place.

        Raises:
            BadSampleError: The turns do not fit the template, or the placeholders do not fit the images.
        """
        self._check_placeholders(sample)
        turns = [
            (turn.role, turn.text if turn.role == "gpt" else self._place_images(turn.text)) for turn in sample.turns
        ]
        try:
            return self.template.render(turns, system=sample.system)
        except TurnsError as error:
            raise BadSampleError(sample.index, sample.id, error.kind, str(error)) from None

    def __call__(self, sample: Sample) -> TokenizedSample:
        """Tokenise one sample.

        Raises:
            BadSampleError: As in `segments`, or no token is supervised. Kinds: "placeholder-mismatch",
                "image-in-answer", "image-in-system", "no-supervised-token" and those of `TurnsError`.
        """
        segments = self.segments(sample)
        input_ids, labels = self._encoder.encode_segments(segments)
        if labels.count(IGNORE_INDEX) == len(labels):
            raise BadSampleError(
                sample.index,
                sample.id,
                "no-supervised-token",
                "the assistant says nothing, so there is nothing to learn. " + _SKIP_HINT,
            )
        return TokenizedSample(input_ids, labels, len(sample.images))

    def _place_images(self, text: str) -> str:
        return place_images(
            text,
            wraps_images=self.template.wraps_images,
            mm_use_im_start_end=self.mm_use_im_start_end,
        )

    def _check_placeholders(self, sample: Sample) -> None:
        for position, turn in enumerate(sample.turns):
            if turn.role == "gpt" and IMAGE_TOKEN in turn.text:
                raise BadSampleError(
                    sample.index,
                    sample.id,
                    "image-in-answer",
                    f"{IMAGE_TOKEN} stands in an assistant's turn (turn {position}). Images are only allowed "
                    f"in turns from 'human'. {_SKIP_HINT}",
                )
        if sample.system is not None and IMAGE_TOKEN in sample.system:
            raise BadSampleError(
                sample.index,
                sample.id,
                "image-in-system",
                f"{IMAGE_TOKEN} stands in the system turn. Images are only allowed in turns from 'human'.",
            )
        num_placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in sample.turns)
        if num_placeholders != len(sample.images):
            raise BadSampleError(
                sample.index,
                sample.id,
                "placeholder-mismatch",
                f"{num_placeholders} {IMAGE_TOKEN} placeholder(s) but {len(sample.images)} image path(s). "
                f"Each placeholder needs one image. {_SKIP_HINT}",
            )


def tokenize_prompt(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokenise a prompt for inference.

    Returns:
        Ids with the tokenizer's begin token in front if it sets one, and one `IMAGE_TOKEN_INDEX` for each
        `<image>` in `text`.
    """
    return _PieceEncoder(tokenizer).encode_segments([Segment(text, False)])[0]


def expand_and_truncate(sample: TokenizedSample, tokens_per_image: Sequence[int], max_length: int) -> ExpandedSample:
    """Give each image its tokens, and cut the sample at `max_length`.

    An image that does not fit whole is left out, with everything after it.

    Args:
        sample: Before expansion.
        tokens_per_image: Number of tokens of each image, in order.
        max_length: Tokens that may stay.

    Raises:
        ValueError: `tokens_per_image` does not have one entry per image.
    """
    if len(tokens_per_image) != sample.num_images:
        raise ValueError(f"{len(tokens_per_image)} image sizes for {sample.num_images} images.")
    input_ids: list[int] = []
    labels: list[int] = []
    start = 0
    for num_kept, num_tokens in enumerate(tokens_per_image):
        image = sample.input_ids.index(IMAGE_TOKEN_INDEX, start)
        input_ids += sample.input_ids[start:image]
        labels += sample.labels[start:image]
        if len(input_ids) + num_tokens > max_length:
            return ExpandedSample(input_ids[:max_length], labels[:max_length], num_kept, True)
        input_ids += [IMAGE_TOKEN_INDEX] * num_tokens
        labels += [IGNORE_INDEX] * num_tokens
        start = image + 1
    input_ids += sample.input_ids[start:]
    labels += sample.labels[start:]
    was_truncated = len(input_ids) > max_length
    return ExpandedSample(input_ids[:max_length], labels[:max_length], sample.num_images, was_truncated)


class _PieceEncoder:
    """Tokenises text around placeholders and labels the tokens by their characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        # Every piece of text is tokenised alone; only the first keeps the begin token.
        empty = cast("list[int]", tokenizer("")["input_ids"])
        self._begin = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []

    def encode_segments(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """Tokenise the joined segments; return ids and labels of one length."""
        text = "".join(segment.text for segment in segments)
        targets = _target_spans(segments)
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
        labels = [IGNORE_INDEX] * len(input_ids)
        start = 0
        for position, piece in enumerate(pieces):
            if position:
                input_ids.append(IMAGE_TOKEN_INDEX)
                labels.append(IGNORE_INDEX)
            ids = cast("list[int]", encoded["input_ids"][position])
            input_ids += ids
            labels += _label(ids, cast("Offsets", encoded["offset_mapping"][position]), start, targets)
            start += len(piece) + len(IMAGE_TOKEN)
        return input_ids, labels


def _target_spans(segments: Sequence[Segment]) -> Offsets:
    spans: Offsets = []
    start = 0
    for segment in segments:
        end = start + len(segment.text)
        if segment.is_target:
            spans.append((start, end))
        start = end
    return spans


def _label(ids: Sequence[int], offsets: Offsets, start: int, targets: Offsets) -> list[int]:
    """Keep the ids whose characters touch a target span; both lists are in reading order.

    A token without characters of its own (a blank that the tokenizer puts in front) counts with the character
    it stands before.
    """
    labels: list[int] = []
    spans = iter([*targets, (1 << 62, 1 << 62)])
    span_start, span_end = next(spans)
    for token, (first, last) in zip(ids, offsets, strict=True):
        first += start
        while span_end <= first:
            span_start, span_end = next(spans)
        labels.append(token if span_start < max(last + start, first + 1) else IGNORE_INDEX)
    return labels
