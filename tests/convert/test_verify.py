"""Comparing two models: what is asked, what may differ, and that a wrong model is found by what it says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.directory import identify
from llava_ft.constants import IMAGE_TOKEN_INDEX
from llava_ft.convert.merge import MergeOptions, compare_merged, merge
from llava_ft.convert.proof import ConversionReport
from llava_ft.convert.verify import NativeSpeaker, Question, Speaker, fixed_questions, prove, record
from llava_ft.errors import RunError
from llava_ft.inference.load import load_model

pytestmark = pytest.mark.usefixtures("in_recordings")

LORA = Path("train/lora/llava-tiny-lora")
TEXT = Question("text", [1, 2, 3])


class Fixed(Speaker):
    """A model whose logits depend on the last token alone: a table, and what it answers."""

    def __init__(self, table: torch.Tensor):
        super().__init__(None)
        self.table = table

    def inputs(self, question: Question) -> dict[str, torch.Tensor]:
        raise AssertionError("there is no model to be asked")

    def logits(self, question: Question) -> torch.Tensor:
        return self.table[torch.tensor(question.ids)]

    def greedy(self, question: Question) -> list[int]:
        ids = list(question.ids)
        for _ in range(16):
            ids.append(int(self.table[ids[-1]].argmax()))
        return ids[len(question.ids) :]


def table(num_columns: int = 6) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, num_columns)


def new_report() -> ConversionReport:
    return ConversionReport("test", "source", "target")


def test_equal_models_are_equal():
    report = new_report()
    prove(report, record(Fixed(table()), [TEXT]), Fixed(table()), 1e-4)
    assert report.logits == [
        {"input": "text", "max_difference": 0.0, "scale": report.logits[0]["scale"], "bound": report.logits[0]["bound"]}
    ]
    assert report.logits[0]["bound"] == pytest.approx(1e-4 * report.logits[0]["scale"])
    assert report.answers[0]["equal"]
    assert len(report.answers[0]["source"]) == 16


def test_columns_that_one_vocabulary_has_alone_do_not_count():
    larger = torch.cat([table(), torch.full((6, 2), -100.0)], dim=1)
    report = new_report()
    prove(report, record(Fixed(table()), [TEXT]), Fixed(larger), 1e-4)
    prove(report, record(Fixed(larger), [TEXT]), Fixed(table()), 1e-4)
    assert all(entry["scale"] < 10 for entry in report.logits)


@pytest.mark.parametrize("difference", [0.5, float("nan"), float("inf")])
def test_logits_beyond_the_bound_are_refused(difference: float):
    other = table()
    other[3, 1] += difference
    report = new_report()
    with pytest.raises(RunError, match=r"on the fixed text input the largest difference of logits is"):
        prove(report, record(Fixed(table()), [TEXT]), Fixed(other), 1e-4)
    assert len(report.logits) == 1


class Answers(Fixed):
    """A model that says something else than its logits make it."""

    def __init__(self, table: torch.Tensor, answer: list[int]):
        super().__init__(table)
        self.answer = answer

    def greedy(self, question: Question) -> list[int]:
        return self.answer


def test_answers_may_part_only_where_two_tokens_are_equally_likely():
    close = torch.zeros(6, 6)
    close[:, 4], close[:, 5] = 1.0, 1.0 - 1e-5
    report = new_report()
    prove(report, record(Fixed(close), [TEXT]), Answers(close, [4] * 7 + [5] * 9), 1e-4)
    assert not report.answers[0]["equal"]
    assert any("part where two tokens are equally likely" in line for line in report.lines())
    far = close.clone()
    far[4, 5] = 0.9
    with pytest.raises(RunError, match=r"differ at token 8: 4 and 5, whose logits in the source are 0\.1 apart"):
        prove(new_report(), record(Fixed(far), [TEXT]), Answers(far, [4] * 7 + [5] * 9), 1e-4)


def test_an_answer_that_ends_early_is_another():
    with pytest.raises(RunError, match="have other lengths"):
        prove(new_report(), record(Answers(table(), [1, 2]), [TEXT]), Answers(table(), [1]), 1e-4)


def test_models_that_cut_pictures_otherwise_are_not_compared():
    class Longer(Fixed):
        def logits(self, question: Question) -> torch.Tensor:
            return torch.cat([super().logits(question), torch.zeros(1, 6)])

    with pytest.raises(RunError, match="take 19 and 20 positions"):
        prove(new_report(), record(Fixed(table()), [TEXT]), Longer(table()), 1e-4)


@pytest.mark.parametrize("name", ["llava15-tiny", "llava16-tiny-anyres", "llava15-tiny-imse", "base-llm"])
def test_the_questions_are_the_same_everywhere(name: str):
    loaded = load_model(f"ckpt/{name}", device="cpu")
    config = loaded.model.config
    questions, again = fixed_questions(loaded), fixed_questions(loaded)
    assert [question.ids for question in questions] == [question.ids for question in again]
    assert [question.name for question in questions] == (["text"] if name == "base-llm" else ["text", "image"])
    assert all(0 < token < config.vocab_size for token in questions[0].ids)
    assert (config.vocab_size - 1 in questions[0].ids) == (name == "llava15-tiny-imse")
    for question in questions[1:]:
        assert question.ids.count(IMAGE_TOKEN_INDEX) == 1
        assert question.image is not None
        assert again[1].image is not None
        assert question.image.tobytes() == again[1].image.tobytes()
        assert question.image.width > question.image.height
        num_tokens = config.image_geometry.num_tokens(question.image.size)
        assert NativeSpeaker(loaded).logits(question).shape == (len(question.ids) - 1 + num_tokens, config.vocab_size)


def test_what_is_recorded_is_what_the_model_says():
    loaded = load_model("ckpt/llava15-tiny", device="cpu")
    speaker = NativeSpeaker(loaded)
    for question, answer, logits in record(speaker, fixed_questions(loaded)):
        assert speaker.greedy(question) == answer
        assert logits[-len(answer) - 1 : -1].argmax(dim=-1).tolist() == answer


def spoil(staging: Path, change) -> None:
    weights = load_file(staging / "model.safetensors")
    change(weights)
    save_file(weights, staging / "model.safetensors")


def skipped_layer(weights: dict) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = load_file("ckpt/base-llm/model.safetensors")[name]


def doubled_scale(weights: dict) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    weights[name] = 2 * weights[name] - load_file("ckpt/base-llm/model.safetensors")[name]


def swapped(weights: dict) -> None:
    one, two = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    weights[one], weights[two] = weights[two], weights[one]


def other_projector(weights: dict) -> None:
    trained = torch.load("ckpt/mm_projector.bin", weights_only=True)
    weights |= {name: value.float().contiguous() for name, value in trained.items()}


@pytest.mark.parametrize("change", [skipped_layer, doubled_scale, swapped, other_projector])
def test_a_wrong_model_is_found_by_what_it_says(tmp_path: Path, change):
    merge([(1.0, identify(LORA))], "ckpt/base-llm", tmp_path / "merged", MergeOptions(verify=False))
    report = compare_merged(tmp_path / "merged", [(1.0, identify(LORA))], "ckpt/base-llm")
    assert [answer["equal"] for answer in report.answers] == [True, True]
    spoil(tmp_path / "merged", change)
    with pytest.raises(RunError, match="The result is not what it was made from"):
        compare_merged(tmp_path / "merged", [(1.0, identify(LORA))], "ckpt/base-llm")


def test_the_report_of_a_merge_holds_both_inputs(tmp_path: Path):
    merge([(1.0, identify(LORA))], "ckpt/base-llm", tmp_path / "merged", MergeOptions())
    written = json.loads((tmp_path / "merged/conversion_report.json").read_text())
    assert [entry["input"] for entry in written["logits"]] == ["text", "image"]
    assert [entry["input"] for entry in written["answers"]] == ["text", "image"]
