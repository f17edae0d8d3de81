"""Starting a run from an earlier one: which model it is, which weights win, and what is restored before the first step.

`checkpoint/start.py` knows what an earlier result holds; here it meets the flags of a run.
"""

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.base import BaseModel, find_base
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.lineage import describe_parent, read_lineage
from llava_ft.checkpoint.manifest import MERGED_BASE, what_is_incomplete
from llava_ft.checkpoint.names import NEW_ROWS_SUFFIX, NON_LORA_BIN, plain_name
from llava_ft.checkpoint.overrides import Force, force_from_flags, refuse_unless
from llava_ft.checkpoint.restore import restore_trained
from llava_ft.checkpoint.start import Start
from llava_ft.errors import UserError
from llava_ft.models.parts import LANGUAGE_MODEL, module_part
from llava_ft.resolve import config_wishes
from llava_ft.training.distributed import wait_for_first
from llava_ft.training.fragments import gathered, value_setter

logger = logging.getLogger(__name__)


def force_of(args: ParsedArgs) -> Force:
    """Return what the run passes over."""
    return force_from_flags(args.flags.force, args.flags.allow_base_mismatch)


def find_model(args: ParsedArgs, start: Start | None) -> BaseModel:
    """Find the model's files and settle its configuration, from the request and what the run starts from.

    Raises:
        UserError: Something is missing, damaged or does not fit together.
    """
    wishes = config_wishes(args, start)
    if start is None:
        return find_base(
            args.model.model_name_or_path,
            vision_tower=args.model.vision_tower,
            projector_file=args.model.pretrain_mm_mlp_adapter,
            wishes=wishes,
            cache_dir=args.flags.cache_dir,
        )
    start.check_adapter({"r": args.flags.lora_r, "lora_alpha": args.flags.lora_alpha}, force=force_of(args))
    base = find_base(
        args.model.model_name_or_path,
        vision_tower=args.model.vision_tower or start.vision_tower,
        projector_file=args.model.pretrain_mm_mlp_adapter or start.projector_file,
        wishes=wishes,
        extra_sources=start.sources(force=force_of(args)),
        cache_dir=args.flags.cache_dir,
    )
    start.check_newline(base)
    if start.has_adapter and base.projector_is_new and start.vision_tower is not None:
        refuse_unless(
            force_of(args) is True,
            f"The projector that the adapter in {start.path} was trained with is neither in {NON_LORA_BIN} nor in "
            f"{base.directory.path}; a new one would take its place.",
            "If it was frozen in that run, give it with --pretrain_mm_mlp_adapter beside --lora_weight_path.",
        )
    return base


def put_start(args: ParsedArgs, start: Start, model: nn.Module) -> None:
    """Give a model that has been loaded what the base's files and the start's sources do not give it.

    That is the adapter where it is trained on, and rows of added tokens. All ranks call this together.

    Raises:
        UserError: The adapter does not fit the run.
    """
    put = value_setter(model)
    if start.has_adapter and start.mode == "continue":
        # Projector and image_newline have their values by now, from the start's files or the base's.
        restore_trained(
            model,
            start.path,
            as_start=True,
            put=put,
            force=force_of(args),
            is_needed=lambda name: module_part(name) in LANGUAGE_MODEL,
        )
        logger.info("Starting from the adapter in %s and what was trained beside it.", start.path)
        return
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, rows in start.token_rows().items():
        own_rows = name.removesuffix(".weight") + NEW_ROWS_SUFFIX
        if own_rows in parameters:
            put(own_rows, parameters[own_rows], rows)
            continue
        with gathered([parameters[name]], modified=True):
            parameters[name].data[-rows.shape[0] :] = rows.to(parameters[name].dtype)
    if start.has_adapter:
        logger.info(
            "Starting from what was trained beside the adapter in %s; the adapter itself is not used "
            "(adapter_mode=new).",
            start.path,
        )
    else:
        what = "projector" if start.directory.kind == "projector" else "model"
        logger.info("Starting from the %s in %s.", what, start.path)


def check_resumed_start(args: ParsedArgs, start: Start | None, checkpoint: Path | None) -> None:
    """Refuse to resume a checkpoint of a run that started from something else.

    Raises:
        UserError: It did, and that is not passed over.
    """
    lineage = read_lineage(checkpoint) if checkpoint is not None else None
    details: dict[str, Any] = (lineage or {}).get("details", {})
    if checkpoint is None or "start" not in details:
        return
    before: dict[str, str] | None = details["start"]
    now = None if start is None else describe_start(start)
    same = ("fingerprint", "mode")
    if [(before or {}).get(key) for key in same] == [(now or {}).get(key) for key in same]:
        return
    old, new = (f"{one['path']} ({one['mode']})" if one else "its base alone" for one in (before, now))
    refuse_unless(
        force_of(args) is True,
        f"{checkpoint} belongs to a run that started from {old}, and this one is to start from {new}.",
        "Give the same --init_from and --adapter_mode; or start anew with another --output_dir or "
        "--resume_from_checkpoint False.",
    )


def describe_start(start: Start) -> dict[str, str]:
    """Say what a run starts from, for its lineage: path, fingerprint of the weights, and mode."""
    described = describe_parent(start.path)
    return {"path": described["path"], "fingerprint": described["fingerprint"], "mode": start.mode}


def merged_base(args: ParsedArgs, start: Start) -> Path:
    """Return the base that `adapter_mode=merge_first` trains on, after merging if that has not been done.

    One rank merges, or one on each machine where each keeps its own output; the others wait.

    Raises:
        UserError: Another adapter was merged there, or they cannot be merged.
        RunError: Merging failed.
    """
    from llava_ft.convert.merge import MergeOptions, merge  # heavy; other runs do without

    training = args.training
    target = Path(training.output_dir or ".") / MERGED_BASE
    if training.should_save:
        if target.exists() and what_is_incomplete(target) is None:
            lineage = read_lineage(target)
            merged = [parent.get("fingerprint") for parent in (lineage or {}).get("parents", ())]
            if merged != [describe_parent(start.path)["fingerprint"]]:
                raise UserError(
                    f"{target} was merged from something else than {start.path}. Give another --output_dir, or remove "
                    f"{target.name} and the checkpoints beside it to start anew."
                )
            logger.info("The adapter in %s was merged before: %s.", start.path, target)
        else:
            logger.info("Merging the adapter in %s into its base %s.", start.path, args.model.model_name_or_path)
            tower = args.model.vision_tower or start.vision_tower
            # transformers divides every model among the ranks under ZeRO-3, and its `generate` waits in each step for
            # the other ranks, which do not take part here.
            deepspeed = getattr(training, "hf_deepspeed_config", None)  # set by transformers only with DeepSpeed
            if deepspeed is not None:
                unset_hf_deepspeed_config()
            try:
                shares, options = [(1.0, identify(start.path))], MergeOptions(force=force_of(args), vision_tower=tower)
                merge(shares, args.model.model_name_or_path, target, options).log()
            finally:
                if deepspeed is not None:
                    set_hf_deepspeed_config(deepspeed)
    wait_for_first(lambda: what_is_incomplete(target) is None, training)
    return target
