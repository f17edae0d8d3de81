"""Where a conversation is cut off when it is longer than the model may see.

A cut keeps the tokens in front of it and drops the rest. It is made before images are expanded, where an image is one
token, so no image ever loses a part. Whole answers go first, from the end, each with its question: the cut is right
after the end of an earlier answer. Only where not even the first supervised answer fits is a cut made inside it.
"""

from collections.abc import Sequence
from typing import Final, Literal

from llava_ft.errors import UserError

TruncationPolicy = Literal["error", "drop", "truncate"]
"""What is done with a sample that is too long: refuse the run, leave the sample out, or cut it off."""

TRUNCATION_POLICIES: Final = ("error", "drop", "truncate")


def check_policy(policy: str) -> None:
    """Check the name of a policy.

    Raises:
        UserError: It is unknown.
    """
    if policy not in TRUNCATION_POLICIES:
        raise UserError(f"truncation is {policy!r}; it can be {', '.join(TRUNCATION_POLICIES)}.")


def find_cut(
    num_tokens: int,
    images: Sequence[tuple[int, int]],
    target_spans: Sequence[tuple[int, int]],
    answer_ends: Sequence[int],
    max_length: int,
) -> int | None:
    """Find how many tokens of a sample stay.

    All positions count an image as one token.

    Args:
        num_tokens: Tokens of the sample.
        images: Position of each image, ascending, and the tokens it is expanded to.
        target_spans: Starts and ends of the supervised stretches, ascending.
        answer_ends: Position after each answer, ascending: where a conversation may end.
        max_length: Tokens that may stay after expansion.

    Returns:
        Tokens that stay, `num_tokens` for a sample that fits; None if nothing would stay that has to be predicted.
    """
    last = _last_fitting(num_tokens, images, max_length)
    if last == num_tokens:
        return num_tokens
    first_target = first_predicted(target_spans)
    if first_target is None or last <= first_target:
        return None
    whole_answers = [end for end in answer_ends if first_target < end <= last]
    return max(whole_answers, default=last)


def first_predicted(target_spans: Sequence[tuple[int, int]]) -> int | None:
    """Find the first token that has to be predicted; the very first has nothing to be predicted from."""
    for start, end in target_spans:
        if end > max(start, 1):
            return max(start, 1)
    return None


def _last_fitting(num_tokens: int, images: Sequence[tuple[int, int]], max_length: int) -> int:
    """Count the tokens that fit, an image either whole or not at all."""
    room, start = max_length, 0
    for position, size in images:
        if position - start + size > room:
            return min(position, start + room)
        room -= position - start + size
        start = position + 1
    return min(num_tokens, start + room)
