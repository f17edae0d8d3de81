"""What a run's flags ask for, from small files alone: where training, planning and looking at data begin alike."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.start import Start, find_start
from llava_ft.constants import CHECKPOINT_FIELDS
from llava_ft.conversation import get_template
from llava_ft.data.tokenize import SampleTokenizer
from llava_ft.data.tokenizer import add_image_tokens, load_tokenizer
from llava_ft.errors import CheckpointError
from llava_ft.models.builder import is_llava_config, settle_config, vision_fields
from llava_ft.models.config import LlavaModelConfig
from llava_ft.tuning.plan import TuningPlan

logger = logging.getLogger(__name__)


def start_of(args: ParsedArgs) -> Start | None:
    """Find what a run starts from; None if it starts from its base alone.

    Raises:
        UserError: It cannot start from that.
    """
    path, flag = args.flags.start
    if not path:
        return None
    flags = args.flags
    return find_start(path, flags.adapter_mode, trains_adapter=flags.lora_enable, flag=flag, cache_dir=flags.cache_dir)


def settle_base(args: ParsedArgs) -> ParsedArgs:
    """Fill in the base model that an earlier run names, where the request leaves it out.

    Raises:
        UserError: Nothing names it, or two different ones are named.
    """
    start = start_of(args)
    if start is None:
        return args
    name = start.base_name(args.model.model_name_or_path)
    if not args.model.model_name_or_path:
        logger.info("The base model is %s, as %s says.", name, start.path)
    return args.with_model(name)


def tuning_plan(args: ParsedArgs, *, has_vision: bool) -> TuningPlan:
    """Settle what a run trains.

    Raises:
        UserError: Nothing would be trained.
    """
    return TuningPlan.from_flags(
        lora_enable=args.flags.lora_enable,
        tune_mm_mlp_adapter=args.model.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=args.flags.freeze_mm_mlp_adapter,
        freeze_backbone=args.model.freeze_backbone,
        has_vision=has_vision,
        mm_projector_lr=args.flags.mm_projector_lr,
    )


def config_wishes(args: ParsedArgs, start: Start | None) -> dict[str, Any]:
    """Return the configuration fields that the flags set, and those that the start asks for beside them."""
    wishes: dict[str, Any] = {key: getattr(args.model, key, None) for key in CHECKPOINT_FIELDS}
    wishes |= {key: getattr(args.data, key) for key in ("image_aspect_ratio", "image_grid_pinpoints")}
    given = {key: wish for key, wish in wishes.items() if wish is not None}
    return given if start is None else start.wishes() | given


def config_from_files(
    args: ParsedArgs,
    start: Start | None,
    base: Mapping[str, Any],
    *,
    read_tower: Callable[[str], Mapping[str, Any]],
    projector_is_replaced: bool,
) -> LlavaModelConfig:
    """Settle the configuration of the run's model without looking at weights; `find_base` does it with them.

    Args:
        args: The request, its base settled.
        start: What the run starts from.
        base: Content of the base model's `config.json`.
        read_tower: Reads the `config.json` of a vision tower by its name.
        projector_is_replaced: Whether the projector may be of another type than the base's.

    Raises:
        UserError: A model is not supported, or a flag contradicts it.
    """
    name, asked = args.model.model_name_or_path, args.model.vision_tower
    tower = asked or (start.vision_tower if start is not None else None) or base.get("mm_vision_tower")
    vision: Mapping[str, Any] | None = None if asked else base.get("mm_vision_config")
    if vision is None and tower is None and is_llava_config(base):
        raise CheckpointError(
            f"{name} is a LLaVA checkpoint that does not name its vision tower. Give it with --vision_tower."
        )
    if vision is None and tower is not None:
        vision = read_tower(tower)
    return settle_config(
        base,
        name,
        wishes=config_wishes(args, start),
        vision_tower=tower,
        vision=None if vision is None else vision_fields(vision, str(tower or name)),
        projector_is_replaced=projector_is_replaced,
    )


def sample_tokenizer(args: ParsedArgs, config: LlavaModelConfig, directory: Path) -> SampleTokenizer:
    """Make what turns a run's records into ids and labels.

    Args:
        args: The request.
        config: The model's configuration, which says which tokens are added.
        directory: Where the tokenizer is.
    """
    tokenizer = load_tokenizer(directory, model_max_length=args.flags.model_max_length)
    add_image_tokens(
        tokenizer,
        mm_use_im_start_end=config.mm_use_im_start_end,
        mm_use_im_patch_token=config.mm_use_im_patch_token,
    )
    return SampleTokenizer(
        tokenizer,
        get_template(args.model.version),
        mm_use_im_start_end=config.mm_use_im_start_end,
        supervise=args.data.supervise,
    )
