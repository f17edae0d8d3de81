"""The model keeps joined samples apart with every kernel, and learns the same from them as from samples alone."""

import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from llava_ft.models.attention.kernels import register
from llava_ft.models.llava import LlavaForCausalLM
from tests.models.attention.test_kernels import KERNELS, WITH_GRADIENT
from tests.models.test_forward import load
from tests.models.test_last_layer import LENGTHS, assert_same, joined, loss_and_gradients, make_model, padded, samples

pytestmark = [
    pytest.mark.usefixtures("in_recordings", "gpu_kernels"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

EVERY = [*KERNELS, "eager"]
TRAINS = [*WITH_GRADIENT, "eager"]
TOLERANCE = 2e-6


def with_lengths(batch: dict, lengths: tuple[int, ...] = LENGTHS) -> dict:
    return {**batch, "sample_lengths": list(lengths)}


def logits_of(model: LlavaForCausalLM, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits


@pytest.fixture(scope="module")
def alone(request):
    """Loss and gradients of all samples with transformers' eager attention, each in a row with a mask."""
    with pytest.MonkeyPatch.context() as patch:
        from tests.conftest import RECORDINGS

        patch.chdir(RECORDINGS)
        return loss_and_gradients(make_model("eager"), padded())


@pytest.mark.parametrize("kernel", EVERY)
def test_joined_samples_are_the_samples_alone(kernel):
    model = make_model(kernel)
    together = logits_of(model, with_lengths(joined()))[0]
    for part, (ids, _) in zip(together.split(LENGTHS), samples(), strict=True):
        torch.testing.assert_close(part, logits_of(model, {"input_ids": ids[None]})[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", EVERY)
def test_one_sample_does_not_reach_another(kernel):
    model, batch = make_model(kernel), with_lengths(joined())
    before = logits_of(model, batch)
    batch["input_ids"][0, LENGTHS[0] + 2] += 1
    after = logits_of(model, batch)
    first, second = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    assert torch.equal(before[:, :first], after[:, :first])
    assert torch.equal(before[:, second:], after[:, second:])
    assert not torch.equal(before[:, first:second], after[:, first:second])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kernel", TRAINS)
def test_loss_and_gradients_of_joined_samples(kernel, checkpointing, alone):
    model = make_model(kernel)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(loss_and_gradients(model, with_lengths(joined())), alone, TOLERANCE)


@pytest.mark.parametrize("change", ["position_ids alone", "sample_lengths alone", "in two rows"])
@pytest.mark.parametrize("kernel", TRAINS)
def test_either_is_enough_to_tell_samples_apart(kernel, change, alone):
    batch = joined()
    if change == "sample_lengths alone":
        batch = with_lengths(batch)
        del batch["position_ids"]
    elif change == "in two rows":
        parts = {key: value[0].split([LENGTHS[0] + LENGTHS[1], LENGTHS[2]]) for key, value in batch.items()}
        longest = LENGTHS[0] + LENGTHS[1]
        fill = {"input_ids": torch.zeros(longest - LENGTHS[2]).long(), "labels": torch.full([4], -100)}
        fill["position_ids"] = torch.arange(4)
        batch = {key: torch.stack([rows[0], torch.cat([rows[1], fill[key]])]) for key, rows in parts.items()}
    assert_same(loss_and_gradients(make_model(kernel), batch), alone, TOLERANCE)


@pytest.mark.parametrize("kernel", TRAINS)
def test_right_padding_needs_no_mask(kernel, alone):
    batch = padded()
    del batch["attention_mask"]
    assert_same(loss_and_gradients(make_model(kernel), batch), alone, TOLERANCE)


@pytest.mark.parametrize("kernel", TRAINS)
def test_what_padding_holds_does_not_matter_without_a_mask(kernel):
    model, batch = make_model(kernel), padded()
    is_padding = ~batch.pop("attention_mask")
    before = loss_and_gradients(model, batch)
    batch["input_ids"][is_padding] = 7
    after = loss_and_gradients(model, batch)
    assert before[0] == after[0]
    assert all(torch.equal(before[1][name], gradient) for name, gradient in after[1].items() if "embed" not in name)


@pytest.mark.parametrize("kernel", TRAINS)
def test_a_mask_of_right_padding_is_honoured(kernel, alone):
    assert_same(loss_and_gradients(make_model(kernel), padded()), alone, TOLERANCE)


@pytest.mark.parametrize("kernel", KERNELS)
def test_beside_a_mask_each_row_is_one_sample_as_in_transformers(kernel):
    batch = joined()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected = logits_of(make_model("eager"), batch)
    torch.testing.assert_close(logits_of(make_model(kernel), batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", EVERY)
def test_generation_with_left_padding(kernel):
    ids = [ids for ids, _ in samples()][:2]
    flipped = pad_sequence([row.flip(0) for row in ids], batch_first=True)
    mask = (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS[:2])[:, None]).flip(1)
    options = {"max_new_tokens": 5, "do_sample": False}
    together = load("ckpt/llava15-tiny", kernel).generate(flipped.flip(1), attention_mask=mask, **options)
    plain = load("ckpt/llava15-tiny", "eager")
    for row, answer in zip(ids, together, strict=True):
        assert torch.equal(plain.generate(row[None], **options)[0], answer)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_decoder_alone_finds_samples_in_positions(kernel):
    model, batch = make_model(kernel).eval(), joined()
    embeds = model.embed_inputs(batch["input_ids"])
    with torch.no_grad():
        alone = model.model(inputs_embeds=embeds, position_ids=batch["position_ids"]).last_hidden_state
    torch.testing.assert_close(model.lm_head(alone), logits_of(model, with_lengths(batch)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_lengths_and_a_mask_contradict_each_other(kernel):
    batch = with_lengths(joined())
    batch["attention_mask"] = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"sample_lengths and an attention_mask or a cache, .* Give the lengths alone"):
        make_model(kernel)(**batch)


def test_lengths_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"sample_lengths are \[3, 4\], 7 in all, but the batch has 1 rows of 32"):
        make_model("sdpa")(**with_lengths(joined(), (3, 4)))


def test_the_kernel_is_not_written_into_a_checkpoint(tmp_path):
    """Its name is one of this program's, which no other knows."""
    make_model("sdpa").config.save_pretrained(tmp_path)
    assert "by_sample" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_llama"


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
WINDOWED = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=5, **TINY)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(use_sliding_window=True, sliding_window=5, max_window_layers=1, **TINY)
    ),
    "gemma2, without its soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            sliding_window=5, attn_logit_softcapping=None, query_pre_attn_scalar=3, head_dim=8, pad_token_id=0, **TINY
        )
    ),
    "qwen2_moe, which leaves its window to the mask": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            **TINY,
        )
    ),
    "phimoe, which leaves its window to the mask": lambda: PhimoeForCausalLM(
        PhimoeConfig(sliding_window=5, num_local_experts=2, **TINY)
    ),
    "llama4, with chunks": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            attention_chunk_size=5, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, pad_token_id=0, **TINY
        )
    ),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("name", WINDOWED)
def test_layers_with_a_sliding_window(name, kernel, padded):
    """Joined samples, or a batch that is padded on the left, give what `eager` gives for each sample alone."""
    torch.manual_seed(0)
    model = WINDOWED[name]().eval()
    samples = [torch.randint(64, (1, length)) for length in (12, 3, 17)]
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        alone = [model(ids).logits[0] for ids in samples]
        model.config._attn_implementation = register(kernel)
        if padded:
            rows = [torch.nn.functional.pad(ids, (17 - ids.shape[1], 0)) for ids in samples]
            mask = [torch.nn.functional.pad(torch.ones_like(ids), (17 - ids.shape[1], 0)) for ids in samples]
            given = {"attention_mask": torch.cat(mask), "position_ids": (torch.cat(mask).cumsum(1) - 1).clamp(min=0)}
            logits = model(torch.cat(rows), **given).logits
            found = [row[-ids.shape[1] :] for row, ids in zip(logits, samples, strict=True)]
        else:
            positions = torch.cat([torch.arange(ids.shape[1]) for ids in samples])[None]
            logits = model(torch.cat(samples, dim=1), position_ids=positions, use_cache=False).logits[0]
            found = list(logits.split([ids.shape[1] for ids in samples]))
    for ours, theirs in zip(found, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize("name", WINDOWED)
def test_generation_beyond_a_sliding_window(name, kernel):
    """The cache of a layer with a window keeps no more than it sees."""
    torch.manual_seed(0)
    model, ids = WINDOWED[name]().eval(), torch.randint(1, 64, (2, 12))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    model.config._attn_implementation = "eager"
    expected = model.generate(ids, **options)
    model.config._attn_implementation = register(kernel)
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-6, rtol=1e-5)
