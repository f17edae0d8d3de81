"""What each rank says on the terminal.

Rank 0 speaks for all. The other ranks name themselves and only warn: `[rank 3] ...`. Libraries are heard from rank 0
alone and from warnings on; `--log_level` and `--log_level_replica`, as transformers has them, change that.
"""

import logging
import os
import sys
import warnings

_OWN = "llava_ft"
LIBRARIES = ("DeepSpeed", "accelerate", "datasets", "huggingface_hub", "transformers")
"""Loggers that write past the root logger once their library is imported."""

_IDLE_WARNINGS = ("bitsandbytes",)
"""Libraries whose warnings nobody can act upon: of dtypes in each product, of optional kernels."""


def set_up_ranks(rank: int, log_level: str | None = None, log_level_replica: str | None = None) -> None:
    """Settle what this rank says, before libraries are imported.

    Args:
        rank: This rank among all.
        log_level: For rank 0. None or `passive`: this program from INFO on, libraries from WARNING on.
        log_level_replica: For the other ranks. None or `passive`: this program from WARNING on, libraries from ERROR
            on, because they say the same on every rank.
    """
    is_first = rank == 0
    given = log_level if is_first else log_level_replica
    wish = logging.getLevelNamesMapping().get((given or "passive").upper())
    own = wish or (logging.INFO if is_first else logging.WARNING)
    libraries = wish or (logging.WARNING if is_first else logging.ERROR)
    logging.getLogger(_OWN).setLevel(own)
    root = logging.getLogger()
    root.setLevel(libraries)
    for handler in root.handlers:
        handler.filters = [given for given in handler.filters if not isinstance(given, _Threshold)]
        handler.addFilter(_Threshold(own, libraries, hides_idle=wish is None))
        if not is_first:
            handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s"))
    if not is_first:
        logging.captureWarnings(True)
    elif wish is None and not sys.warnoptions and "PYTHONWARNINGS" not in os.environ:
        warnings.filterwarnings("ignore", category=FutureWarning)


def adopt_libraries() -> None:
    """Send what imported libraries say through the root logger; call it when they are imported.

    Their own handlers would write on every rank, DeepSpeed's even to standard output.
    """
    level = logging.getLogger().level
    for name in LIBRARIES:
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True
        library.setLevel(level)


class _Threshold(logging.Filter):
    """Lets this program speak from one level on, and everything else from another."""

    def __init__(self, own: int, libraries: int, *, hides_idle: bool):
        super().__init__()
        self._own = own
        self._libraries = libraries
        self._hides_idle = hides_idle

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a message is shown."""
        origin = record.name.partition(".")[0]
        if origin == _OWN:
            return record.levelno >= self._own
        if self._hides_idle and origin in _IDLE_WARNINGS and record.levelno <= logging.WARNING:
            return False
        return record.levelno >= self._libraries
