"""`llava-ft generate`: one question, its answer streamed to standard output."""

import argparse
from typing import TextIO

import torch
from transformers import set_seed

from llava_ft.checkpoint.overrides import force_from_flags
from llava_ft.conversation import get_template
from llava_ft.inference.generate import Sampling, build_prompt, generate_answer
from llava_ft.inference.load import choose_quantization, load_model
from llava_ft.inference.streaming import AnswerStreamer


def run_generate(options: argparse.Namespace, output: TextIO) -> str:
    """Answer the question of a command line, writing the answer as it comes.

    Returns:
        The answer.
    """
    sampling = Sampling.from_flags(options)
    template = get_template(options.conv_mode) if options.conv_mode else None
    quantization = choose_quantization(options.model_path, options.bits)
    loaded = load_model(
        options.model_path,
        options.model_base,
        vision_tower=options.vision_tower,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=options.device,
        force=force_from_flags(options.force, options.allow_base_mismatch),
        quantization=quantization,
    )
    template = template or get_template(loaded.template)
    config = loaded.model.config
    prompt = build_prompt(
        options.query, len(options.image_file), template, mm_use_im_start_end=config.mm_use_im_start_end
    )
    set_seed(options.seed)
    streamer = None
    if sampling.num_beams == 1:

        def write(text: str) -> None:
            output.write(text)
            output.flush()

        streamer = AnswerStreamer(loaded.tokenizer, template.stop_strings, write)
    answer = generate_answer(loaded, prompt, options.image_file, template, sampling, streamer)
    output.write("\n" if streamer is not None else answer + "\n")
    return answer
