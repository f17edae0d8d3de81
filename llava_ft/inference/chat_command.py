"""`llava-ft chat`: from the command line to a conversation."""

import argparse
from typing import TextIO

import transformers

from llava_ft.checkpoint.directory import identify, resolve_model_path
from llava_ft.conversation import get_template
from llava_ft.errors import UserError
from llava_ft.inference.chat.console import choose_screen, piped_lines, typed_lines
from llava_ft.inference.chat.dialogue import Picture
from llava_ft.inference.chat.loop import Chat
from llava_ft.inference.chat.voices import base_and_trained, single_voice
from llava_ft.inference.generate import Sampling
from llava_ft.inference.load import load_by_flags


def run_chat(options: argparse.Namespace, stdin: TextIO, output: TextIO, messages: TextIO) -> None:
    """Hold the conversation that a command line asks for.

    Args:
        options: The flags.
        stdin: Where questions come from.
        output: Gets the answers alone.
        messages: Gets prompts and notices.

    Raises:
        UserError: The request is wrong, or a line of a pipe cannot be carried out.
    """
    sampling = Sampling.from_flags(options)
    template = get_template(options.conv_mode) if options.conv_mode else None
    if options.compare and options.compare_with:
        raise UserError(
            "--compare and --compare-with exclude each other: the first compares an adapter with its base, the second "
            "two models. Give one of them."
        )
    if options.compare_with_base and not options.compare_with:
        raise UserError("--compare-with-base is the base of the model that --compare-with names. Give that too.")
    if options.compare and identify(resolve_model_path(options.model_path)).kind not in ("lora", "projector"):
        raise UserError(
            f"--compare needs an adapter, and {options.model_path} is a whole model. Give the other model with "
            "--compare-with."
        )
    pictures = [Picture.read(path) for path in options.image_file]
    is_interactive = stdin.isatty()

    transformers.logging.set_verbosity_error()  # its advice on generation flags is of no use to somebody who chats
    if options.compare:
        beside = load_by_flags(options, options.model_path, options.model_base, adapter="beside")
        voices = base_and_trained(beside, template)
    else:
        first = load_by_flags(options, options.model_path, options.model_base)
        voices = [single_voice(first, options.model_path, template)]
        if options.compare_with:
            second = load_by_flags(options, options.compare_with, options.compare_with_base)
            voices.append(single_voice(second, options.compare_with, template))
    if pictures and not all(voice.responder.takes_images for voice in voices):
        raise UserError("--image-file is given, but the model is text-only. Load a LLaVA model to ask about images.")

    screen = choose_screen(output, messages, num_voices=len(voices), is_interactive=is_interactive)
    chat = Chat(voices, screen, sampling, seed=options.seed, is_interactive=is_interactive, pending=pictures)
    if is_interactive:
        names = " and ".join(voice.name for voice in voices)
        screen.notice(f"{names}, template {voices[0].template.name}. /help lists the commands, Ctrl-D ends.")
    chat.run(typed_lines(stdin, output, messages) if is_interactive else piped_lines(stdin))
