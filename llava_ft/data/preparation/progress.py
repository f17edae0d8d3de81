"""How far a long preparation is: a bar on a terminal, a line every few seconds in a log."""

import logging
import sys
import time
from typing import Any, Final

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES: Final = 10.0


class Progress:
    """Counts what is done; use it as a context.

    Args:
        what: What is done with what, such as "Tokenising data.json".
        total: How many there are.
        unit: What they are, in the plural.
    """

    def __init__(self, what: str, total: int, unit: str):
        self._what = what
        self._total = total
        self._unit = unit
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._what, unit=f" {self._unit}", mininterval=0.5, leave=False)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Count `count` more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info("%s: %d of %d %s, %.0f a second.", self._what, self._done, self._total, self._unit, self.rate)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Done in a second, on average."""
        return self._done / max(self.seconds, 1e-6)
