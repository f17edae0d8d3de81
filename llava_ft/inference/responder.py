"""Answering turn after turn, without reading again what was read before.

The keys and values of everything the model has read are kept. A new prompt is compared with that, entry by entry:
what both begin with is taken from memory, the rest of the memory is cut off, and only what follows is read. So a prompt
that goes on where the last one ended costs its new part alone, and one that was changed anywhere, such as another
system text, is right as well. The prompt is always tokenised whole, as in training. Memory is not kept with beams.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, cast

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from llava_ft.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.conversation import Template
from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.errors import RunError, UserError
from llava_ft.inference.dialogue import Picture
from llava_ft.inference.load import LoadedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and how many may be."""

    temperature: float = 0.0  # 0 takes the most likely token; above it tokens are drawn
    top_p: float | None = None  # share of probability from which they are drawn
    num_beams: int = 1
    max_new_tokens: int = 512

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> "Sampling":
        """Take the flags of a command line: `temperature`, `top_p`, `num_beams` and `max_new_tokens`.

        Raises:
            UserError: One is out of its range.
        """
        if flags.temperature < 0:
            raise UserError(
                f"--temperature is {flags.temperature}; it must be at least 0 (0 takes the most likely token)."
            )
        if flags.top_p is not None and not 0 < flags.top_p <= 1:
            raise UserError(f"--top-p is {flags.top_p}; it must be above 0 and at most 1.")
        for name in ("num_beams", "max_new_tokens"):
            if getattr(flags, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; it must be at least 1.")
        return cls(flags.temperature, flags.top_p, flags.num_beams, flags.max_new_tokens)

    def options(self) -> dict[str, Any]:
        """Return the options of `generate`."""
        options: dict[str, Any] = {
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p}
        return options


Entry = int | Picture
"""What stands at a position: a token, or a part of a picture."""

Ending = Literal["finished", "length", "context"]
"""Why an answer ended: by itself, at `max_new_tokens`, or because the context is full."""


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str  # without what ends it
    ids: list[int]  # the end token included
    ending: Ending
    num_prompt: int  # tokens of the prompt, images expanded
    num_reused: int  # how many of them were still in memory


def prompt_entries(loaded: LoadedModel, prompt: str, pictures: Sequence[Picture]) -> list[Entry]:
    """Return what stands at each position of a prompt, pictures in all the positions they take.

    Raises:
        UserError: The model is text-only, the prompt has another number of `<image>` than there are pictures, or it
            leaves no room for an answer.
    """
    geometry = loaded.model.config.image_geometry
    if pictures and (geometry is None or loaded.image_transform is None):
        raise UserError("Images are given, but the model is text-only. Ask without them, or load a LLaVA model.")
    tokens = tokenize_prompt(prompt, loaded.tokenizer)
    if (num_placeholders := tokens.count(IMAGE_TOKEN_INDEX)) != len(pictures):
        raise UserError(
            f"The prompt has {num_placeholders} {IMAGE_TOKEN}, but {len(pictures)} images are given. Each needs one."
        )
    remaining = iter(pictures)
    entries: list[Entry] = []
    for token in tokens:
        if token == IMAGE_TOKEN_INDEX:
            assert geometry is not None
            picture = next(remaining)
            entries += [picture] * geometry.num_tokens(picture.image.size)
        else:
            entries.append(token)
    if len(entries) >= loaded.context_len:
        images = f", the tokens of {len(pictures)} image{'s'[: len(pictures) > 1]} among them" if pictures else ""
        raise UserError(
            f"With this question the conversation is {len(entries):,} tokens long{images}, but the model's context "
            f"is {loaded.context_len:,}. Ask in fewer words or about fewer images; in a chat, take back earlier "
            "questions (/undo), or begin anew (/clear)."
        )
    return entries


def model_inputs(loaded: LoadedModel, entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
    """Return what the model takes for these positions; see `prepare_inputs`."""
    device = next(loaded.model.parameters()).device
    ids = [IMAGE_TOKEN_INDEX if isinstance(entry, Picture) else entry for entry in entries]
    inputs = {"input_ids": torch.tensor([ids], device=device)}
    pictures = list(dict.fromkeys(entry for entry in entries if isinstance(entry, Picture)))
    if pictures:
        transform = loaded.image_transform
        assert transform is not None
        tiles = torch.cat([transform.pixels(picture.image) for picture in pictures])
        inputs["pixel_values"] = transform.normalizer(tiles.to(device))
        inputs["image_sizes"] = torch.tensor([picture.image.size for picture in pictures])
    return inputs


def finished_answer(text: str, stops: Sequence[str]) -> str:
    """Return a decoded answer without what ends it, the first of `stops` in it, and without white space around it."""
    text = text.strip()
    ends = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text


def certain_text(text: str, stops: Sequence[str]) -> str:
    """Return the part of a decoded, unfinished answer that no further token can change."""
    text = text.lstrip()
    if any(stop in text for stop in stops):
        return finished_answer(text, stops)
    text = text.rstrip("\ufffd")  # a character that is not complete
    begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]  # what may become an end mark
    return text[: len(text) - max(begun, default=0)].rstrip()


class AnswerStreamer(BaseStreamer):
    """Decodes one answer as its tokens come, and hands what is certain of it to `write`, piece by piece.

    A template may end an answer with a text, such as `###` or `</s>`, which the model writes token by token. What could
    be the beginning of such a text is held back until the next tokens decide. So are white space, which may be the end
    of the answer, and the bytes of a character that is not complete. Nothing has to be taken back, and what was written
    in the end is `finished_answer` of the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], write: Callable[[str], object]):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._write = write
        self._ids: list[int] = []
        self._num_written = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the next token, `(1,)` int64."""
        self._ids += value.flatten().tolist()
        self._write_up_to(certain_text(self._decoded(), self._stops))

    def end(self) -> None:
        """Write what was held back and belongs to the answer."""
        self._write_up_to(finished_answer(self._decoded(), self._stops))

    def _decoded(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _write_up_to(self, text: str) -> None:
        if len(text) > self._num_written:
            self._write(text[self._num_written :])
            self._num_written = len(text)


class Responder:
    """One model in one conversation. Several may share a model, each with a memory of its own."""

    def __init__(self, loaded: LoadedModel):
        """Begin with nothing read."""
        self.loaded = loaded
        self._model = loaded.plain_model
        self._read: list[Entry] = []
        self._cache = DynamicCache(config=self._model.config)

    def forget(self) -> None:
        """Give up what was read: the next prompt is read whole."""
        self._read = []
        self._cache = DynamicCache(config=self._model.config)

    @torch.no_grad()
    def answer(
        self,
        prompt: str,
        pictures: Sequence[Picture],
        template: Template,
        sampling: Sampling,
        *,
        write: Callable[[str], object] | None = None,
        may_leave_context: bool = False,
    ) -> Reply:
        """Answer a prompt.

        Args:
            prompt: The whole conversation, as `Dialogue.prompt` writes it.
            pictures: One for each `<image>` in it, in order.
            template: Says where an answer ends.
            sampling: How tokens are chosen.
            write: Takes pieces of the answer as they become certain.
            may_leave_context: Whether the answer may go on where the model's context ends.

        Raises:
            UserError: As in `prompt_entries`.
            RunError: The GPU's memory is exhausted.
        """
        entries = prompt_entries(self.loaded, prompt, pictures)
        tokenizer, stops = self.loaded.tokenizer, template.stop_strings
        room = self.loaded.context_len - len(entries)
        limit = sampling.max_new_tokens if may_leave_context else min(sampling.max_new_tokens, room)
        options = sampling.options() | {"max_new_tokens": limit}
        has_beams = sampling.num_beams > 1
        if has_beams:
            self.forget()
        if write is not None and not has_beams:
            options["streamer"] = AnswerStreamer(tokenizer, stops, write)
        try:
            num_reused = self._recall(entries)
            if not has_beams:
                options["past_key_values"] = self._cache
            new_embeds = self._model.embed_inputs(**model_inputs(self.loaded, entries[num_reused:]))
            # generate wants the whole prompt and leaves out what the cache holds without looking at it.
            unread = new_embeds.new_zeros((1, num_reused, new_embeds.shape[2]))
            embeds = torch.cat([unread, new_embeds], dim=1)
            output = cast("Any", GenerationMixin).generate(
                self._model,
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
                pad_token_id=tokenizer.pad_token_id,
                stop_strings=list(stops),
                tokenizer=tokenizer,
                **options,
            )
        except BaseException as error:  # also Ctrl-C: the memory holds an unknown part of the answer
            self.forget()
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise RunError(
                f"The memory of the GPU is too small for this conversation of {len(entries):,} tokens. Begin anew "
                "(/clear in a chat), or load the model with --bits 8 or --bits 4."
            ) from None
        ids: list[int] = output[0].tolist()
        self._read = [*entries, *ids][: self._cache.get_seq_length()]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        answer = finished_answer(text, stops)
        if write is not None and has_beams:
            write(answer)
        settings = self._model.generation_config
        ends = settings.eos_token_id if settings is not None else None
        has_ended = ids[-1:] and ids[-1] in (ends if isinstance(ends, list) else [ends])
        ending: Ending = "finished"
        if len(ids) == limit and not has_ended and not any(stop in text for stop in stops):
            ending = "context" if limit == room else "length"
        return Reply(answer, ids, ending, len(entries), num_reused)

    def _recall(self, entries: Sequence[Entry]) -> int:
        """Cut the memory down to what a prompt begins with, and return how much that is; one position stays to read."""
        pairs = zip(self._read, entries[:-1], strict=False)
        num_reused = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        superfluous = self._cache.get_seq_length() - num_reused
        if num_reused == 0:
            self.forget()
        elif superfluous:
            self._cache.crop(-superfluous)
        return num_reused
