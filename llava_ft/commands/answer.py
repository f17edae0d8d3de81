"""`llava-ft generate` and `llava-ft chat`."""

import argparse
import sys
from collections.abc import Sequence

from llava_ft.commands.parser import DONE, DTYPES, FORCE_HELP, Parser


def generate(argv: Sequence[str]) -> int:
    """Answer one question; the answer alone goes to standard output."""
    parser = Parser("llava-ft generate", "Answer one question about images; the answer alone is on standard output.")
    parser.add_argument("--model-path", required=True, help="a LLaVA model, a LoRA directory or a projector directory")
    parser.add_argument("--model-base", help="base of an adapter or projector")
    parser.add_argument("--image-file", action="append", default=[], help="an image; give it several times for several")
    parser.add_argument("--query", required=True)
    _add_flags(parser)
    options = parser.parse_args(argv)
    from llava_ft.inference.generate import run_generate

    run_generate(options, sys.stdout)
    return DONE


def chat(argv: Sequence[str]) -> int:
    """Talk with a model about images."""
    parser = Parser(
        "llava-ft chat",
        "Talk with a model, turn by turn, about text and images; /help in the chat lists its commands. Where standard "
        "input is no terminal each of its lines is a turn, and standard output gets the answers alone.",
    )
    parser.add_argument("--model-path", required=True, help="a LLaVA model, a LoRA directory or a projector directory")
    parser.add_argument("--model-base", help="base of an adapter or projector")
    parser.add_argument(
        "--image-file", action="append", default=[], help="an image for the first question; may be given several times"
    )
    parser.add_argument("--compare", action="store_true", help="have an adapter's base answer beside it")
    parser.add_argument("--compare-with", metavar="MODEL", help="have a second model answer beside the first")
    parser.add_argument("--compare-with-base", metavar="BASE", help="its base, where it is an adapter or projector")
    _add_flags(parser)
    options = parser.parse_args(argv)
    from llava_ft.inference.chat import run_chat

    run_chat(options, sys.stdin, sys.stdout, sys.stderr)
    return DONE


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `generate` and `chat` share: how an answer is made, and how the model is held."""
    parser.add_argument("--conv-mode", help="conversation template; when absent, the one the model was trained with")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", "--top_p", type=float)
    parser.add_argument("--num-beams", "--num_beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="for temperatures above 0")
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU when absent")
    parser.add_argument("--bits", type=int, choices=[4, 8, 16], default=16, help="of the language model's layers")
    parser.add_argument("--device", help="such as cuda or cpu")
    parser.add_argument("--vision-tower", help="the vision tower, if it is not where the model says")
    parser.add_argument("--allow-base-mismatch", action="store_true", help="use another base than the adapter's")
    parser.add_argument("--force", action="store_true", help=FORCE_HELP)
