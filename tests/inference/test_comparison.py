"""A base and what was trained on it, side by side on one set of weights."""

from pathlib import Path

import pytest
import torch

from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.inference.load import LoadedModel, load_model
from llava_ft.inference.responder import Sampling
from llava_ft.inference.voices import base_and_trained, single_voice
from tests.conftest import RECORDINGS
from tests.inference.typed_chat import LANDSCAPE, LORA, V1, Typed
from tests.layouts import native
from tests.training.helpers import train

pytestmark = pytest.mark.usefixtures("in_recordings")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        return load_model("ckpt/llava15-tiny")


def same_weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}


@pytest.fixture(scope="module")
def with_new_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a LLaVA model, trained with tokens around images that the base does not have."""
    output = tmp_path_factory.mktemp("lora") / "llava-tiny-lora-tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        train(
            output,
            model_name_or_path="ckpt/llava15-tiny",
            pretrain_mm_mlp_adapter=None,
            mm_use_im_start_end="True",
            max_steps="2",
            learning_rate="5e-2",
            mm_projector_lr="5e-2",
        )
    return output


def test_base_and_adapter_answer_as_each_alone(with_new_tokens: Path):
    loaded = load_model(str(with_new_tokens), adapter="beside")
    before = same_weights(loaded)
    base, adapter = base_and_trained(loaded, None)
    assert (base.name, adapter.name) == ("base", "adapter")
    assert (base.mm_use_im_start_end, adapter.mm_use_im_start_end) == (False, True)
    alone = [
        single_voice(load_model("ckpt/llava15-tiny"), "alone", None),
        single_voice(load_model(str(with_new_tokens), adapter="beside"), "alone", None),
    ]
    sampling = Sampling(max_new_tokens=16)
    lines = (f"/image {LANDSCAPE}", "What is this?", "And why?", "/undo", "Which colour?")
    together = Typed([base, adapter], sampling).history(*lines)
    assert together == [Typed([voice], sampling).history(*lines)[0] for voice in alone]
    assert together[0] != together[1]
    after = same_weights(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logits_of_the_base_are_its_own(with_new_tokens: Path):
    loaded = load_model(str(with_new_tokens), adapter="beside")
    base, _ = base_and_trained(loaded, None)
    ids = torch.tensor([tokenize_prompt("USER: Hello ASSISTANT:", loaded.tokenizer)])
    expected = load_model("ckpt/llava15-tiny").model(input_ids=ids).logits
    with base.speaking():
        got = loaded.model(input_ids=ids).logits[..., : expected.shape[-1]]
    assert torch.equal(got, expected)
    assert not torch.equal(loaded.model(input_ids=ids).logits[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("write", [native.dora, native.lora_im_start_end, native.lora_all_bin, native.rslora])
def test_adapters_of_every_kind_are_switched(write: native.Write, tmp_path: Path):
    checkpoint = write(tmp_path / "adapter")
    loaded = load_model(str(checkpoint.path), adapter="beside")
    base, adapter = base_and_trained(loaded, None)
    ids = torch.tensor([tokenize_prompt("USER: Hello ASSISTANT:", loaded.tokenizer)])
    alone = load_model(str(checkpoint.base)).model(input_ids=ids).logits
    added = load_model(str(checkpoint.path)).model(input_ids=ids).logits
    with base.speaking():
        assert torch.equal(loaded.model(input_ids=ids).logits[..., : alone.shape[-1]], alone)
    with adapter.speaking():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, added, rtol=0, atol=1e-4)
    assert (added[..., : alone.shape[-1]] - alone).abs().max() > 1e-2


def test_a_base_without_projector_answers_with_the_trained_one(caplog: pytest.LogCaptureFixture):
    caplog.set_level("WARNING", "llava_ft")
    base, adapter = base_and_trained(load_model(LORA, adapter="beside"), None)
    assert "has no projector of its own" in caplog.text
    answers = Typed([base, adapter]).take(f"/image {LANDSCAPE}", "What is this?")
    assert [answer.split(":")[0] for answer in answers] == ["base", "adapter"]


def test_a_projector_is_compared_with_that_of_its_base():
    loaded = load_model("train/pretrain_vt32/llava-tiny-pretrain", "ckpt/llava15-tiny")
    base, trained = base_and_trained(loaded, V1)
    assert trained.name == "projector"
    lines = (f"/image {LANDSCAPE}", "What is this?")
    base_alone = Typed([single_voice(load_model("ckpt/llava15-tiny"), "alone", V1)]).history(*lines)[0]
    trained_alone = Typed([single_voice(loaded, "alone", V1)]).history(*lines)[0]
    assert Typed([base, trained]).history(*lines) == [base_alone, trained_alone]
    assert base_alone != trained_alone


def test_settings_that_one_model_cannot_hold_twice_are_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level("WARNING", "llava_ft")
    loaded = load_model("train/pretrain_vt32/llava-tiny-pretrain", "ckpt/llava16-tiny-anyres")
    base_and_trained(loaded, V1)
    assert "image_aspect_ratio square instead of anyres, mm_patch_merge_type flat instead of spatial" in caplog.text


def test_an_interrupted_comparison_is_taken_back(loaded: LoadedModel):
    first = single_voice(loaded, "one", None)
    typed = Typed([first, single_voice(loaded, "two", None)], is_interactive=True)
    original = first.responder.answer

    def interrupted(*arguments: object, **options: object):
        original(*arguments, **options)
        raise KeyboardInterrupt

    first.responder.answer = interrupted
    typed.take("/clear", "Hello")
    assert typed.chat.dialogues[0].exchanges == typed.chat.dialogues[1].exchanges == []
    assert "Stopped. The question was taken back." in typed.messages.getvalue()


def test_an_interrupted_switch_is_put_right(with_new_tokens: Path):
    loaded = load_model(str(with_new_tokens), adapter="beside")
    base, adapter = base_and_trained(loaded, None)
    ids = torch.tensor([tokenize_prompt("USER: Hello ASSISTANT:", loaded.tokenizer)])
    expected = loaded.model(input_ids=ids).logits
    speaking = base.speaking()
    speaking.__enter__()  # and Ctrl-C comes before it is left
    with adapter.speaking():
        assert torch.equal(loaded.model(input_ids=ids).logits, expected)
