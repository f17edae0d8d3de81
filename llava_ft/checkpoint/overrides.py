"""Refusals that a user may override, and the record of what was passed over.

Trained weights that belong to another base, or to one another no longer, are refused. `--force` goes on instead: each
thing that is passed over is a warning, and whoever writes a report can collect them.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from llava_ft.errors import CheckpointError

logger = logging.getLogger(__name__)

Force = bool | Literal["base"]
"""What is passed over: nothing (False), everything that may be (True), or another base model alone ("base")."""

_collectors: ContextVar[tuple[list[str], ...]] = ContextVar("collectors of ignored problems", default=())


def force_from_flags(force: bool, allow_base_mismatch: bool) -> Force:
    """Return what `--force` and `--allow_base_mismatch` together pass over."""
    return True if force else "base" if allow_base_mismatch else False


@contextmanager
def collect_ignored() -> Generator[list[str]]:
    """Collect what is passed over inside the block, each problem once and logged once, by a block around it too."""
    ignored: list[str] = []
    token = _collectors.set((*_collectors.get(), ignored))
    try:
        yield ignored
    finally:
        _collectors.reset(token)


def refuse_unless(is_forced: bool, problem: str, advice: str) -> str:
    """Refuse a request, or say that the problem is ignored.

    Returns:
        The problem, which has been logged as a warning.

    Raises:
        CheckpointError: It is not passed over.
    """
    if not is_forced:
        raise CheckpointError(f"{problem} {advice}")
    collectors = _collectors.get()
    if not any(problem in collected for collected in collectors):
        logger.warning("Ignored: %s", problem)
    for collected in collectors:
        if problem not in collected:
            collected.append(problem)
    return problem
