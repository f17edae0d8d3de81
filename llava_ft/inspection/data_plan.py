"""How a run reads its data: what looking at data takes of a request. No weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.preparation.truncation import Limits

if TYPE_CHECKING:
    from llava_ft.args import ParsedArgs

_UNKNOWN_MODEL: Final[dict[str, Any]] = {"model_type": "llama"}
"""Stands in for the `config.json` of a directory that has a tokenizer alone."""


def find_data_plan(args: "ParsedArgs", num_processes: int | None = None) -> DataPlan:
    """Settle how a run reads its data - tokenizer, template, geometry - from small files alone.

    A directory with a tokenizer is enough of a model. `num_processes` read, tokenise and decode; None leaves their
    number to the request.

    Raises:
        UserError: A file is missing or damaged, or the request contradicts it.
    """
    # Imported here: processes that decode images read a `DataPlan` from a pipe, and do without PyTorch.
    from llava_ft.checkpoint.directory import read_config, resolve_model_path
    from llava_ft.checkpoint.names import CONFIG
    from llava_ft.checkpoint.weights import read_json
    from llava_ft.resolve import config_from_files, sample_tokenizer, settle_base, start_of

    args, start = settle_base(args), start_of(args)
    directory = resolve_model_path(args.model.model_name_or_path, cache_dir=args.flags.cache_dir)

    def read_tower(name: str) -> dict[str, Any]:
        tower = resolve_model_path(name, cache_dir=args.flags.cache_dir, relative_to=directory)
        return read_json(tower / CONFIG)

    config = config_from_files(
        args,
        start,
        read_config(directory)[0] if (directory / CONFIG).is_file() else _UNKNOWN_MODEL,
        read_tower=read_tower,
        projector_is_replaced=True,  # no weights are read, so none can contradict the type
    )
    geometry = config.image_geometry
    needs_sizes = geometry is not None and geometry.needs_image_sizes
    return DataPlan(
        sample_tokenizer(args, config, directory),
        Limits(geometry, args.flags.model_max_length, args.data.truncation),
        ImageChecks(args.data.check_images, needs_sizes, args.data.image_exif_transpose),
        args.data.image_folder,
        PreparationSettings(
            Path(args.data.data_cache_dir) if args.data.data_cache_dir else None,
            num_processes or args.data.preprocessing_num_workers,
        ),
    )
