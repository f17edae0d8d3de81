"""`llava-ft generate`: one question, its answer streamed to standard output."""

import argparse
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.generation.streamers import TextStreamer

from llava_ft.checkpoint.overrides import force_from_flags
from llava_ft.conversation import get_template
from llava_ft.errors import UserError
from llava_ft.inference.generate import Sampling, build_prompt, generate_answer
from llava_ft.inference.load import choose_quantization, load_model


def run_generate(options: argparse.Namespace, output: TextIO) -> str:
    """Answer the question of a command line, writing the answer as it comes.

    Returns:
        The answer.
    """
    _check(options)
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
    sampling = Sampling(options.temperature, options.top_p, options.num_beams, options.max_new_tokens)
    streams = options.num_beams == 1 and not template.stop_strings
    streamer = _Streamer(loaded.tokenizer, output) if streams else None
    answer = generate_answer(loaded, prompt, options.image_file, template, sampling, streamer)
    if not streams:
        output.write(answer + "\n")
    return answer


def _check(options: argparse.Namespace) -> None:
    if options.temperature < 0:
        raise UserError(
            f"--temperature is {options.temperature}; it must be at least 0 (0 takes the most likely token)."
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise UserError(f"--top-p is {options.top_p}; it must be above 0 and at most 1.")
    for name in ("num_beams", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1.")


class _Streamer(TextStreamer):
    """Writes text as soon as it is certain, to any stream, without the white space around the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO):
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._output = output
        self._pending = ""
        self._started = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece, holding back white space that may turn out to be the end."""
        text = self._pending + text
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        kept = text.rstrip()
        self._pending = text[len(kept) :]
        self._output.write(kept + ("\n" if stream_end else ""))
        self._output.flush()
