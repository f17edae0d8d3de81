"""What the checks before training found, and what follows from it."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from llava_ft.errors import BadSampleError, UserError

logger = logging.getLogger(__name__)

BadSamplePolicy = Literal["error", "skip"]
"""What is done with records that cannot be used: refuse the run, or leave them out."""

_NUM_SHOWN: Final = 8
"""Errors that a message repeats in full."""

_NUM_NAMED: Final = 100
"""Records left out that a log line names; the report names all of them."""


@dataclass(frozen=True)
class DataReport:
    """What the checks before training found in one file.

    Attributes:
        path: The file.
        num_records: Records in it.
        num_usable: Records that are left.
        errors: Why each of the others is not, in the order of the records.
        num_truncated: Usable records that are cut off at `model_max_length`.
        num_tokens: Tokens of the usable records after expansion and truncation.
        num_supervised: How many of these have to be predicted.
        num_images: Images of the usable records.
    """

    path: str
    num_records: int
    num_usable: int
    errors: list[BadSampleError] = field(default_factory=list[BadSampleError])
    num_truncated: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Unusable records by kind, most frequent first."""
        return dict(Counter(error.kind for error in self.errors).most_common())

    @property
    def ids_by_kind(self) -> dict[str, list[str]]:
        """The ids of the unusable records by kind; a record without id is named by its position."""
        found: dict[str, list[str]] = {kind: [] for kind in self.counts}
        for error in self.errors:
            found[error.kind].append(error.sample_id or f"#{error.index}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != "errors"}
        return {**values, "counts": self.counts, "ids_by_kind": self.ids_by_kind}

    def describe(self) -> str:
        """Say in a line what is usable and how large it is."""
        share = self.num_supervised / max(1, self.num_tokens)
        text = (
            f"{self.path}: {self.num_usable} of {self.num_records} records are usable, with "
            f"{self.num_images} images and {self.num_tokens} tokens, {share:.1%} of them supervised"
        )
        return text + (f"; {self.num_truncated} records are cut off." if self.num_truncated else ".")

    def describe_errors(self) -> str:
        """Count the unusable records by kind: `image-missing: 2, bad-turn: 1`."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())


def apply_policy(report: DataReport, on_bad_sample: BadSamplePolicy) -> None:
    """Raise or log what the report says, as the user wants it: "error" or "skip".

    Raises:
        UserError: A record cannot be used and the policy is "error", or no record is left.
    """
    shown = "\n".join(f"  {error}" for error in report.errors[:_NUM_SHOWN])
    rest = f"\n  and {len(report.errors) - _NUM_SHOWN} more" if len(report.errors) > _NUM_SHOWN else ""
    counted = f"{len(report.errors)} of {report.num_records} records of {report.path} cannot be used"
    if report.errors and on_bad_sample == "error":
        raise UserError(
            f"{counted} ({report.describe_errors()}):\n{shown}{rest}\n"
            "Fix these records, or pass --on_bad_sample skip to train without them."
        )
    if report.num_usable == 0:
        raise UserError(f"{counted}, so none is left ({report.describe_errors()}):\n{shown}{rest}")
    if report.errors:
        names = [repr(error.sample_id) if error.sample_id else str(error.index) for error in report.errors]
        more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
        named = ", ".join(names[:_NUM_NAMED])
        logger.warning("%s and are left out (%s): %s%s", counted, report.describe_errors(), named, more)
    logger.info("%s", report.describe())
