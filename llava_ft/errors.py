"""What can go wrong, by who has to act.

An error message has three parts: what is wrong with the actual value, what is allowed, what to do.
"""

import difflib
import os
from collections.abc import Sequence


class UserError(ValueError):
    """The request cannot be carried out as it stands: a flag, a file or a record is wrong (exit status 2)."""


class BadSampleError(UserError):
    """One record of the data cannot be used."""

    def __init__(self, index: int, sample_id: str, kind: str, reason: str):
        name = f"Sample {index}" + (f" (id {sample_id!r})" if sample_id else "")
        super().__init__(f"{name}: {reason}")
        self.index = index  # position of the record in its data set, counted from 0
        self.sample_id = sample_id  # the record's own `id`, or "" when it has none
        self.kind = kind  # short, stable name of what is wrong, such as "placeholder-mismatch"; counted in reports
        self.reason = reason  # the message without the "Sample N" prefix

    def __reduce__(self):
        """Keep the fields when the error travels from a data-loading worker."""
        return (type(self), (self.index, self.sample_id, self.kind, self.reason))


class ImageError(UserError):
    """An image file cannot be used.

    `kind` is a short, stable name of what is wrong: "image-missing", "image-not-a-file", "image-empty",
    "image-unreadable", "image-corrupt", "image-format", "image-truncated" or "image-too-large".
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, reason: str):
        super().__init__(f"Image {os.fspath(path)!r} {reason}.")
        self.path = os.fspath(path)
        self.kind = kind
        self.reason = reason  # what is wrong, without the path

    def __reduce__(self):
        """Keep the fields when the error travels from a data-loading worker."""
        return (type(self), (self.path, self.kind, self.reason))


class CheckpointError(UserError):
    """A checkpoint, model directory or weight file is incomplete, damaged or does not fit."""


class RunError(RuntimeError):
    """The run itself failed, for example with a non-finite loss (exit status 1)."""


def some_of(names: Sequence[str], limit: int = 4) -> str:
    """List the first few of many names for a message, and say how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def did_you_mean(word: str, known: Sequence[str], otherwise: str = "") -> str:
    """Return the sentence, with a blank in front, that names the nearest known word; `otherwise` where none is near."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {nearest[0]}?" if nearest else otherwise
