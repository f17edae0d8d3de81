"""The loss on validation records: summed over tokens and ranks, each record counted once."""

import logging

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from llava_ft.constants import IGNORE_INDEX

logger = logging.getLogger(__name__)


def sum_losses(trainer: Trainer, dataloader: DataLoader) -> tuple[float, float, int]:
    """Sum the loss of a data set over its supervised tokens.

    Ranks take turns batch by batch, and the last batches are filled up with the first records so that all ranks have as
    many; those are left out of the sums.

    Args:
        trainer: Prepares the batches and runs the model.
        dataloader: The records in order.

    Returns:
        Summed loss, supervised tokens, and records, of all ranks.
    """
    model, args = trainer.model, trainer.args
    assert isinstance(model, nn.Module)
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=args.device)
    num_records = trainer.num_examples(dataloader)
    for number, batch in enumerate(dataloader):
        for error in batch.get("bad_samples", []):
            logger.warning("Not evaluated on: %s", error)
        inputs = trainer._prepare_inputs(batch)
        labels = inputs["labels"]
        first = (number * args.world_size + args.process_index) * args.eval_batch_size
        num_new = max(0, min(len(labels), num_records - first))
        labels[num_new:] = IGNORE_INDEX
        supervised = (labels[:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad(), trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = model(**inputs, num_items_in_batch=1).loss
        totals += torch.stack([loss.double(), supervised.double(), supervised.new_tensor(num_new).double()])
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
    if args.world_size > 1:
        torch.distributed.all_reduce(totals)
    model.train(was_training)
    total, tokens, samples = totals.tolist()
    return total, tokens, int(samples)
