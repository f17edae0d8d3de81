"""What looking at data takes of a model: tokenizer, template and how many tokens an image has. No weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.directory import read_config, resolve_model_path
from llava_ft.checkpoint.names import CONFIG
from llava_ft.checkpoint.start import Start
from llava_ft.checkpoint.weights import read_json
from llava_ft.conversation import get_template
from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.truncation import Limits
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer
from llava_ft.inspection.data_plan import DataPlan
from llava_ft.models.config import LlavaLlamaConfig
from llava_ft.resolve import config_from_files, settle_base, start_of
from llava_ft.training.data_setup import preparation_settings

_UNKNOWN_MODEL: Final[dict[str, Any]] = {"model_type": "llama"}
"""Stands in for the `config.json` of a directory that has a tokenizer alone."""


def find_data_plan(args: ParsedArgs, num_processes: int | None = None) -> DataPlan:
    """Settle how a run reads its data - tokenizer, template, geometry - from small files alone.

    Args:
        args: The request; a directory with a tokenizer is enough of a model.
        num_processes: Processes that read, tokenise and decode; None leaves it to the request.

    Raises:
        UserError: A file is missing or damaged, or the request contradicts it.
    """
    args, start = settle_base(args), start_of(args)
    directory = resolve_model_path(args.model.model_name_or_path, cache_dir=args.flags.cache_dir)
    config = _find_config(args, directory, start)
    tokenizer = load_tokenizer(directory, model_max_length=args.flags.model_max_length)
    add_image_tokens(
        tokenizer,
        mm_use_im_start_end=config.mm_use_im_start_end,
        mm_use_im_patch_token=config.mm_use_im_patch_token,
    )
    tokenize = SampleTokenizer(
        tokenizer,
        get_template(args.model.version),
        mm_use_im_start_end=config.mm_use_im_start_end,
        supervise=args.data.supervise,
    )
    geometry = config.image_geometry
    needs_sizes = geometry is not None and geometry.needs_image_sizes
    preparation = preparation_settings(args)
    if num_processes is not None:
        preparation = replace(preparation, num_processes=num_processes)
    return DataPlan(
        tokenize,
        Limits(geometry, args.flags.model_max_length, args.data.truncation),
        ImageChecks(args.data.check_images, needs_sizes, args.data.image_exif_transpose),
        args.data.image_folder,
        preparation,
    )


def _find_config(args: ParsedArgs, directory: Path, start: Start | None) -> LlavaLlamaConfig:
    def read_tower(name: str) -> dict[str, Any]:
        tower = resolve_model_path(name, cache_dir=args.flags.cache_dir, relative_to=directory)
        return read_json(tower / CONFIG)

    return config_from_files(
        args,
        start,
        read_config(directory)[0] if (directory / CONFIG).is_file() else _UNKNOWN_MODEL,
        read_tower=read_tower,
        projector_is_replaced=True,  # no weights are read, so none can contradict the type
    )
