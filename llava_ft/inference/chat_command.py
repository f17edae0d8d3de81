"""`llava-ft chat`: from the command line to a conversation."""

import argparse
import logging
from typing import TextIO

import torch
import transformers

from llava_ft.checkpoint.directory import identify, resolve_model_path
from llava_ft.checkpoint.overrides import force_from_flags
from llava_ft.conversation import Template, get_template
from llava_ft.errors import UserError
from llava_ft.inference.chat.dialogue import Picture
from llava_ft.inference.chat.files import piped_lines, typed_lines
from llava_ft.inference.chat.loop import Chat
from llava_ft.inference.chat.screen import choose_screen
from llava_ft.inference.chat.voices import Voice, base_and_trained, single_voice
from llava_ft.inference.generate import Sampling
from llava_ft.inference.load import LoadedModel, choose_quantization, load_model

logger = logging.getLogger(__name__)


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
    _check_comparison(options)
    pictures = [Picture.read(path) for path in options.image_file]
    is_interactive = stdin.isatty()
    voices = _load_voices(options, template)
    if pictures and not all(voice.responder.takes_images for voice in voices):
        raise UserError("--image-file is given, but the model is text-only. Load a LLaVA model to ask about images.")
    screen = choose_screen(output, messages, num_voices=len(voices), is_interactive=is_interactive)
    chat = Chat(voices, screen, sampling, seed=options.seed, is_interactive=is_interactive)
    chat.pending += pictures
    if is_interactive:
        names = " and ".join(voice.name for voice in voices)
        screen.notice(f"{names}, template {voices[0].template.name}. /help lists the commands, Ctrl-D ends.")
        chat.run(typed_lines(stdin, output, messages))
    else:
        chat.run(piped_lines(stdin))


def _check_comparison(options: argparse.Namespace) -> None:
    """Refuse what cannot be compared before weights are read."""
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


def _load_voices(options: argparse.Namespace, template: Template | None) -> list[Voice]:
    transformers.logging.set_verbosity_error()  # its advice on generation flags is of no use to somebody who chats
    if options.compare:
        return base_and_trained(_load(options, options.model_path, options.model_base, adapter="beside"), template)
    first = single_voice(_load(options, options.model_path, options.model_base), options.model_path, template)
    if not options.compare_with:
        return [first]
    second = _load(options, options.compare_with, options.compare_with_base)
    return [first, single_voice(second, options.compare_with, template)]


def _load(options: argparse.Namespace, path: str, base: str | None, *, adapter: str = "added") -> LoadedModel:
    return load_model(
        path,
        base,
        vision_tower=options.vision_tower,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        device=options.device,
        force=force_from_flags(options.force, options.allow_base_mismatch),
        adapter="beside" if adapter == "beside" else "added",
        quantization=choose_quantization(path, options.bits),
    )
