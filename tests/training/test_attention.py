"""The attention kernel of a run: it goes with the model, and it is told where samples begin."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_ft.args import parse_args
from llava_ft.errors import UserError
from llava_ft.models.llava import LlavaForCausalLM
from llava_ft.training.model_setup import settle_attention
from tests.training.helpers import flags, prepare, train

pytestmark = pytest.mark.usefixtures("in_recordings")


def config(**fields) -> SimpleNamespace:
    return SimpleNamespace(
        **{"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128, "attention_dropout": 0.0} | fields
    )


def request(tmp_path: Path, asked: str, chosen: str):
    """A request as it would be on a machine where this kernel was chosen."""
    return parse_args(flags(tmp_path, attn_implementation=asked)).with_attention(chosen)


class TestSettling:
    @pytest.mark.parametrize("kernel", ["varlen", "flash_attention_2", "flash_attention_3", "flex_attention"])
    def test_a_model_of_the_usual_width_goes_with_every_kernel(self, tmp_path, kernel):
        args = request(tmp_path, "auto", kernel)
        assert settle_attention(args, config()) is args

    @pytest.mark.parametrize(
        ("kernel", "fields", "reason"),
        [
            ("flash_attention_2", {"head_dim": 320}, "its heads are 320 wide, and the kernel's at most 256"),
            ("varlen", {"head_dim": 100}, "its heads are 100 wide, and the kernel's a multiple of 8"),
            ("varlen", {"head_dim": None, "hidden_size": 96}, "its heads are 3 wide"),
            ("flex_attention", {"head_dim": 8}, "its heads are 8 wide, and the kernel's at least 16"),
            ("flash_attention_3", {"attention_dropout": 0.1}, "it has attention_dropout 0.1, and the kernel has none"),
        ],
    )
    def test_one_that_does_not_go_with_the_model(self, tmp_path, caplog, kernel, fields, reason):
        with pytest.raises(UserError, match=f"attn_implementation={kernel} does not go with this model: {reason}"):
            settle_attention(request(tmp_path, kernel, kernel), config(**fields))
        with caplog.at_level(logging.INFO):
            settled = settle_attention(request(tmp_path, "auto", kernel), config(**fields))
        assert settled.attn_implementation == "sdpa"
        assert f"takes sdpa instead of {kernel} for this model: {reason}" in caplog.text

    def test_the_rest_of_the_request_stays(self, tmp_path):
        args = request(tmp_path, "auto", "varlen")
        settled = settle_attention(args, config(head_dim=100))
        assert settled.training is args.training
        assert settled == args
        assert args.attn_implementation == "varlen"

    def test_dropout_goes_with_kernels_that_have_it(self, tmp_path):
        for kernel in ("flash_attention_2", "sdpa", "eager"):
            args = request(tmp_path, kernel, kernel)
            assert settle_attention(args, config(attention_dropout=0.1)) is args


@pytest.mark.parametrize(("kernel", "joins"), [("sdpa", True), ("eager", False)])
def test_rows_are_joined_where_the_kernel_is_told_where_samples_begin(tmp_path, kernel, joins):
    changes = {"packing": True, "group_by_modality_length": None, "model_max_length": 256}
    run = prepare(tmp_path, attn_implementation=kernel, **changes)
    run.stop.release()
    batch = next(iter(run.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == ((1, 512) if joins else (2, 256))
    assert ("sample_lengths" in batch) == joins


@pytest.mark.parametrize("flag", ["packing", "padding_free"])
def test_lengths_reach_the_model_from_a_worker(tmp_path, monkeypatch, flag):
    seen, forward = [], LlavaForCausalLM.forward

    def spy(self, *args, **kwargs):
        seen.append((kwargs.get("sample_lengths"), kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForCausalLM, "forward", spy)
    changes = {flag: True, "group_by_modality_length": None, "model_max_length": 256, "dataloader_num_workers": 1}
    train(tmp_path, max_steps=2, attn_implementation="sdpa", **changes)
    assert len(seen) == 2
    for lengths, shape in seen:
        assert all(type(length) is int for length in lengths)
        assert (1, sum(lengths)) == tuple(shape)
        assert len(lengths) > 1
