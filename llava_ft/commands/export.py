"""`llava-ft export`."""

from collections.abc import Sequence

from llava_ft.commands.parser import DONE, DTYPES, FORCE_HELP, Parser


def export(argv: Sequence[str]) -> int:
    """Write a model or an adapter in the layout of other programs."""
    parser = Parser("llava-ft export", "Write a model or an adapter in the layout of other programs, and verify it.")
    parser.add_argument("--model-path", "--model_path", required=True, help="a model, LoRA or projector directory")
    parser.add_argument("--model-base", "--model_base", help="base of an adapter or projector, if it names none")
    parser.add_argument("--save-path", "--save_path", required=True, help="where the result is written")
    parser.add_argument("--format", choices=["llava", "hf", "gguf"], required=True, help="whose layout: see the docs")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: that of the base's files")
    parser.add_argument("--max-shard-size", "--max_shard_size", default="5GB", help="such as 5GB or 512MiB")
    parser.add_argument("--adapter-only", "--adapter_only", action="store_true", help="the adapter without its base")
    parser.add_argument("--vision-tower", "--vision_tower", help="the vision tower, if it is not where the model says")
    parser.add_argument("--no-verify", "--no_verify", action="store_true", help="skip the comparison of logits")
    parser.add_argument("--force", action="store_true", help=FORCE_HELP)
    options = parser.parse_args(argv)
    from llava_ft.convert.export import run_export

    run_export(options)
    return DONE
