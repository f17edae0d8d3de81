"""The kernel that a plan counts on is the one that the run would take on that machine."""

import pytest

from llava_ft.errors import UserError
from tests.planning.helpers import request_of
from tests.training.helpers import flags


def planned(tmp_path, **changes) -> str:
    return request_of(flags(tmp_path, "lora", **{"use_cpu": None} | changes))[1].attention


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({"bf16": "True"}, "varlen"),
        ({}, "sdpa"),
        ({"bf16": "True", "attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"bf16": "True", "attn_implementation": "eager"}, "eager"),
        ({"use_cpu": "True", "attn_implementation": "varlen"}, "sdpa"),
    ],
)
def test_as_a_run_would(in_recordings, tmp_path, changes, kernel):
    assert planned(tmp_path, **changes) == kernel


def test_what_a_run_would_be_refused_for(in_recordings, tmp_path):
    with pytest.raises(UserError, match="attn_implementation=varlen cannot be used: it needs bf16 or fp16"):
        planned(tmp_path, attn_implementation="varlen")
