"""A language model whose head is its embeddings, as small LLaMAs have, in every place that asks for a head."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft import cli
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert.verify import NativeSpeaker, fixed_questions
from llava_ft.inference.load import load_model
from tests.training.helpers import METHODS, state_of, train

pytestmark = pytest.mark.usefixtures("in_recordings")

ADDED_TOKENS = {"mm_use_im_start_end": "True", "pretrain_mm_mlp_adapter": None}


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """A base with tied embeddings, and one with a head of its own that has the same values."""
    paths = tmp_path / "tied", tmp_path / "untied"
    for path in paths:
        shutil.copytree("ckpt/base-llm", path)
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if path.name == "tied":
            del tensors["lm_head.weight"]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": path.name == "tied"}))
    return paths


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "changes", [{}, {"mm_use_im_start_end": "True", "pretrain_mm_mlp_adapter": None}, {"bits": "4"}]
)
def test_a_frozen_tied_head_trains_as_one_of_its_own(bases, tmp_path: Path, changes):
    one, other = (
        train(tmp_path / f"lora-{base.name}", model_name_or_path=base, max_steps="3", **changes) for base in bases
    )
    if "mm_use_im_start_end" in changes:  # the tied rows are learnt from both ends
        assert losses(one)[0] == losses(other)[0]
    else:
        assert losses(one) == losses(other)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_read_again(bases, tmp_path: Path, method: str):
    changes = ADDED_TOKENS if method == "lora" else {}
    run = train(tmp_path / "out", method, model_name_or_path=bases[0], **changes)
    if method == "full":
        assert "lm_head.weight" not in WeightFiles.open(tmp_path / "out").tensors
    base = str(bases[0]) if method == "projector" else None
    loaded = load_model(str(tmp_path / "out"), base, dtype=torch.float32, device="cpu")
    weight = loaded.model.get_input_embeddings().weight
    assert loaded.model.lm_head.weight is weight
    if method == "full":
        assert torch.equal(weight, run.trainer.model.get_input_embeddings().weight)
    (tmp_path / "out" / "checkpoint-6").rename(tmp_path / "last")
    again = train(tmp_path / "out", method, model_name_or_path=bases[0], **changes)
    ours, theirs = state_of(again), state_of(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changes", [{}, ADDED_TOKENS])
def test_merging_and_exporting_keep_one_matrix(bases, tmp_path: Path, changes):
    train(tmp_path / "lora", model_name_or_path=bases[0], max_steps="3", **changes)
    merge = ["merge", "--model-path", str(tmp_path / "lora"), "--save-model-path", str(tmp_path / "merged")]
    assert cli.main(merge) == cli.DONE
    assert "lm_head.weight" not in WeightFiles.open(tmp_path / "merged").tensors
    merged = load_model(str(tmp_path / "merged"), dtype=torch.float32, device="cpu")
    question = fixed_questions(merged)[0]
    expected = NativeSpeaker(merged).logits(question)
    beside = load_model(str(tmp_path / "lora"), dtype=torch.float32, device="cpu", adapter="beside")
    assert torch.allclose(NativeSpeaker(beside).logits(question), expected, atol=1e-5)
    export = ["export", "--format", "hf", "--model-path", str(tmp_path / "merged"), "--save-path"]
    assert cli.main([*export, str(tmp_path / "hf")]) == cli.DONE
    assert not any("lm_head" in name for name in WeightFiles.open(tmp_path / "hf").tensors)
