"""Answering turn after turn, without reading again what was read before.

The keys and values of everything the model has read are kept. A new prompt is compared with that, entry by entry:
what both begin with is taken from memory, the rest of the memory is cut off, and only what follows is read. So a prompt
that goes on where the last one ended costs its new part alone, and one that was changed anywhere, such as another
system text, is right as well. The prompt is always tokenised whole, as in training. Memory is not kept with beams.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.conversation import Template
from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.errors import RunError, UserError
from llava_ft.inference.chat.dialogue import Picture
from llava_ft.inference.generate import Sampling
from llava_ft.inference.load import LoadedModel
from llava_ft.inference.streaming import AnswerStreamer, finished_answer
from llava_ft.models.llava import LlavaLlamaForCausalLM

Entry = int | Picture
"""What stands at a position: a token, or a part of a picture."""

Ending = Literal["finished", "length", "context", "interrupted"]
"""Why an answer ended: by itself, at `max_new_tokens`, because the context is full, or by the user."""


class Interrupt(StoppingCriteria):
    """Ends an answer after the token that is being computed."""

    is_set: bool = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Say of each row of `input_ids`, `(B, T)`, whether it ends here."""
        return torch.full((input_ids.shape[0],), self.is_set, dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: The answer, without what ends it.
        ids: Its tokens, the end token included.
        ending: Why it ended.
        num_prompt: Tokens of the prompt, images expanded.
        num_reused: How many of them were still in memory.
    """

    text: str
    ids: list[int]
    ending: Ending
    num_prompt: int
    num_reused: int


class Responder:
    """One model in one conversation."""

    def __init__(self, loaded: LoadedModel):
        """Set up for a model.

        Args:
            loaded: The model. Several responders may share one, each with a memory of its own.
        """
        model = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
        assert isinstance(model, LlavaLlamaForCausalLM)
        self._loaded = loaded
        self._model = model
        self._read: list[Entry] = []
        self._cache = DynamicCache(config=model.config)

    @property
    def takes_images(self) -> bool:
        """Whether the model can be asked about images."""
        return self._loaded.image_transform is not None

    def forget(self) -> None:
        """Give up what was read: the next prompt is read whole."""
        self._read = []
        self._cache = DynamicCache(config=self._model.config)

    def check(self, prompt: str, pictures: Sequence[Picture]) -> None:
        """Check that a prompt can be answered, without computing anything.

        Raises:
            UserError: Pictures are given to a text-only model, or the prompt leaves no room for an answer.
        """
        self._entries(prompt, pictures)

    def answer(
        self,
        prompt: str,
        pictures: Sequence[Picture],
        template: Template,
        sampling: Sampling,
        *,
        write: Callable[[str], object] | None = None,
        interrupt: Interrupt | None = None,
    ) -> Reply:
        """Answer a prompt.

        Args:
            prompt: The whole conversation, as `Dialogue.prompt` writes it.
            pictures: One for each `<image>` in it, in order.
            template: Says where an answer ends.
            sampling: How tokens are chosen.
            write: Takes pieces of the answer as they become certain.
            interrupt: Ends the answer when it is set.

        Raises:
            UserError: As in `check`.
            RunError: The GPU's memory is exhausted.
        """
        entries = self._entries(prompt, pictures)
        if sampling.num_beams > 1:
            self.forget()
        num_reused = self._recall(entries)
        room = self._loaded.context_len - len(entries)
        limit = min(sampling.max_new_tokens, room)
        options = sampling.options() | {"max_new_tokens": limit}
        if sampling.num_beams == 1:
            options["past_key_values"] = self._cache
            if write is not None:
                options["streamer"] = AnswerStreamer(self._loaded.tokenizer, template.stop_strings, write)
        if interrupt is not None:
            options["stopping_criteria"] = StoppingCriteriaList([interrupt])
        read, self._read = entries, []  # nothing counts as read if this ends in an error
        try:
            ids = self._generate(entries, num_reused, template, options)
        except BaseException as error:  # also Ctrl-C: the memory holds a part of the answer
            self.forget()
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise RunError(
                f"The memory of the GPU is too small for this conversation of {len(entries):,} tokens. Begin anew "
                "(/clear), or load the model with --bits 8 or --bits 4."
            ) from None
        self._read = [*read, *ids][: self._cache.get_seq_length()]
        text = self._loaded.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        answer = finished_answer(text, template.stop_strings)
        if write is not None and sampling.num_beams > 1:
            write(answer)
        settings = self._model.generation_config
        ends = settings.eos_token_id if settings is not None else None
        has_ended = ids[-1:] and ids[-1] in (ends if isinstance(ends, list) else [ends])
        ending: Ending = "finished"
        if interrupt is not None and interrupt.is_set:
            ending = "interrupted"
        elif len(ids) == limit and not has_ended and not any(stop in text for stop in template.stop_strings):
            ending = "context" if limit == room else "length"
        return Reply(answer, ids, ending, len(entries), num_reused)

    @torch.no_grad()
    def _generate(
        self, entries: Sequence[Entry], num_reused: int, template: Template, options: dict[str, Any]
    ) -> list[int]:
        new_embeds = self._embed(entries, num_reused)
        # generate wants the whole prompt and leaves out what the cache holds without looking at it.
        unread = new_embeds.new_zeros((1, num_reused, new_embeds.shape[2]))
        embeds = torch.cat([unread, new_embeds], dim=1)
        tokenizer = self._loaded.tokenizer
        output = cast("Any", GenerationMixin).generate(
            self._model,
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=list(template.stop_strings),
            tokenizer=tokenizer,
            **options,
        )
        return output[0].tolist()

    def _entries(self, prompt: str, pictures: Sequence[Picture]) -> list[Entry]:
        """Return what stands at each position of a prompt, pictures in all the positions they take."""
        geometry = self._model.config.image_geometry
        if pictures and (geometry is None or self._loaded.image_transform is None):
            raise UserError("Images are given, but the model is text-only. Ask without them, or load a LLaVA model.")
        remaining = iter(pictures)
        entries: list[Entry] = []
        for token in tokenize_prompt(prompt, self._loaded.tokenizer):
            if token == IMAGE_TOKEN_INDEX:
                assert geometry is not None
                picture = next(remaining)
                entries += [picture] * geometry.num_tokens(picture.image.size)
            else:
                entries.append(token)
        if len(entries) >= self._loaded.context_len:
            images = f", the tokens of {len(pictures)} image{'s'[: len(pictures) > 1]} among them" if pictures else ""
            raise UserError(
                f"With this question the conversation is {len(entries):,} tokens long{images}, but the model's context "
                f"is {self._loaded.context_len:,}. Ask in fewer words, take back earlier questions (/undo), or begin "
                "anew (/clear)."
            )
        return entries

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

    def _embed(self, entries: Sequence[Entry], start: int) -> torch.Tensor:
        """Embed the positions from `start` on; returns `(1, T - start, D)`."""
        device = self._model.model.embed_tokens.weight.device
        rest = entries[start:]
        ids = [IMAGE_TOKEN_INDEX if isinstance(entry, Picture) else entry for entry in rest]
        pictures = list(dict.fromkeys(entry for entry in rest if isinstance(entry, Picture)))
        pixels = sizes = None
        if pictures:
            transform = self._loaded.image_transform
            assert transform is not None
            tiles = torch.cat([transform.pixels(picture.image) for picture in pictures])
            pixels = transform.normalizer(tiles.to(device))
            sizes = [picture.image.size for picture in pictures]
        return self._model.embed_inputs(torch.tensor([ids], device=device), pixels, sizes)
