"""`TrainingArguments` itself, and what becomes of a request on a machine that lacks what it asks for.

Importing this module imports transformers and torch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # pyright: ignore[reportUnknownVariableType]
from transformers.utils.import_utils import is_torch_tf32_available

from llava_ft.args.training import TrainingFlags
from llava_ft.errors import UserError, did_you_mean

_ON_CPU: Final[Mapping[str, str]] = {
    "adamw_torch_fused": "adamw_torch",
    "adamw_torch_xla": "adamw_torch",
    "adamw_torch_npu_fused": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
"""Optimizers of GPUs, and what takes their place elsewhere: the pages of a paged one are for a GPU's memory."""

_BITSANDBYTES_OPTIMIZERS: Final = frozenset(
    {name for pair in _ON_CPU.items() for name in pair if not name.startswith("adamw_torch")}
    | {"adamw_bnb_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"}
)

_REPORTERS: Final[list[str]] = sorted(INTEGRATION_TO_CALLBACK)  # pyright: ignore[reportUnknownArgumentType]
_REPORTER_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("clearml", "comet_ml", "mlflow", "swanlab", "trackio", "wandb")},
}
"""Packages that a place to report to needs; any one of them will do."""

_WANDB_MODES: Final = ("online", "offline", "disabled", "shared", "dryrun", "run")


@dataclass(repr=False)
class TrainingArguments(  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower types
    TrainingFlags, transformers.TrainingArguments
):
    """Every training flag: those of `TrainingFlags` and those of `transformers.TrainingArguments`.

    `gradient_checkpointing` is always false here, because transformers' trainer is not to recompute; what was asked for
    is in `TrainingFlags`. The representation is inherited because it hides hub_token.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Where checkpoints and the result are written. Required to train."}
    )

    def __post_init__(self) -> None:
        """Settle the optimizer, and keep transformers from recomputing: `tuning/recompute.py` does."""
        if self.optim is None:
            self.optim = "adamw_torch"
        names = {f.name for f in dataclasses.fields(self)}
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # the newer transformers has both
            if name in names:
                setattr(self, name, False)
                setattr(self, f"{name}_kwargs", None)
        super().__post_init__()


def build_training_arguments(
    flags: TrainingFlags, inherited: Mapping[str, object], notes: list[str]
) -> TrainingArguments:
    """Build the training arguments for this machine; see `ParsedArgs`.

    `notes` receives one sentence for each thing this machine cannot do and what is done instead.

    Raises:
        UserError: If transformers refuses the combination, a package is not installed, torch has no such compiler, or
            the DeepSpeed file does not exist.
    """
    values, device_notes = adapt_to_device(
        {**vars(flags), **inherited}, has_cuda=torch.cuda.is_available(), has_tf32=is_torch_tf32_available()
    )
    notes.extend(device_notes)
    _copy_batches_without_waiting(values)
    values["report_to"] = _choose_reporters(values["report_to"], notes)
    if values.get("deepspeed") and not _is_installed("deepspeed"):
        raise UserError(
            f"deepspeed={values['deepspeed']}: DeepSpeed is not installed. Install it with pip install "
            "deepspeed, or leave out the flag."
        )
    if values["optim"] in _BITSANDBYTES_OPTIMIZERS and not _is_installed("bitsandbytes"):
        raise UserError(
            f"optim={values['optim']} needs bitsandbytes, which is not installed. Install it with pip install "
            "llava-ft[qlora], or use optim=adamw_torch."
        )
    # torch.compile itself would refuse an unknown name only when the first layer runs.
    compiler: Any = torch.compiler
    names_of: dict[str, Callable[[], Iterable[str]]] = {
        "torch_compile_backend": lambda: compiler.list_backends(exclude_tags=()),
        "torch_compile_mode": lambda: importlib.import_module("torch._inductor").list_mode_options(),
    }
    for flag, list_names in names_of.items():
        wish = values.get(flag)
        if wish is not None and wish not in (names := sorted(list_names())):
            raise UserError(f"{flag}={wish}: torch has none of that name. Allowed here: {', '.join(names)}.")
    if values.get("deepspeed"):
        from llava_ft.args.deepspeed_file import check_deepspeed_config, read_deepspeed_config

        config, source = read_deepspeed_config(values["deepspeed"], notes)
        if isinstance(values["deepspeed"], str):
            values["deepspeed"] = source
        defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
        notes.extend(check_deepspeed_config(config, source, defaults | values))
        # Stage 0 divides nothing, so it is data parallelism, and torch's own is used. That of DeepSpeed 0.19 in
        # bfloat16 makes a step with gradients of zero before the first: Adam counts it, and weight decay shrinks the
        # weights by it.
        if config["zero_optimization"].get("stage", 0) == 0:
            notes.append(f"deepspeed={source}: stage 0 divides nothing, so torch's own data parallelism is used.")
            values["deepspeed"] = None
    try:
        training = TrainingArguments(**values)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise UserError(f"transformers refuses these training arguments: {error}") from error
    read: Any = getattr(training, "hf_deepspeed_config", None)  # transformers sets it only with DeepSpeed
    if read is not None:
        from llava_ft.args.deepspeed_file import choose_offloaded_adam

        notes.extend(choose_offloaded_adam(read.config, uses_cpu=bool(values.get("use_cpu"))))
    return training


def adapt_to_device(values: Mapping[str, Any], *, has_cuda: bool, has_tf32: bool) -> tuple[dict[str, Any], list[str]]:
    """Replace what needs a GPU where there is none, or one that computes in TF32 (Ampere or newer) where it is older.

    Returns:
        Keyword arguments of `TrainingArguments` to use, and a sentence for each replacement.
    """
    adapted = dict(values)
    notes: list[str] = []
    uses_cpu = not has_cuda or bool(adapted.get("use_cpu"))
    reason = "the GPU has none" if not uses_cpu else "the CPU is used" if has_cuda else "there is no GPU"
    if adapted.get("tf32") and (uses_cpu or not has_tf32):
        adapted["tf32"] = None
        notes.append(f"tf32 is ignored: {reason}.")
    if adapted.get("optim", "") is None:
        adapted["optim"] = "adamw_torch" if uses_cpu else "adamw_torch_fused"
    if not uses_cpu:
        return adapted, notes
    adapted["use_cpu"] = True
    for name in ("fp16", "fp16_full_eval"):
        if adapted.get(name):
            adapted[name] = False
            notes.append(f"{name} is replaced by float32: {reason}.")
    for name, instead in (("optim", _ON_CPU), ("ddp_backend", {"nccl": "gloo"})):
        if (given := adapted.get(name)) in instead:
            adapted[name] = instead[given]
            notes.append(f"{name}={given} is replaced by {instead[given]}: {reason}.")
    return adapted, notes


def _choose_reporters(report_to: str | list[str], notes: list[str]) -> str | list[str]:
    """Check the places to report to, and drop with a note those that are not installed; "none" if none is left.

    The published command lines ask for wandb, which training does not need.
    """
    wanted = [report_to] if isinstance(report_to, str) else list(report_to)
    for name in wanted:
        if name in ("none", "all") and len(wanted) > 1:
            raise UserError(f"report_to={' '.join(wanted)}: {name} stands alone. Leave it out, or name nothing else.")
        if name not in ("none", "all", *_REPORTERS):
            hint = did_you_mean(name, _REPORTERS, " Give one or several of these names.")
            known = ", ".join(["none", "all", *_REPORTERS])
            raise UserError(f"report_to={name}: there is no such place. Known are {known}.{hint}")
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in _WANDB_MODES and any(name in ("wandb", "all") for name in wanted):
        raise UserError(
            f"WANDB_MODE={mode} in the environment: wandb knows {', '.join(_WANDB_MODES)}. Set one of them or unset it."
        )
    left: list[str] = []
    for name in dict.fromkeys(wanted):
        packages = _REPORTER_PACKAGES.get(name, ())
        if packages and not any(map(_is_installed, packages)):
            notes.append(
                f"report_to={name} is left out: it is not installed. To report there: pip install {packages[0]}."
            )
        else:
            left.append(name)
    return left or "none"


def _copy_batches_without_waiting(values: dict[str, Any]) -> None:
    """Let batches go to a GPU while the step before is still computed; from memory that is not pinned they cannot."""
    config = values.get("accelerator_config")
    if values.get("use_cpu") or not values.get("dataloader_pin_memory", True) or not isinstance(config, dict | None):
        return
    values["accelerator_config"] = {"non_blocking": True, **(config or {})}


def _is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of that name, such as ./wandb, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
