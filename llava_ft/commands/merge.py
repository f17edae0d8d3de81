"""`llava-ft merge`."""

from collections.abc import Sequence

from llava_ft.commands.parser import DONE, DTYPES, FORCE_HELP, Parser


def merge(argv: Sequence[str]) -> int:
    """Merge what was trained into its base model."""
    parser = Parser("llava-ft merge", "Put a LoRA adapter, or a projector, into its base model and verify the result.")
    parser.add_argument(
        "--model-path", required=True, action="append", help="the adapter's (or projector's) directory; several add up"
    )
    parser.add_argument("--weight", type=float, action="append", help="of each adapter, in their order; 1 when absent")
    parser.add_argument("--model-base", help="its base model; when absent, the one that the adapter names")
    parser.add_argument("--save-model-path", required=True, help="where the merged model is written")
    parser.add_argument("--vision-tower", help="the vision tower, if it is not where the model says")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: that of the base's files")
    parser.add_argument("--max-shard-size", default="5GB", help="such as 5GB or 512MiB")
    parser.add_argument("--format", choices=["safetensors", "bin"], default="safetensors")
    parser.add_argument("--save-vision-tower", action="store_true", help="write the tower although the base has none")
    parser.add_argument("--allow-base-mismatch", action="store_true", help="merge into another base than the adapter's")
    parser.add_argument("--force", action="store_true", help=FORCE_HELP)
    parser.add_argument(
        "--base-as-trained",
        action="store_true",
        help="for what was trained on quantised weights: merge into their values instead of the base's own",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="skip the comparison of logits, which loads one model after the other"
    )
    options = parser.parse_args(argv)
    from llava_ft.convert.merge import run_merge

    run_merge(options)
    return DONE
