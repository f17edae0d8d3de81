"""The places that `--report_to` names: known to transformers, installed, and not in contradiction."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import Final

from transformers.integrations import integration_utils

from llava_ft.errors import UserError

_ALONE: Final = ("none", "all")
_KNOWN: Final = frozenset[str](
    integration_utils.INTEGRATION_TO_CALLBACK  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
)
_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Packages that a place needs; any one of them will do."""

_WANDB_MODES: Final = ("online", "offline", "disabled", "shared", "dryrun", "run")


def choose_reporters(
    report_to: str | list[str], is_installed: Callable[[str], bool]
) -> tuple[str | list[str], list[str]]:
    """Check the places to report to, and drop what is not installed.

    The published command lines ask for wandb, which training does not need.

    Args:
        report_to: As given.
        is_installed: Tells whether a package can be imported.

    Returns:
        The places left, or "none", and a note for each that was dropped.

    Raises:
        UserError: A name is unknown, stands beside `none` or `all`, or wandb's own setting is not one of its values.
    """
    wanted = [report_to] if isinstance(report_to, str) else list(report_to)
    for name in wanted:
        if name in _ALONE and len(wanted) > 1:
            raise UserError(f"report_to={' '.join(wanted)}: {name} stands alone. Leave it out, or name nothing else.")
        if name not in _ALONE and name not in _KNOWN:
            known = sorted(_KNOWN)
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else " Give one or several of these names."
            raise UserError(f"report_to={name}: there is no such place. Known are none, all, {', '.join(known)}.{hint}")
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in _WANDB_MODES and any(name in ("wandb", "all") for name in wanted):
        raise UserError(
            f"WANDB_MODE={mode} in the environment: wandb knows {', '.join(_WANDB_MODES)}. Set one of them or unset it."
        )
    missing = [name for name in wanted if not any(map(is_installed, _PACKAGES.get(name, ("torch",))))]
    left = [name for name in dict.fromkeys(wanted) if name not in missing]
    hint = "is left out: it is not installed. To report there: pip install"
    return left or "none", [f"report_to={name} {hint} {_PACKAGES[name][0]}." for name in missing]
