"""What --force passes over is said once and can be collected."""

import logging

import pytest

from llava_ft.checkpoint.overrides import collect_ignored, force_from_flags, refuse_unless
from llava_ft.errors import CheckpointError


def test_a_refusal_says_what_to_do():
    with pytest.raises(CheckpointError, match=r"^It is wrong\. Do this\.$"):
        refuse_unless(False, "It is wrong.", "Do this.")


def test_what_is_passed_over_is_logged_and_collected_once(caplog):
    with caplog.at_level(logging.WARNING), collect_ignored() as outer:
        refuse_unless(True, "First.", "")
        with collect_ignored() as inner:
            for _ in range(2):
                refuse_unless(True, "First.", "")
                refuse_unless(True, "Second.", "")
    assert (outer, inner) == (["First.", "Second."], ["First.", "Second."])
    assert caplog.messages == ["Ignored: First.", "Ignored: Second."]
    assert refuse_unless(True, "Third.", "") == "Third."
    assert outer == ["First.", "Second."]


@pytest.mark.parametrize(
    ("force", "allow_base_mismatch", "expected"),
    [(False, False, False), (False, True, "base"), (True, False, True), (True, True, True)],
)
def test_the_two_flags_together(force, allow_base_mismatch, expected):
    assert force_from_flags(force, allow_base_mismatch) == expected
