"""A run, from a checked request to its result; whatever can be wrong is found before the first weight is read."""

import logging
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, set_seed

from llava_ft.args import ParsedArgs, to_yaml
from llava_ft.checkpoint.directory import absolute_or_hub_name
from llava_ft.checkpoint.overrides import collect_ignored
from llava_ft.checkpoint.restore import check_base
from llava_ft.checkpoint.resume import (
    IntegrityCheck,
    check_checkpoint,
    check_training_state,
    newest_complete_checkpoint,
    remove_staging,
)
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.image_processor import ImageProcessorSettings, PixelNormalizer
from llava_ft.data.sampler import EpochSampler
from llava_ft.errors import RunError, UserError
from llava_ft.resolve import force_of, resolve_model
from llava_ft.training.artifacts import RunArtifacts, lineage_of_run
from llava_ft.training.callbacks import LogLines, Progress, SetSamplerEpoch, StopOnSignal
from llava_ft.training.changed_settings import check_changes, note_changed_data
from llava_ft.training.data_setup import (
    Collator,
    Rows,
    arrange_rows,
    data_seed,
    prepare_datasets,
    write_data_report,
)
from llava_ft.training.distributed import (
    check_same_checkpoint,
    check_shared_output,
    is_communication_error,
    join_ranks,
    leave_ranks,
)
from llava_ft.training.log_setup import adopt_libraries
from llava_ft.training.model_setup import (
    check_bits,
    complete_config,
    compute_dtype,
    load_model_to_train,
    saves_tower,
    settle_attention,
)
from llava_ft.training.output_dir import check_output_dir, lock_output_dir
from llava_ft.training.speed import SpeedMeter, flops_of_run
from llava_ft.training.start_from import check_resumed_start, merge_start, put_start
from llava_ft.training.trainer import LlavaTrainer

logger = logging.getLogger(__name__)

_SECONDS_TO_FIND_THE_CAUSE = 30.0


@dataclass
class Run:
    """A run that is ready to start."""

    trainer: LlavaTrainer
    stop: StopOnSignal
    checkpoint: Path | None  # to resume from; None to start from the beginning
    datasets: BuiltDatasets


def run_training(args: ParsedArgs) -> bool:
    """Train as asked, as one rank of the run: join the others, train, save, and leave together.

    Returns:
        Whether the run reached its end; False if a signal stopped it after a complete checkpoint.

    Raises:
        UserError: The request cannot be carried out.
        RunError: The run failed.
    """
    watch = join_ranks(args)
    is_first = args.training.process_index == 0
    adopt_libraries()
    try:
        with lock_output_dir(args.training):
            stop = _train(args, is_first=is_first)
    except Exception as raised:
        error = _explained(raised)
        if watch is not None:
            if is_communication_error(error):
                watch.wait_for_cause(_SECONDS_TO_FIND_THE_CAUSE)
            if not watch.report(str(error)):
                logging.getLogger("llava_ft").setLevel(logging.CRITICAL)  # another rank has said it
        if error is raised:
            raise
        raise error from raised
    leave_ranks(watch)
    stop.release()
    finished = stop.received is None
    if finished and is_first:
        logger.info("Done. The result is in %s.", args.training.output_dir)
    return finished


def _explained(raised: Exception) -> Exception:
    """Return an error that says what to do for one that libraries raise, else the error itself."""
    if isinstance(raised, torch.OutOfMemoryError):
        return RunError(
            f"The GPU's memory is used up: {raised} `llava-ft plan` with the same flags shows what takes it and "
            "what to change: gradient_checkpointing (--fit chooses it), a smaller per_device_train_batch_size with "
            "more gradient_accumulation_steps, another ZeRO stage, or bits 4."
        )
    if isinstance(raised, RuntimeError) and (worker := re.match(r"DataLoader worker \(pid.*", str(raised))):
        return RunError(
            f"A process that reads data ended ({worker[0].strip()}). If it was killed, the machine's memory was most "
            "likely used up: use fewer dataloader_num_workers. Start the same command again to resume from the last "
            "checkpoint."
        )
    return raised


def _train(args: ParsedArgs, *, is_first: bool) -> StopOnSignal:
    """Train and save; returns what says whether a signal stopped the run, and has the signals still if one did."""
    _ = args.attn_implementation  # settles what `auto` means, and may add a note
    for note in args.notes:
        logger.info("%s", note)
    run = prepare_run(args)
    trainer = run.trainer
    if run.checkpoint is not None:
        logger.info("Resuming from %s.", run.checkpoint)
    if is_first:
        write_data_report(run.datasets, Path(args.training.output_dir or "."))
    try:
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except BaseException:
        if args.training.world_size == 1:
            run.stop.release()
        else:
            run.stop.ignore()  # a launcher ends the other ranks at once, and they have yet to say why
        raise
    if trainer.bad_samples:
        names = ", ".join(str(error) for error in trainer.bad_samples[:5])
        logger.warning("%d samples could not be read and were not trained on: %s", len(trainer.bad_samples), names)
    if run.stop.received is None:
        trainer.save_model()
        return run.stop
    step = trainer.state.global_step
    if is_first:
        logger.error(
            "Stopped by %s at step %d of %d. checkpoint-%d in %s is complete; start the same command again to resume "
            "from it.",
            *(run.stop.received, step, trainer.state.max_steps, step, args.training.output_dir),
        )
    return run.stop


def prepare_run(args: ParsedArgs) -> Run:
    """Find, check, load and connect everything a run needs.

    Raises:
        UserError: The request cannot be carried out.
        RunError: The adapter that the run starts from could not be merged.
    """
    with collect_ignored() as ignored, IntegrityCheck() as integrity:
        # What is resumed. All ranks agree on where they write before anything else: each looks for a checkpoint there.
        set_seed(args.training.seed)
        if args.training.should_save:
            remove_staging(Path(args.training.output_dir or "."))
        check_shared_output(args.training)
        checkpoint = choose_checkpoint(args)
        check_same_checkpoint(checkpoint, args.training.world_size)
        if checkpoint is not None and args.training.local_process_index == 0:
            integrity.start(checkpoint)
        check_bits(args, checkpoint)

        # The model: base, vision tower, tokenizer, where each weight lies, what is trained.
        run = resolve_model(args)
        check_output_dir(run, checkpoint)
        check_resumed_start(run, checkpoint)
        if checkpoint is not None:
            check_changes(run, checkpoint)
        request, start, tokenizer = run.args, run.start, run.tokenizer

        # The data. Records fail more often than fingerprints, and reading them takes no weights.
        run = replace(run, args=settle_attention(request, run.config))
        datasets = prepare_datasets(run)
        rows, collator = arrange_rows(run.args, datasets.train, tokenizer)

        # The base has to be the one that was trained on. What is to be merged into it is merged, which loads a model.
        run = merge_start(run)
        args, base, plan = run.args, run.spec, run.tuning
        if checkpoint is not None:
            check_base(checkpoint, base.fingerprint, str(base.directory.path), force=force_of(args))
        complete_config(args, base.config)

        # Damage is known before a weight is put. All files are read for it, while records and base were looked at.
        integrity.finish()

        # The weights. The vision cache is filled first, so that the tower and the model are never in memory together.
        # Compiling replaces forwards, which adapters and hooks must find in place.
        encodes_images = True
        if args.data.vision_cache is not None:
            from llava_ft.training.vision_cache import use_vision_cache

            encodes_images = not use_vision_cache(args, base, plan, datasets, compute_dtype(args))
        model = load_model_to_train(args, base, plan, num_new_rows=run.num_new_rows, encodes_images=encodes_images)
        if run.start is not None:
            put_start(args, run.start, model)
        if args.training.torch_compile:
            from llava_ft.training.compile import compile_layers

            backend, mode = args.training.torch_compile_backend, args.training.torch_compile_mode
            assert backend is not None
            count = compile_layers(model, backend=backend, mode=mode)
            logger.info("%d layers are compiled one by one, by %s, when they first run.", count, backend)

        # The trainer, and what every save writes.
        base_name = absolute_or_hub_name(args.model.model_name_or_path)
        artifacts = RunArtifacts(
            plan=plan,
            config=base.config,
            tokenizer=tokenizer,
            vision_directory=base.vision_directory,
            run_config=to_yaml(request),
            base=base_name,
            base_fingerprint=base.fingerprint,
            template=args.model.version,
            weights_format=args.flags.weights_format,
            compute_dtype=compute_dtype(args),
            lineage=lineage_of_run(request, datasets, start=start, checkpoint=checkpoint, ignored=ignored),
            save_vision_tower=saves_tower(args, base),
        )
        if checkpoint is not None:
            note_changed_data(checkpoint, artifacts.lineage["data"])
        speed = SpeedMeter(flops_of_run(model, base.config, runs_tower=encodes_images))
        stop = StopOnSignal()
        trainer = _make_trainer(args, model, artifacts, datasets, rows, collator, speed, stop)
        return Run(trainer, stop, checkpoint, datasets)


def choose_checkpoint(args: ParsedArgs) -> Path | None:
    """Choose what to resume from: what the user names, else the newest complete checkpoint of the output directory.

    Raises:
        UserError: The checkpoint named cannot be resumed from.
    """
    output_dir = Path(args.training.output_dir or ".")
    wish = args.training.resume_from_checkpoint
    if wish is not None and str(wish).lower() not in ("true", "false"):
        check_checkpoint(Path(wish))
        return Path(wish)
    if str(wish).lower() == "false":
        return None
    found = newest_complete_checkpoint(output_dir)
    if found is None and str(wish).lower() == "true":
        raise UserError(f"resume_from_checkpoint is true, but {output_dir} holds no complete checkpoint.")
    if found is not None:
        check_training_state(found)
    return found


def _make_trainer(
    args: ParsedArgs,
    model: nn.Module,
    artifacts: RunArtifacts,
    datasets: BuiltDatasets,
    rows: Rows,
    collator: Collator,
    speed: SpeedMeter,
    stop: StopOnSignal,
) -> LlavaTrainer:
    """Connect model, data and reports."""
    training, vision = args.training, artifacts.vision_directory
    strategy = str(getattr(training.train_sampling_strategy, "value", training.train_sampling_strategy))
    if args.flags.group_by_modality_length:
        strategy = "modality_length"
    sampler = EpochSampler(
        rows,
        strategy="length" if strategy == "group_by_length" else strategy,
        batch_size=training.per_device_train_batch_size,
        world_size=training.world_size * training.gradient_accumulation_steps,
        seed=data_seed(args),
    )
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False  # every trained parameter gets a gradient from every batch
    trainer = LlavaTrainer(
        model=model,
        args=training,
        artifacts=artifacts,
        train_sampler=sampler,
        describe_record=datasets.train.describe,
        loss_normalization=args.flags.loss_normalization,
        bad_sample_limit=args.flags.bad_sample_limit,
        pixel_normalizer=None if vision is None else PixelNormalizer(ImageProcessorSettings.from_pretrained(vision)),
        speed=speed,
        train_dataset=rows,
        eval_dataset=datasets.validation,
        data_collator=collator,
        callbacks=[stop, SetSamplerEpoch(sampler)],
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    shows_bar = sys.stderr.isatty() and not training.disable_tqdm
    trainer.add_callback(Progress() if shows_bar else LogLines())
    if training.report_to:
        from llava_ft.training.reporting import attach_reporters

        attach_reporters(trainer, args, lambda: artifacts.table)
    return trainer
