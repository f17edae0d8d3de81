"""The model of a run: weights loaded once, in the dtype they are held in; adapters added; what is trained marked."""

import logging
from pathlib import Path

import torch
from torch import nn

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.directory import absolute_or_hub_name
from llava_ft.checkpoint.model import ModelSpec, load_base
from llava_ft.checkpoint.names import EMBEDDINGS, HEAD
from llava_ft.checkpoint.quantized import quantization_in_training
from llava_ft.checkpoint.save import result_kind
from llava_ft.errors import UserError
from llava_ft.models.attention.kernels import fitting_kernel, limit
from llava_ft.models.config import LlavaModelConfig
from llava_ft.training.distributed import zero_division
from llava_ft.training.fragments import gathered
from llava_ft.tuning.kernels import why_not_fast
from llava_ft.tuning.lora import add_lora
from llava_ft.tuning.plan import TuningPlan
from llava_ft.tuning.quant import Quantization, check_quantization
from llava_ft.tuning.recompute import Recomputation, recompute_activations

logger = logging.getLogger(__name__)


def load_model_to_train(
    args: ParsedArgs, base: ModelSpec, plan: TuningPlan, *, num_new_rows: int, encodes_images: bool = True
) -> nn.Module:
    """Load the weights, make trainable what the plan says, and let layers recompute what the flags say.

    A run that does not encode images is given features of them; the tower is loaded then only if it is to be saved.
    """
    dtype = compute_dtype(args)
    # DeepSpeed keeps float32 master values in its optimizer, and the model's own in the compute dtype.
    master_dtype = dtype if args.training.deepspeed else torch.float32
    model, ledger = load_base(
        base,
        num_new_rows=num_new_rows,
        dtype_of=lambda name: plan.dtype_of(name, dtype, master_dtype),
        device=args.training.device,
        attn_implementation=args.attn_implementation,
        quantization=quantization_of(args),
        division=zero_division(args.training),
        with_tower=encodes_images or (result_kind(plan) == "full" and saves_tower(args, base)),
    )
    model.runs_tower = encodes_images
    ledger.log()
    with gathered([model.get_parameter(EMBEDDINGS), model.get_parameter(HEAD)] if num_new_rows else []):
        plan.separate_new_rows(model, num_new_rows)
    result: nn.Module = model
    if plan.has_lora:
        if args.flags.fast_lora and (reason := why_not_fast(model.config)):
            logger.info("fast_lora has no effect: %s. PEFT's modules compute the same, with more memory.", reason)
        result = add_lora(
            model,
            r=args.flags.lora_r,
            alpha=args.flags.lora_alpha,
            dropout=args.flags.lora_dropout,
            bias=args.flags.lora_bias,
            leaf_names=args.flags.lora_target_modules,
            layers=plan.of("model.layers").layers,
            fast=args.flags.fast_lora,
            base_model_name=absolute_or_hub_name(args.model.model_name_or_path),
        )
    plan.apply(result)
    for parameter in result.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(master_dtype)
    model.config.use_cache = False
    recompute_activations(result, recomputation_of(args), options=args.flags.gradient_checkpointing_kwargs)
    return result


def settle_attention(args: ParsedArgs, config: LlavaModelConfig) -> ParsedArgs:
    """Return the request with a kernel that goes with the model: where `auto` took one that does not, another.

    Raises:
        UserError: A kernel was named that does not.
    """
    kernel = args.attn_implementation
    fitting = fitting_kernel(kernel, config, is_named=args.model.attn_implementation != "auto")
    if fitting == kernel:
        return args
    reason = limit(kernel, config)
    logger.info("attn_implementation=auto takes %s instead of %s for this model: %s.", fitting, kernel, reason)
    return args.with_attention(fitting)


def check_bits(args: ParsedArgs, checkpoint: Path | None) -> None:
    """Refuse quantised weights where they cannot be trained on, and other ones than a checkpoint was trained on.

    Raises:
        UserError: They cannot, or they are.
    """
    wanted = quantization_of(args)
    check_quantization(wanted, zero_stage=3 if zero_division(args.training) is not None else 0)
    if checkpoint is None:
        return
    before = quantization_in_training(checkpoint)
    if before != wanted:
        raise UserError(
            f"{checkpoint} was trained with the language model in {before or '16 bits'}, and this run asks for "
            f"{wanted or '16 bits'}. Use the same bits, quant_type and double_quant; to go on from its weights with "
            "others, start a new run with --lora_weight_path or --pretrain_mm_mlp_adapter."
        )


def complete_config(args: ParsedArgs, config: LlavaModelConfig) -> None:
    """Note in config.json what original LLaVA notes there, and the template."""
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


def recomputation_of(args: ParsedArgs) -> Recomputation:
    """What the flags ask to be computed again; logs what this run makes no use of."""
    flags = args.flags
    if flags.activation_offload and args.training.device.type == "cpu":
        logger.info("activation_offload has no effect: the CPU is used, whose memory is the host's.")
    if flags.gradient_checkpointing == "selective" and args.training.torch_compile:
        logger.info(
            "gradient_checkpointing=selective is left to torch_compile, which decides itself what a layer keeps."
        )
    return Recomputation.of_run(
        flags.gradient_checkpointing,
        flags.gradient_checkpointing_every,
        offload=flags.activation_offload,
        is_compiled=args.training.torch_compile,
    )


def saves_tower(args: ParsedArgs, base: ModelSpec) -> bool:
    """Whether a whole model is written with its tower: if asked for, and if nothing else has the base's."""
    return args.flags.save_vision_tower or base.holds_vision_tower


def compute_dtype(args: ParsedArgs) -> torch.dtype:
    """The type in which frozen weights are held and matrix products computed."""
    return torch.bfloat16 if args.training.bf16 else torch.float16 if args.training.fp16 else torch.float32


def quantization_of(args: ParsedArgs) -> Quantization | None:
    """How the language model's linear layers are held; None in 16 bits."""
    return Quantization.from_flags(args.flags.bits, args.flags.quant_type, args.flags.double_quant)
