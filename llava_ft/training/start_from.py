"""Starting a run from an earlier one: what is merged first, and what is restored before the first step.

`checkpoint/start.py` knows what an earlier result holds.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llava_ft.args import ParsedArgs
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.lineage import describe_parent, read_lineage
from llava_ft.checkpoint.manifest import MERGED_BASE, what_is_incomplete
from llava_ft.checkpoint.names import NEW_ROWS_SUFFIX, plain_name
from llava_ft.checkpoint.overrides import refuse_unless
from llava_ft.checkpoint.restore import check_base, restore_trained
from llava_ft.errors import UserError
from llava_ft.models.parts import LANGUAGE_MODEL, module_part
from llava_ft.resolve import RunModel, force_of, resolve_merged
from llava_ft.training.distributed import wait_for_first
from llava_ft.training.fragments import gathered, value_setter

if TYPE_CHECKING:
    from llava_ft.checkpoint.start import Start

logger = logging.getLogger(__name__)


def put_start(args: ParsedArgs, start: "Start", model: nn.Module) -> None:
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


def check_resumed_start(run: RunModel, checkpoint: Path | None) -> None:
    """Refuse to resume a checkpoint of a run that started from something else.

    Raises:
        UserError: It did, and that is not passed over.
    """
    lineage = read_lineage(checkpoint) if checkpoint is not None else None
    details: dict[str, Any] = (lineage or {}).get("details", {})
    if checkpoint is None or "start" not in details:
        return
    before: dict[str, str] | None = details["start"]
    now = None if run.start is None else describe_start(run.start)
    same = ("fingerprint", "mode")
    if [(before or {}).get(key) for key in same] == [(now or {}).get(key) for key in same]:
        return
    old, new = (f"{one['path']} ({one['mode']})" if one else "its base alone" for one in (before, now))
    refuse_unless(
        force_of(run.args) is True,
        f"{checkpoint} belongs to a run that started from {old}, and this one is to start from {new}.",
        "Give the same --init_from and --adapter_mode; or start anew with another --output_dir or "
        "--resume_from_checkpoint False.",
    )


def describe_start(start: "Start") -> dict[str, str]:
    """Say what a run starts from, for its lineage: path, fingerprint of the weights, and mode."""
    described = describe_parent(start.path)
    return {"path": described["path"], "fingerprint": described["fingerprint"], "mode": start.mode}


def merge_start(run: RunModel) -> RunModel:
    """Merge what a run starts from into its base, as `adapter_mode=merge_first` asks, if that has not been done.

    One rank merges, or one on each machine where each keeps its own output; the others wait.

    Returns:
        The run on the merged model, which has nothing to start from any more; the run itself in other modes.

    Raises:
        UserError: The start belongs to another base, another adapter was merged there, or they cannot be merged.
        RunError: Merging failed.
    """
    args, start = run.args, run.start
    if start is not None and not start.is_whole:
        check_base(start.path, run.spec.fingerprint, str(run.spec.directory.path), force=force_of(args))
    if start is None or start.mode != "merge_first":
        return run
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
            _merge(args, start, target)
    wait_for_first(lambda: what_is_incomplete(target) is None, training)
    return resolve_merged(run, str(target))


def _merge(args: ParsedArgs, start: "Start", target: Path) -> None:
    from llava_ft.convert.merge import MergeOptions, merge  # heavy; other runs do without

    logger.info("Merging the adapter in %s into its base %s.", start.path, args.model.model_name_or_path)
    # transformers divides every model among the ranks under ZeRO-3, and its `generate` waits in each step for the other
    # ranks, which do not take part here.
    deepspeed = getattr(args.training, "hf_deepspeed_config", None)  # set by transformers only with DeepSpeed
    if deepspeed is not None:
        unset_hf_deepspeed_config()
    try:
        tower = args.model.vision_tower or start.vision_tower
        shares, options = [(1.0, identify(start.path))], MergeOptions(force=force_of(args), vision_tower=tower)
        merge(shares, args.model.model_name_or_path, target, options).log()
    finally:
        if deepspeed is not None:
            set_hf_deepspeed_config(deepspeed)
