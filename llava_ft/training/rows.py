"""What a row of a training batch is: one padded sample, several packed ones, or the samples of the batch joined."""

import logging
from typing import Final

from llava_ft.args import ParsedArgs
from llava_ft.data.collator import PackedCollator, PaddingCollator
from llava_ft.data.dataset import ConversationDataset
from llava_ft.data.packing import PackedDataset, RowDataset, one_each
from llava_ft.data.sampler import steps_per_epoch

logger = logging.getLogger(__name__)

COMPILED_LENGTH_MULTIPLE: Final = 128
"""Lengths of rows under `torch_compile`: tiles of matrix products on a GPU divide it."""


def arrange_rows(
    args: ParsedArgs, samples: ConversationDataset, pad_token_id: int
) -> tuple[ConversationDataset | RowDataset, PaddingCollator | PackedCollator]:
    """Decide what a row of a batch is.

    Args:
        args: The request.
        samples: What is trained on.
        pad_token_id: Vocabulary entry in what no sample fills.

    Returns:
        Rows, and what makes a batch of several.
    """
    training, multiple = args.training, length_multiple(args)
    if args.data.padding_free:
        collator = PackedCollator(pad_token_id, flatten=True, length_multiple=multiple)
        return RowDataset(samples, one_each(len(samples))), collator
    if not args.data.packing:
        return samples, PaddingCollator(pad_token_id, length_multiple=multiple)
    max_length = args.flags.model_max_length
    packed = PackedDataset(samples, max_length, training.data_seed if training.data_seed is not None else training.seed)
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
