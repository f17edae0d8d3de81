"""Answering one question about images, and `llava-ft generate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from transformers import set_seed

from llava_ft.constants import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava_ft.conversation import Template, get_template
from llava_ft.inference.dialogue import Picture, with_placeholders
from llava_ft.inference.load import LoadedModel, load_by_flags
from llava_ft.inference.responder import Responder, Sampling, model_inputs, prompt_entries


def build_prompt(query: str, num_images: int, template: Template, *, mm_use_im_start_end: bool = False) -> str:
    """Write the prompt for one question.

    A query without `<image>` gets one for each image in front; where it has them they stay in place, as in original
    LLaVA. (A chat moves a single one to the front, as training does.)

    Raises:
        UserError: The query has another number of `<image>` than there are images.
    """
    query = with_placeholders(query, num_images)
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
    pictures = [Picture.read(str(file)) for file in image_files]
    return model_inputs(loaded, prompt_entries(loaded, prompt, pictures))


def run_generate(options: argparse.Namespace, output: TextIO) -> None:
    """Answer the question of a command line, writing the answer as it comes.

    Raises:
        UserError: The request is wrong.
        RunError: The GPU's memory is exhausted.
    """
    sampling = Sampling.from_flags(options)
    template = get_template(options.conv_mode) if options.conv_mode else None
    pictures = [Picture.read(path) for path in options.image_file]
    loaded = load_by_flags(options, options.model_path, options.model_base)
    template = template or get_template(loaded.template)
    prompt = build_prompt(
        options.query, len(pictures), template, mm_use_im_start_end=loaded.model.config.mm_use_im_start_end
    )

    def write(text: str) -> None:
        output.write(text)
        output.flush()

    set_seed(options.seed)
    # As in original LLaVA, the answer to a long question may go on past the context it was trained with.
    Responder(loaded).answer(prompt, pictures, template, sampling, write=write, may_leave_context=True)
    output.write("\n")
