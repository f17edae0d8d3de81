"""`llava-ft train`: one rank's part of a run, from joining the others to leaving them."""

import logging
from pathlib import Path

import torch

from llava_ft.args import ParsedArgs
from llava_ft.errors import RunError
from llava_ft.training.data_setup import write_data_report
from llava_ft.training.distributed import Ranks, is_communication_error, join_ranks, leave_ranks
from llava_ft.training.log_setup import adopt_libraries
from llava_ft.training.setup import prepare_run
from llava_ft.training.start_from import MergesAdapter

logger = logging.getLogger(__name__)

_SECONDS_TO_FIND_THE_CAUSE = 30.0


def run_training(args: ParsedArgs, merge: MergesAdapter | None = None) -> bool:
    """Train as asked.

    Args:
        args: The request.
        merge: How an adapter is merged, for `adapter_mode=merge_first`.

    Returns:
        Whether the run reached its end; False if a signal stopped it after a complete checkpoint.

    Raises:
        UserError: The request cannot be carried out.
        RunError: The run failed.
    """
    ranks, watch = join_ranks(args)
    adopt_libraries()
    try:
        finished = _train(args, ranks, merge)
    except Exception as raised:
        error = _in_plain_words(raised)
        if watch is not None:
            if is_communication_error(error):
                watch.wait_for_cause(_SECONDS_TO_FIND_THE_CAUSE)
            if not watch.report(str(error)):
                logging.getLogger("llava_ft").setLevel(logging.CRITICAL)  # another rank has said it
        if error is raised:
            raise
        raise error from raised
    leave_ranks(watch)
    if finished and ranks.is_first:
        logger.info("Done. The result is in %s.", args.training.output_dir)
    return finished


def _train(args: ParsedArgs, ranks: Ranks, merge: MergesAdapter | None) -> bool:
    _ = args.attn_implementation
    for note in args.notes:
        logger.info("%s", note)
    run = prepare_run(args, merge)
    if run.checkpoint is not None:
        logger.info("Resuming from %s.", run.checkpoint)
    if ranks.is_first:
        write_data_report(run.datasets, Path(args.training.output_dir or "."))
    trainer = run.trainer
    try:
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except BaseException:
        if ranks.world_size > 1:
            run.stop.ignore()  # a launcher ends the other ranks at once, and they have yet to say why
        else:
            run.stop.release()
        raise
    run.stop.release()
    if trainer.bad_samples:
        names = ", ".join(str(error) for error in trainer.bad_samples[:5])
        logger.warning("%d samples could not be read and were not trained on: %s", len(trainer.bad_samples), names)
    if run.stop.received is None:
        trainer.save_model()
        return True
    step = trainer.state.global_step
    if ranks.is_first:
        logger.error(
            "Stopped by %s at step %d of %d. checkpoint-%d in %s is complete; start the same command again to resume "
            "from it.",
            run.stop.received,
            step,
            trainer.state.max_steps,
            step,
            args.training.output_dir,
        )
    return False


def _in_plain_words(error: Exception) -> Exception:
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    return RunError(
        f"The GPU's memory is used up: {error} `llava-ft plan` with the same flags shows what takes it and what to "
        "change: gradient_checkpointing (--fit chooses it), a smaller per_device_train_batch_size with more "
        "gradient_accumulation_steps, another ZeRO stage, or bits 4."
    )
