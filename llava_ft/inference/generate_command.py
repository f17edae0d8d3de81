"""`llava-ft generate`: one question, its answer streamed to standard output."""

import argparse
from typing import TextIO

from transformers import set_seed

from llava_ft.conversation import get_template
from llava_ft.inference.generate import Sampling, build_prompt, generate_answer
from llava_ft.inference.load import load_by_flags
from llava_ft.inference.streaming import AnswerStreamer


def run_generate(options: argparse.Namespace, output: TextIO) -> str:
    """Answer the question of a command line, writing the answer as it comes.

    Returns:
        The answer.
    """
    sampling = Sampling.from_flags(options)
    template = get_template(options.conv_mode) if options.conv_mode else None
    loaded = load_by_flags(options, options.model_path, options.model_base)
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
