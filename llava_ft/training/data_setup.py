"""The data of a run, as its flags ask for it: records read and checked, and rows of batches made of them."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from transformers import PreTrainedTokenizerFast

from llava_ft.args import ParsedArgs
from llava_ft.data.build import BuiltDatasets, build_datasets
from llava_ft.data.collator import PackedCollator, PaddingCollator
from llava_ft.data.dataset import ConversationDataset
from llava_ft.data.images import ImageTransform
from llava_ft.data.sampler import steps_per_epoch
from llava_ft.data.sources.data_path import check_holds_out
from llava_ft.errors import UserError
from llava_ft.resolve import RunModel

if TYPE_CHECKING:
    from llava_ft.data.packing import RowDataset

Rows: TypeAlias = "ConversationDataset | RowDataset"
Collator = PaddingCollator | PackedCollator

logger = logging.getLogger(__name__)

DATA_REPORT: Final = "data_report.json"
COMPILED_LENGTH_MULTIPLE: Final = 128
"""Lengths of rows under `torch_compile`: tiles of matrix products on a GPU divide it."""


def prepare_datasets(run: RunModel) -> BuiltDatasets:
    """Read, prepare and check the records.

    Raises:
        UserError: The records, or the images they name, do not fit the request.
        RunError: They could not be prepared.
    """
    args, geometry, vision_directory = run.args, run.config.image_geometry, run.spec.vision_directory
    transform = None
    if vision_directory is not None:
        transform = ImageTransform.from_pretrained(vision_directory, geometry=geometry)
    plan = run.data_plan(goes_first=args.training.local_process_index == 0)
    logger.info("Conversation template: %s.", plan.tokenize.template.name)
    assert args.data.data_path is not None
    if args.training.eval_strategy != "no" and args.data.validation_data_path is None:
        check_holds_out(args.data.data_path)
    return build_datasets(
        args.data.data_path,
        plan,
        image_transform=transform,
        on_bad_sample=args.data.on_bad_sample,
        fast_decode=args.data.image_fast_decode,
        validation_path=args.data.validation_data_path,
        validation_fraction=args.data.validation_fraction,
        seed=data_seed(args),
    )


def arrange_rows(
    args: ParsedArgs, samples: ConversationDataset, tokenizer: PreTrainedTokenizerFast
) -> tuple[Rows, Collator]:
    """Return the rows of batches, one sample or several joined, and what makes a batch of several rows.

    Raises:
        UserError: They are too few for a step.
    """
    rows, collator = _choose_rows(args, samples, tokenizer.pad_token_id)
    training = args.training
    of_a_batch = training.per_device_train_batch_size * training.world_size
    if training.dataloader_drop_last and len(rows) < of_a_batch:
        raise UserError(
            f"dataloader_drop_last leaves out batches that are not full, and {len(rows)} rows do not fill one of "
            f"{training.per_device_train_batch_size} on each of {training.world_size} ranks: no step would be trained. "
            "Leave the flag out, or use a smaller per_device_train_batch_size."
        )
    return rows, collator


def _choose_rows(args: ParsedArgs, samples: ConversationDataset, pad_token_id: Any) -> tuple[Rows, Collator]:
    training, multiple = args.training, length_multiple(args)
    if not args.data.packing and not args.data.padding_free:
        return samples, PaddingCollator(pad_token_id, length_multiple=multiple)
    from llava_ft.data.packing import PackedDataset, RowDataset, one_each

    if args.data.padding_free:
        collator = PackedCollator(pad_token_id, flatten=True, length_multiple=multiple)
        return RowDataset(samples, one_each(len(samples))), collator
    max_length = args.flags.model_max_length
    packed = PackedDataset(samples, max_length, data_seed(args))
    logger.info(
        "Packing: %d samples in %d rows of %d tokens, %.1f%% of which hold a token; %d steps an epoch.",
        len(samples),
        len(packed),
        max_length,
        100 * packed.efficiency,
        steps_per_epoch(
            len(packed),
            training.per_device_train_batch_size,
            training.world_size,
            training.gradient_accumulation_steps,
            drop_last=training.dataloader_drop_last,
        ),
    )
    # Eager attention computes whole rows and masks them; every other kernel is told where samples begin.
    flatten = args.attn_implementation != "eager"
    return packed, PackedCollator(pad_token_id, row_length=max_length, flatten=flatten, length_multiple=multiple)


def length_multiple(args: ParsedArgs) -> int:
    """Return the number of which lengths of rows are multiples, 0 for none; each length may need a graph of its own."""
    if args.data.length_multiple is not None:
        return args.data.length_multiple
    return COMPILED_LENGTH_MULTIPLE if args.training.torch_compile else 0


def data_seed(args: ParsedArgs) -> int:
    """Return the seed of everything that orders or chooses records."""
    return args.training.seed if args.training.data_seed is None else args.training.data_seed


def write_data_report(datasets: BuiltDatasets, output_dir: Path) -> None:
    """Write what the checks before training found beside the run, as `data_report.json`."""
    content = {"train": datasets.report.to_dict()}
    if datasets.validation_report is not None:
        content["validation"] = datasets.validation_report.to_dict()
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / DATA_REPORT
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
