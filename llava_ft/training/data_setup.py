"""The data sets of a run, as its flags ask for them."""

import json
import logging
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerFast

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.base import BaseModel
from llava_ft.conversation import get_template
from llava_ft.data.build import BuiltDatasets, build_datasets
from llava_ft.data.images import ImageTransform
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.sources.mixture import check_holds_out
from llava_ft.data.tokenize import SampleTokenizer

logger = logging.getLogger(__name__)

DATA_REPORT: Final = "data_report.json"


def prepare_datasets(args: ParsedArgs, base: BaseModel, tokenizer: PreTrainedTokenizerFast) -> BuiltDatasets:
    """Read, prepare and check the records.

    Raises:
        UserError: The records, or the images they name, do not fit the request.
        RunError: They could not be prepared.
    """
    geometry = base.config.image_geometry
    transform = None
    if base.vision_directory is not None:
        transform = ImageTransform.from_pretrained(base.vision_directory, geometry=geometry)
    template = get_template(args.model.version)
    logger.info("Conversation template: %s.", template.name)
    assert args.data.data_path is not None
    if args.training.eval_strategy != "no" and args.data.validation_data_path is None:
        check_holds_out(args.data.data_path)
    return build_datasets(
        args.data.data_path,
        tokenize=SampleTokenizer(
            tokenizer,
            template,
            mm_use_im_start_end=base.config.mm_use_im_start_end,
            supervise=args.data.supervise,
        ),
        image_transform=transform,
        image_folder=args.data.image_folder,
        geometry=geometry,
        model_max_length=args.flags.model_max_length,
        truncation=args.data.truncation,
        on_bad_sample=args.data.on_bad_sample,
        check_images=args.data.check_images,
        exif_transpose=args.data.image_exif_transpose,
        fast_decode=args.data.image_fast_decode,
        validation_path=args.data.validation_data_path,
        validation_fraction=args.data.validation_fraction,
        seed=args.training.data_seed if args.training.data_seed is not None else args.training.seed,
        preparation=preparation_settings(args, goes_first=args.training.local_process_index == 0),
    )


def preparation_settings(args: ParsedArgs, *, goes_first: bool = True) -> PreparationSettings:
    """Settle where prepared records are kept, and how many processes prepare them.

    Args:
        args: The request.
        goes_first: Whether this process begins at once, or lets another one of its machine go first.
    """
    cache_dir = Path(args.data.data_cache_dir) if args.data.data_cache_dir else None
    return PreparationSettings(cache_dir, args.data.preprocessing_num_workers, goes_first)


def write_data_report(datasets: BuiltDatasets, output_dir: Path) -> Path:
    """Write what the checks before training found beside the run.

    Args:
        datasets: The data sets, with their reports.
        output_dir: Directory of the run.

    Returns:
        The file, `data_report.json`.
    """
    content = {"train": datasets.report.to_dict()}
    if datasets.validation_report is not None:
        content["validation"] = datasets.validation_report.to_dict()
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / DATA_REPORT
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return unfinished.replace(path)
