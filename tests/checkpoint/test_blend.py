"""Several adapters with weights: the sum that PEFT gives, one projector, and what has no sum is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.lineage import read_lineage
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.cli import main
from llava_ft.convert.merge import MergeOptions, compare_merged, merge
from llava_ft.convert.proof import ConversionReport
from llava_ft.errors import RunError, UserError
from llava_ft.inference.load import load_model
from tests.checkpoint.adapters import BASE, merged_by_peft, peft_adapter, set_fields

pytestmark = [pytest.mark.usefixtures("in_recordings"), pytest.mark.filterwarnings("ignore::UserWarning:peft")]

LORA = Path("train/lora/llava-tiny-lora")


def blend(target: Path, weights: list[float], *paths: Path, base: str | None = None) -> ConversionReport:
    shares = [(weight, identify(path)) for weight, path in zip(weights, paths, strict=True)]
    return merge(shares, base, target, MergeOptions())


def run_copy(directory: Path, seed: int, **projector: torch.Tensor) -> Path:
    """Copy the recorded run and give its adapter, and tensors trained beside it, other values."""
    shutil.copytree(LORA, directory, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(directory / "adapter_model.safetensors")
    torch.manual_seed(seed)
    values = {key: tensor + 0.02 * torch.randn(tensor.shape) for key, tensor in weights.items()}
    save_file(values, directory / "adapter_model.safetensors")
    file = directory / "non_lora_trainables.bin"
    beside = torch.load(file, weights_only=True)
    prefix = "base_model.model.model.mm_projector."
    torch.save(beside | {prefix + name.replace("_", "."): value for name, value in projector.items()}, file)
    return directory


def test_the_sum_is_peft_s(tmp_path: Path):
    peft_adapter(tmp_path / "a", r=4, lora_alpha=8)
    peft_adapter(tmp_path / "b", r=6, lora_alpha=3, seed=2, use_rslora=True)
    model: Any = load_model(BASE, device="cpu").model
    wrapped: Any = PeftModel.from_pretrained(model, str(tmp_path / "a"), "a")
    wrapped.load_adapter(str(tmp_path / "b"), "b")
    wrapped.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", combination_type="cat")
    wrapped.set_adapter("sum")
    expected = merged_by_peft(wrapped)
    report = blend(tmp_path / "merged", [0.7, -0.3], tmp_path / "a", tmp_path / "b")
    for name, tensor in WeightFiles.open(tmp_path / "merged").read().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    assert report.passed
    assert report.notes == []
    assert report.source == f"0.7 x {tmp_path / 'a'} + -0.3 x {tmp_path / 'b'}"


def test_adapters_of_other_layers_add_up(tmp_path: Path):
    peft_adapter(tmp_path / "a", target_modules=r".*layers\.0\.mlp\.up_proj")
    peft_adapter(tmp_path / "b", target_modules=r".*layers\.\d\.mlp\.(?:up|down)_proj", seed=2)
    report = blend(tmp_path / "merged", [1.0, 1.0], tmp_path / "a", tmp_path / "b")
    assert len(report.changed) == 4


def test_a_weight_scales_one_adapter(tmp_path: Path):
    peft_adapter(tmp_path / "a")
    blend(tmp_path / "half", [0.5], tmp_path / "a")
    blend(tmp_path / "whole", [1.0], tmp_path / "a")
    base, half, whole = (WeightFiles.open(path).read() for path in (Path(BASE), tmp_path / "half", tmp_path / "whole"))
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (base[name] + whole[name]) / 2, atol=1e-6, rtol=1e-6, msg=name)


def test_projectors_that_differ_are_averaged(tmp_path: Path):
    bias = {"one": torch.full((64,), 1.0), "two": torch.full((64,), 4.0)}
    paths = [run_copy(tmp_path / name, seed, **{"0_bias": bias[name]}) for seed, name in enumerate(("one", "two"))]
    report = blend(tmp_path / "merged", [1.5, 0.75], *paths, base="ckpt/base-llm")
    merged = WeightFiles.open(tmp_path / "merged").read()
    torch.testing.assert_close(merged["model.mm_projector.0.bias"], torch.full((64,), 2.0))
    same = torch.load(LORA / "non_lora_trainables.bin", weights_only=True)
    kept = same["base_model.model.model.mm_projector.2.weight"]
    assert torch.equal(merged["model.mm_projector.2.weight"], kept.to(merged["model.mm_projector.2.weight"].dtype))
    assert report.notes == [
        "trained beside the adapters to different values, and averaged 0.667 : 0.333: model.mm_projector.0.bias"
    ]
    lineage = read_lineage(tmp_path / "merged")
    assert lineage is not None
    assert [parent["path"] for parent in lineage["parents"]] == [str(path) for path in paths]
    assert lineage["details"] == {"weights": [1.5, 0.75]}


def test_a_projector_that_one_run_did_not_train_is_the_base_s(tmp_path: Path):
    run_copy(tmp_path / "one", 0, **{"0_bias": torch.full((64,), 1.0)})
    peft_adapter(tmp_path / "two")
    shutil.copy(tmp_path / "one/config.json", tmp_path / "two")
    torch.save({}, tmp_path / "two/non_lora_trainables.bin")
    blend(tmp_path / "merged", [1.0, 1.0], tmp_path / "one", tmp_path / "two", base=BASE)
    merged = WeightFiles.open(tmp_path / "merged").read()["model.mm_projector.0.bias"]
    torch.testing.assert_close(merged, (1.0 + load_file(f"{BASE}/model.safetensors")["model.mm_projector.0.bias"]) / 2)
    with pytest.raises(UserError, match="nor the base model holds it, so there is no value to average with"):
        blend(tmp_path / "other", [1.0, 1.0], tmp_path / "one", tmp_path / "two", base="ckpt/base-llm")


def test_an_adapter_without_a_configuration_takes_the_other_s(tmp_path: Path):
    run_copy(tmp_path / "run", 0)
    set_fields(tmp_path / "run/config.json", conversation_template="v1")
    peft_adapter(tmp_path / "by-peft")
    for target, paths in (("one", ["by-peft", "run"]), ("two", ["run", "by-peft"])):
        blend(tmp_path / target, [1.0, 1.0], *(tmp_path / path for path in paths), base=BASE)
        config = json.loads((tmp_path / target / "config.json").read_text())
        assert (config["conversation_template"], config["image_aspect_ratio"]) == ("v1", "pad")


def test_templates_that_differ_are_told(tmp_path: Path):
    paths = [run_copy(tmp_path / template, seed) for seed, template in enumerate(("v1", "plain"))]
    for path in paths:
        set_fields(path / "config.json", conversation_template=path.name)
    report = blend(tmp_path / "merged", [1.0, 1.0], *paths, base="ckpt/base-llm")
    assert "trained with the conversation templates v1, plain; the first is written" in report.notes


def test_wrong_weights_are_found(tmp_path: Path):
    peft_adapter(tmp_path / "a")
    peft_adapter(tmp_path / "b", seed=2)
    shares = [(0.7, identify(tmp_path / "a")), (0.3, identify(tmp_path / "b"))]
    swapped = [(0.3, identify(tmp_path / "a")), (0.7, identify(tmp_path / "b"))]

    merge(shares, None, tmp_path / "merged", MergeOptions())
    with pytest.raises(RunError, match="The result is not what it was made from"):
        compare_merged(tmp_path / "merged", swapped, None)


def other_configuration(directory: Path) -> None:
    set_fields(directory / "config.json", mm_vision_select_layer=-1)


def other_vocabulary(directory: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(f"ckpt/llava15-tiny-imse/{name}", directory)


def other_base(directory: Path) -> None:
    set_fields(directory / "adapter_config.json", base_model_name_or_path=BASE)


def other_shape(directory: Path) -> None:
    file = directory / "non_lora_trainables.bin"
    weights = torch.load(file, weights_only=True)
    torch.save(weights | {"base_model.model.model.mm_projector.0.bias": torch.ones(63)}, file)


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        (
            other_configuration,
            [1.0, 1.0],
            "trained for different models: mm_vision_select_layer is -2 in the one and -1",
        ),
        (other_vocabulary, [1.0, 1.0], "have different vocabularies"),
        (other_base, [1.0, 1.0], "Only adapters of the same base can be put together"),
        (other_shape, [1.0, 1.0], "trained beside the adapters in different shapes"),
        (None, [1.0, -0.5], "with the weights 1, -0.5 they have no average"),
        (None, [0.0, 0.0], "with the weights 0, 0 they have no average"),
    ],
)
def test_what_has_no_sum_is_refused(tmp_path: Path, change: Any, weights: list[float], message: str):
    one, two = run_copy(tmp_path / "one", 0), run_copy(tmp_path / "two", 1, **{"0_bias": torch.ones(64)})
    if change is not None:
        change(two)
    with pytest.raises(UserError, match=message):
        blend(tmp_path / "merged", weights, one, two)
    assert not (tmp_path / "merged").exists()


def test_dora_has_no_sum(tmp_path: Path):
    peft_adapter(tmp_path / "a", use_dora=True)
    peft_adapter(tmp_path / "b")
    for weights, paths in (([1.0, 1.0], ["a", "b"]), ([0.5], ["a"])):
        with pytest.raises(UserError, match="was trained with DoRA, which sets the length of each row"):
            blend(tmp_path / "merged", weights, *(tmp_path / path for path in paths))


def test_only_adapters_are_added_up(tmp_path: Path):
    with pytest.raises(UserError, match="holds a projector and no adapter"):
        blend(tmp_path / "merged", [1.0, 1.0], LORA, Path("train/pretrain_vt32/llava-tiny-pretrain"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, two = run_copy(tmp_path / "one", 0), run_copy(tmp_path / "two", 1, **{"0_bias": torch.ones(64)})
    argv = ["merge", "--model-path", str(one), "--model-path", str(two), "--save-model-path", str(tmp_path / "merged")]
    argv += ["--model-base", "ckpt/base-llm"]
    assert main([*argv, "--weight", "0.7", "--weight", "0.3"]) == 0
    shown = capsys.readouterr().err
    assert "averaged 0.7 : 0.3: model.mm_projector.0.bias" in shown
    written = json.loads((tmp_path / "merged/conversion_report.json").read_text())
    assert written["passed"] is True
    assert main([*argv, "--weight", "0.7"]) == 2
    assert "--weight is given 1 times and --model-path 2 times" in capsys.readouterr().err
    assert main([*argv, "--weight", "nan", "--weight", "1"]) == 2
    assert "--weight is nan; it must be a number" in capsys.readouterr().err
    assert main([*argv, "--model-path", str(one)]) == 2
    assert "twice" in capsys.readouterr().err
