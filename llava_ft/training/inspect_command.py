"""`llava-ft inspect data`: what the model will see of each record, without any model weights."""

import json
from pathlib import Path
from typing import Any, TextIO

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.directory import resolve_model_path
from llava_ft.checkpoint.names import CONFIG
from llava_ft.checkpoint.weights import read_json
from llava_ft.constants import ORIGINAL_DEFAULTS
from llava_ft.conversation import get_template
from llava_ft.data.inspect import InspectionSummary, has_color, inspect_records, render_colored
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer
from llava_ft.geometry import num_image_tokens
from llava_ft.models.builder import vision_fields


def run_inspect_data(args: ParsedArgs, output: TextIO, *, as_json: bool) -> bool:
    """Write every record of the training data as the model will see it.

    Args:
        args: The request; a directory with a tokenizer is enough of a model.
        output: Where to.
        as_json: Whether to write one JSON object a line instead of text to read.

    Returns:
        Whether every record can be used.

    Raises:
        UserError: The data, the tokenizer or the template is not there.
    """
    directory = resolve_model_path(args.model.model_name_or_path, cache_dir=args.flags.cache_dir)
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    tokenizer = load_tokenizer(directory, model_max_length=args.flags.model_max_length)
    wraps = _settle(args, config, "mm_use_im_start_end")
    add_image_tokens(
        tokenizer,
        mm_use_im_start_end=wraps,
        mm_use_im_patch_token=_settle(args, config, "mm_use_im_patch_token"),
    )
    tokenize = SampleTokenizer(tokenizer, get_template(args.model.version), mm_use_im_start_end=wraps)
    summary = InspectionSummary()
    assert args.data.data_path is not None
    views = inspect_records(
        args.data.data_path,
        tokenize,
        num_image_tokens=_tokens_per_image(args, config, directory),
        model_max_length=args.flags.model_max_length,
        image_folder=args.data.image_folder,
        check_images=args.data.check_images,
        summary=summary,
    )
    for view in views:
        if as_json:
            output.write(json.dumps(view, ensure_ascii=False) + "\n")
        else:
            output.write(render_colored(view, tokenizer, color=has_color(output)) + "\n\n")
    if not as_json:
        output.write(summary.describe() + "\n")
    return summary.num_usable == summary.num_records


def _settle(args: ParsedArgs, config: dict[str, Any], key: str) -> Any:
    wish = getattr(args.model, key)
    return wish if wish is not None else config.get(key, ORIGINAL_DEFAULTS[key])


def _tokens_per_image(args: ParsedArgs, config: dict[str, Any], directory: Path) -> int | None:
    """Tokens of one image, if the vision tower's configuration can be read; None without one."""
    fields = None if args.model.vision_tower else config.get("mm_vision_config")
    name = args.model.vision_tower or config.get("mm_vision_tower")
    if fields is None and name is not None:
        tower = resolve_model_path(name, cache_dir=args.flags.cache_dir, relative_to=directory)
        fields = read_json(tower / CONFIG)
    if fields is None:
        return None
    vision = vision_fields(fields, str(name))
    return num_image_tokens(
        vision["image_size"], vision["patch_size"], _settle(args, config, "mm_vision_select_feature")
    )
