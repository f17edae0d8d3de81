"""Answering a question about images."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers.generation.streamers import BaseStreamer

from llava_ft.constants import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ft.conversation import Template
from llava_ft.data.image_files import load_image
from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.errors import UserError
from llava_ft.geometry import ImageGeometry
from llava_ft.inference.load import LoadedModel
from llava_ft.inference.streaming import finished_answer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; above it tokens are drawn.
        top_p: Share of probability from which tokens are drawn.
        num_beams: Number of beams.
        max_new_tokens: Longest answer in tokens.
    """

    temperature: float = 0.0
    top_p: float | None = None
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


def build_prompt(query: str, num_images: int, template: Template, *, mm_use_im_start_end: bool = False) -> str:
    """Write the prompt for one question.

    A query without `<image>` gets one for each image in front, as original LLaVA does.

    Raises:
        UserError: The query has another number of `<image>` than there are images.
    """
    present = query.count(IMAGE_TOKEN)
    if present == 0:
        query = f"{IMAGE_TOKEN}\n" * num_images + query
    elif present != num_images:
        raise UserError(
            f"The query has {present} {IMAGE_TOKEN} but {num_images} images are given. Each needs one; leave them out "
            "of the query to have the images put in front."
        )
    if mm_use_im_start_end:
        query = query.replace(IMAGE_TOKEN, f"{IM_START_TOKEN}{IMAGE_TOKEN}{IM_END_TOKEN}")
    return template.prompt([("human", query)])


def prepare_inputs(loaded: LoadedModel, prompt: str, image_files: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """Turn a prompt and images into what the model takes.

    Returns:
        `input_ids` `(1, T)`, expanded, and with images `pixel_values` `(K, 3, H, W)` of their K tiles and `image_sizes`
        `(M, 2)`, on the model's device.

    Raises:
        UserError: An image cannot be read or has no placeholder, there is no vision tower, or the prompt is longer than
            the model's context.
    """
    device = next(loaded.model.parameters()).device
    if image_files and loaded.image_transform is None:
        raise UserError("Images are given, but the model is text-only.")
    pictures = [load_image(file) for file in image_files]
    ids = _expanded(tokenize_prompt(prompt, loaded.tokenizer), pictures, loaded)
    if len(ids) >= loaded.context_len:
        raise UserError(
            f"The prompt is {len(ids)} tokens long, but the model's context is {loaded.context_len}. Shorten the query "
            "or give fewer images."
        )
    inputs = {"input_ids": torch.tensor([ids], device=device)}
    if pictures:
        transform = loaded.image_transform
        assert transform is not None
        pixels = torch.cat([transform.pixels(picture) for picture in pictures])
        inputs["pixel_values"] = transform.normalizer(pixels.to(device))
        inputs["image_sizes"] = torch.tensor([picture.size for picture in pictures])
    return inputs


def _expanded(tokens: Sequence[int], pictures: Sequence[Image], loaded: LoadedModel) -> list[int]:
    """Put as many entries in the place of each image as it takes positions."""
    num_placeholders = sum(token == IMAGE_TOKEN_INDEX for token in tokens)
    if num_placeholders != len(pictures):
        raise UserError(
            f"The prompt has {num_placeholders} {IMAGE_TOKEN}, but {len(pictures)} images are given. Each needs one."
        )
    geometry: ImageGeometry | None = loaded.model.config.image_geometry
    remaining = iter(pictures)
    ids: list[int] = []
    for token in tokens:
        if token == IMAGE_TOKEN_INDEX:
            assert geometry is not None
            ids += [IMAGE_TOKEN_INDEX] * geometry.num_tokens(next(remaining).size)
        else:
            ids.append(token)
    return ids


def generate_answer(
    loaded: LoadedModel,
    prompt: str,
    image_files: Sequence[str | Path],
    template: Template,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> str:
    """Generate the answer to a prompt.

    Args:
        loaded: The model.
        prompt: The whole prompt, as `build_prompt` writes it.
        image_files: One file for each `<image>` in it.
        template: Says where an answer ends.
        sampling: How tokens are chosen.
        streamer: Gets the tokens as they come.

    Returns:
        The answer, without the template's end mark.
    """
    inputs = prepare_inputs(loaded, prompt, image_files)
    stops = list(template.stop_strings)
    options = sampling.options()
    if stops:
        options |= {"stop_strings": stops, "tokenizer": loaded.tokenizer}
    pad = loaded.tokenizer.pad_token_id
    ids = loaded.model.generate(**inputs, **options, pad_token_id=pad, streamer=streamer)
    text = loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert isinstance(text, str)
    return finished_answer(text, stops)
