"""From a checked request to a trainer: everything that can be wrong is found before the first weight is read."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, ProgressCallback, set_seed

from llava_ft.args import ParsedArgs, to_yaml
from llava_ft.checkpoint.base import BaseModel, check_added_tokens
from llava_ft.checkpoint.base_and_adapters import quantization_in_training
from llava_ft.checkpoint.directory import absolute_or_hub_name
from llava_ft.checkpoint.fingerprint import language_model_fingerprint
from llava_ft.checkpoint.overrides import collect_ignored
from llava_ft.checkpoint.restore import check_base
from llava_ft.checkpoint.resume import (
    check_checkpoint,
    check_training_state,
    newest_complete_checkpoint,
    remove_staging,
)
from llava_ft.data.build import BuiltDatasets
from llava_ft.data.image_processor import ImageProcessorSettings, PixelNormalizer
from llava_ft.data.sampler import EpochSampler
from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer
from llava_ft.errors import UserError
from llava_ft.resolve import settle_base, start_of
from llava_ft.training.artifacts import RunArtifacts
from llava_ft.training.attention import settle_attention
from llava_ft.training.callbacks import LogLines, Progress, SetSamplerEpoch, StopOnSignal
from llava_ft.training.compile import compile_layers
from llava_ft.training.data_setup import prepare_datasets
from llava_ft.training.model_setup import compute_dtype, load_model_to_train, quantization_of, saves_tower
from llava_ft.training.reporting import attach_reporters
from llava_ft.training.rows import arrange_rows
from llava_ft.training.run_lineage import lineage_writer
from llava_ft.training.shared_output import check_same_checkpoint, check_shared_output
from llava_ft.training.speed import SpeedMeter, flops_of_run
from llava_ft.training.start_from import (
    MergesAdapter,
    check_resumed_start,
    check_start,
    find_model,
    force_of,
    merged_base,
    put_start,
)
from llava_ft.training.trainer import LlavaTrainer
from llava_ft.training.vision_cache import use_vision_cache
from llava_ft.tuning.freeze import TuningPlan
from llava_ft.tuning.quant import check_quantization

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run that is ready to start.

    Attributes:
        trainer: The trainer.
        stop: The callback that ends the run on a signal.
        checkpoint: The checkpoint to resume from, or None to start from the beginning.
        datasets: What is trained on, with the report of what was left out.
    """

    trainer: LlavaTrainer
    stop: StopOnSignal
    checkpoint: Path | None
    datasets: BuiltDatasets


def prepare_run(args: ParsedArgs, merge: MergesAdapter | None = None) -> Run:
    """Find, check, load and connect everything a run needs.

    Args:
        args: The request.
        merge: How an adapter is merged, for `adapter_mode=merge_first`.

    Raises:
        UserError: The request cannot be carried out.
        RunError: The adapter that the run starts from could not be merged.
    """
    with collect_ignored() as ignored:
        return _prepare_run(settle_base(args), merge, ignored)


def _prepare_run(args: ParsedArgs, merge: MergesAdapter | None, ignored: Sequence[str]) -> Run:
    request, start = args, start_of(args)
    set_seed(args.training.seed)
    check_shared_output(args.training)
    checkpoint = choose_checkpoint(args)
    check_same_checkpoint(checkpoint, args.training.world_size)
    _check_bits(args, checkpoint)
    check_resumed_start(args, start, checkpoint)
    base = find_model(args, start)
    args = settle_attention(args, base.config)
    tokenizer = load_tokenizer(base.directory.path, model_max_length=args.flags.model_max_length)
    num_added = add_image_tokens(
        tokenizer,
        mm_use_im_start_end=base.config.mm_use_im_start_end,
        mm_use_im_patch_token=base.config.mm_use_im_patch_token,
    )
    check_added_tokens(base, len(tokenizer), num_added)
    datasets = prepare_datasets(args, base, tokenizer)
    plan = _tuning_plan(args, has_vision=base.config.mm_vision_config is not None)
    fingerprint = language_model_fingerprint(base.sources[:1])
    if start is not None:
        check_start(args, start, fingerprint, base)
        if start.mode == "merge_first":
            args = args.with_model(str(merged_base(args, start, merge)))
            base = find_model(args, None)
            fingerprint = language_model_fingerprint(base.sources[:1])
    if checkpoint is not None:
        check_base(checkpoint, fingerprint, str(base.directory.path), force=force_of(args))
    _complete_config(args, base)
    encodes_images = not use_vision_cache(args, base, plan, datasets, compute_dtype(args))
    num_new_rows = max(0, len(tokenizer) - base.config.vocab_size)
    model = load_model_to_train(args, base, plan, num_new_rows=num_new_rows, encodes_images=encodes_images)
    if start is not None and start.mode != "merge_first":
        put_start(args, start, model)
    if args.training.torch_compile:
        _compile(args, model)
    peft_config = getattr(model, "peft_config", None)
    base_name = absolute_or_hub_name(args.model.model_name_or_path)
    artifacts = RunArtifacts(
        method=plan.method,
        config=base.config,
        tokenizer=tokenizer,
        vision_directory=base.vision_directory,
        run_config=to_yaml(request),
        base=base_name,
        base_fingerprint=fingerprint,
        template=args.model.version,
        weights_format=args.flags.weights_format,
        compute_dtype=compute_dtype(args),
        write_lineage=lineage_writer(
            request, (base_name, fingerprint), datasets, start=start, checkpoint=checkpoint, ignored=ignored
        ),
        save_vision_tower=saves_tower(args, base),
        lora_config=peft_config["default"] if peft_config else None,
    )
    speed = SpeedMeter(flops_of_run(model, base.config, runs_tower=encodes_images))
    trainer, stop = _build_trainer(args, model, artifacts, tokenizer, datasets, speed)
    return Run(trainer, stop, checkpoint, datasets)


def _compile(args: ParsedArgs, model: nn.Module) -> None:
    training = args.training
    backend, mode = training.torch_compile_backend, training.torch_compile_mode
    assert backend is not None
    count = compile_layers(model, backend=backend, mode=mode)
    logger.info("%d layers are compiled one by one, by %s, when they first run.", count, backend)


def choose_checkpoint(args: ParsedArgs) -> Path | None:
    """Choose what to resume from: what the user names, else the newest complete checkpoint of the output directory.

    Raises:
        UserError: The checkpoint named cannot be resumed from.
    """
    output_dir = Path(args.training.output_dir or ".")
    if args.training.process_index == 0:
        remove_staging(output_dir)
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


def _build_trainer(
    args: ParsedArgs,
    model: nn.Module,
    artifacts: RunArtifacts,
    tokenizer: PreTrainedTokenizerFast,
    datasets: BuiltDatasets,
    speed: SpeedMeter,
) -> tuple[LlavaTrainer, StopOnSignal]:
    training, vision = args.training, artifacts.vision_directory
    strategy = "modality_length" if args.flags.group_by_modality_length else _strategy(args)
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    train_dataset, collator = arrange_rows(args, datasets.train, pad)
    sampler = EpochSampler(
        train_dataset,
        strategy=strategy,
        batch_size=training.per_device_train_batch_size,
        world_size=training.world_size * training.gradient_accumulation_steps,
        seed=training.data_seed if training.data_seed is not None else training.seed,
    )
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False  # every trained parameter gets a gradient from every batch
    stop = StopOnSignal()
    trainer = LlavaTrainer(
        model=model,
        args=training,
        artifacts=artifacts,
        train_sampler=sampler,
        describe_record=datasets.train.describe,
        loss_normalization=args.flags.loss_normalization,
        mm_projector_lr=args.flags.mm_projector_lr,
        bad_sample_limit=args.flags.bad_sample_limit,
        pixel_normalizer=None if vision is None else PixelNormalizer(ImageProcessorSettings.from_pretrained(vision)),
        speed=speed,
        train_dataset=train_dataset,
        eval_dataset=datasets.validation,
        data_collator=collator,
        callbacks=[stop, SetSamplerEpoch(sampler)],
    )
    for default in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(default)
    shows_bar = sys.stderr.isatty() and not training.disable_tqdm
    trainer.add_callback(Progress() if shows_bar else LogLines())
    attach_reporters(trainer, args, lambda: artifacts.table)
    return trainer, stop


def _tuning_plan(args: ParsedArgs, *, has_vision: bool) -> TuningPlan:
    return TuningPlan.from_flags(
        lora_enable=args.flags.lora_enable,
        tune_mm_mlp_adapter=args.model.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=args.flags.freeze_mm_mlp_adapter,
        freeze_backbone=args.model.freeze_backbone,
        has_vision=has_vision,
    )


def _strategy(args: ParsedArgs) -> str:
    names = {"random": "random", "sequential": "sequential", "group_by_length": "length"}
    return names[str(getattr(args.training.train_sampling_strategy, "value", args.training.train_sampling_strategy))]


def _complete_config(args: ParsedArgs, base: BaseModel) -> None:
    """Note in config.json what original LLaVA notes there, and the template."""
    config = base.config
    config.tune_mm_mlp_adapter = args.model.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = args.flags.freeze_mm_mlp_adapter
    config.mm_projector_lr = args.flags.mm_projector_lr
    config.tokenizer_model_max_length = args.flags.model_max_length
    config.tokenizer_padding_side = "right"
    config.conversation_template = args.model.version
    if config.mm_vision_tower is not None:
        config.mm_vision_tower = absolute_or_hub_name(config.mm_vision_tower)
    if args.flags.model_max_length > config.max_position_embeddings:
        logger.warning(
            "model_max_length is %d, but the model was trained with at most %d positions.",
            args.flags.model_max_length,
            config.max_position_embeddings,
        )


def _check_bits(args: ParsedArgs, checkpoint: Path | None) -> None:
    """Refuse quantised weights where they cannot be trained on, and other ones than a checkpoint was trained on."""
    wanted = quantization_of(args)
    deepspeed = getattr(args.training, "hf_deepspeed_config", None)  # transformers sets it only with DeepSpeed
    check_quantization(wanted, zero_stage=3 if deepspeed is not None and deepspeed.is_zero3() else 0)
    if checkpoint is None:
        return
    before = quantization_in_training(checkpoint)
    if before != wanted:
        raise UserError(
            f"{checkpoint} was trained with the language model in {before or '16 bits'}, and this run asks for "
            f"{wanted or '16 bits'}. Use the same bits, quant_type and double_quant; to go on from its weights with "
            "others, start a new run with --lora_weight_path or --pretrain_mm_mlp_adapter."
        )
