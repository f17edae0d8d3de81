"""How a run reads its data: what looking at data takes of a request. No weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.samples import DataPlan
from llava_ft.data.preparation.truncation import Limits

if TYPE_CHECKING:
    from llava_ft.args import ParsedArgs


def find_data_plan(args: "ParsedArgs", num_processes: int | None = None) -> DataPlan:
    """Settle how a run reads its data - tokenizer, template, geometry - from small files alone.

    A directory with a tokenizer is enough of a model. `num_processes` read, tokenise and decode; None leaves their
    number to the request.

    Raises:
        UserError: A file is missing or damaged, or the request contradicts it.
    """
    # Imported here: processes that decode images read a `DataPlan` from a pipe, and do without PyTorch.
    from llava_ft.resolve import resolve_model

    run = resolve_model(args, need="tokenizer")
    geometry = run.config.image_geometry
    needs_sizes = geometry is not None and geometry.needs_image_sizes
    return DataPlan(
        run.tokenize,
        Limits(geometry, args.flags.model_max_length, args.data.truncation),
        ImageChecks(args.data.check_images, needs_sizes, args.data.image_exif_transpose),
        args.data.image_folder,
        PreparationSettings(
            Path(args.data.data_cache_dir) if args.data.data_cache_dir else None,
            num_processes or args.data.preprocessing_num_workers,
        ),
    )
