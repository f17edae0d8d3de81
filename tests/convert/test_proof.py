"""The report of a conversion: it says what was done, and a result that is wrong in one tensor is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint import full_model
from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.full_model import open_full_model
from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.convert import merge as merging
from llava_ft.convert.merge import MergeOptions, merge
from llava_ft.convert.proof import ConversionReport, prove_tensors
from llava_ft.errors import RunError
from tests.checkpoint.adapters import BASE, merged_by_peft, peft_adapter

pytestmark = pytest.mark.usefixtures("in_recordings")

Weights = dict[str, torch.Tensor]
UP = "model.layers.{}.mlp.up_proj.weight"


def merge_adapter(tmp_path: Path, **options: Any) -> ConversionReport:
    shares = [(1.0, identify(tmp_path / "adapter"))]
    return merge(shares, None, tmp_path / "merged", MergeOptions(verify=False, **options))


def spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]) -> None:
    """Let something happen to what a merge has written, before it is proven."""
    write = merging._write_merged

    def write_and_spoil(staging: Path, *rest) -> None:
        write(staging, *rest)
        spoil(staging)

    monkeypatch.setattr(merging, "_write_merged", write_and_spoil)


def edit(change: Callable[[Weights, Weights], None]) -> Callable[[Path], None]:
    def spoil(staging: Path) -> None:
        weights = load_file(staging / "model.safetensors")
        base = {name: value.to(weights[name].dtype) for name, value in load_file(f"{BASE}/model.safetensors").items()}
        change(weights, base)
        save_file(weights, staging / "model.safetensors")

    return spoil


def skipped_layer(weights: Weights, base: Weights) -> None:
    weights[UP.format(1)] = base[UP.format(1)]


def doubled_scale(weights: Weights, base: Weights) -> None:
    weights[UP.format(0)] = (2 * weights[UP.format(0)].float() - base[UP.format(0)].float()).to(
        base[UP.format(0)].dtype
    )


def swapped_matrices(weights: Weights, base: Weights) -> None:
    one, two = UP.format(0), UP.format(1)
    weights[one], weights[two] = weights[two], weights[one]


def swapped_norms(weights: Weights, base: Weights) -> None:
    weights["model.layers.0.input_layernorm.weight"] = weights["model.layers.0.input_layernorm.weight"] * 1.01


def other_projector(weights: Weights, base: Weights) -> None:
    weights["model.mm_projector.2.weight"] = weights["model.mm_projector.2.weight"].flip(0).contiguous()


def rounded_twice(weights: Weights, base: Weights) -> None:
    weights[UP.format(0)] = weights[UP.format(0)].to(torch.float8_e4m3fn).to(weights[UP.format(0)].dtype)


def missing(weights: Weights, base: Weights) -> None:
    del weights["model.norm.weight"]


def beyond(weights: Weights, base: Weights) -> None:
    weights["model.layers.2.extra"] = torch.ones(2)


def not_a_number(weights: Weights, base: Weights) -> None:
    weights[UP.format(0)][3, 3] = float("nan")


def flipped_byte(staging: Path) -> None:
    """Flip the lowest bit of one value of a frozen tensor in the file."""
    file = staging / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + length])["model.embed_tokens.weight"]["data_offsets"]
    content[8 + length + start + 40] ^= 1
    file.write_bytes(content)


WRONG = [
    (edit(skipped_layer), "layers.1.mlp.up_proj.weight was written with other values than the base's with the adapter"),
    (edit(doubled_scale), "layers.0.mlp.up_proj.weight was written with other values than the base's with the adapter"),
    (edit(swapped_matrices), "up_proj.weight was written with other values than the base's with the adapter"),
    (edit(swapped_norms), "layers.0.input_layernorm.weight was written with other values than the base model"),
    (edit(other_projector), "mm_projector.2.weight was written with other values than the base model"),
    (edit(rounded_twice), "layers.0.mlp.up_proj.weight was written with other values than the base's with the adapter"),
    (edit(missing), "model.norm.weight is missing in the result"),
    (edit(beyond), "model.layers.2.extra is in the result and of no parameter"),
    (edit(not_a_number), "layers.0.mlp.up_proj.weight was written with other values"),
    (flipped_byte, "model.embed_tokens.weight was written with other values than the base model"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=range(len(WRONG)))
def test_a_result_that_is_wrong_in_one_tensor_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], message: str, dtype: str
):
    peft_adapter(tmp_path / "adapter")
    spoiled(monkeypatch, spoil)
    with pytest.raises(RunError, match=message):
        merge(
            [(1.0, identify(tmp_path / "adapter"))],
            None,
            tmp_path / "merged",
            MergeOptions(verify=False, dtype=getattr(torch, dtype)),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_the_proof_has_arithmetic_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict):
    peft_adapter(tmp_path / "adapter", **options)
    right = full_model.merged
    monkeypatch.setattr(full_model, "merged", lambda *of: right(*of[:2], [(2 * share, a) for share, a in of[2]], of[3]))
    with pytest.raises(RunError, match="where rounding explains"):
        merge_adapter(tmp_path)


def test_the_report_says_what_was_done(tmp_path: Path):
    expected = merged_by_peft(peft_adapter(tmp_path / "adapter", target_modules=r".*layers\.0\.mlp\.up_proj"))
    report = merge_adapter(tmp_path)
    written = json.loads((tmp_path / "merged/conversion_report.json").read_text())
    assert written == {**written, "kind": "merge", "source": str(tmp_path / "adapter"), "passed": True, "ignored": []}
    assert written["target"] == str(tmp_path / "merged")
    by_source = written["sources"]
    assert by_source[f"base model {BASE}, changed by adapter {tmp_path / 'adapter'}"]["tensors"] == 1
    assert by_source[f"base model {BASE}"]["tensors"] == 79
    assert sum(counts["bytes"] for counts in by_source.values()) == sum(
        info.num_bytes for info in WeightFiles.open(tmp_path / "merged").tensors.values()
    )
    before = load_file(f"{BASE}/model.safetensors")[UP.format(0)]
    largest = float((expected[UP.format(0)] - before).abs().max())
    assert written["changed"] == [
        {
            "name": UP.format(0),
            "max_difference": pytest.approx(largest, rel=1e-4),
            "relative": pytest.approx(largest / float(before.abs().max()), rel=1e-4),
        }
    ]
    assert written["frozen"] == {"tensors": 79, "bit_identical": True}
    assert set(written["versions"]) >= {"llava_ft", "torch", "peft"}
    shown = "\n".join(report.lines())
    assert "frozen: 79, bit-identical to the base" in shown
    assert f"different from the base's: 1, most of all {UP.format(0)} by" in shown


def test_frozen_tensors_of_another_type_are_rounded_once(tmp_path: Path):
    peft_adapter(tmp_path / "adapter")
    report = merge(
        [(1.0, identify(tmp_path / "adapter"))],
        None,
        tmp_path / "merged",
        MergeOptions(verify=False, dtype=torch.bfloat16),
    )
    assert report.frozen["bit_identical"] is None
    assert any("the base's, rounded once to another type" in line for line in report.lines())


def test_more_rows_and_left_out_ones_are_compared_too(tmp_path: Path):
    whole = open_full_model(identify(Path(BASE)), None)
    pieces = {piece.name: piece.value for piece in whole.stream(with_tower=True)}
    name = "model.embed_tokens.weight"
    report = ConversionReport("export", BASE, str(tmp_path))
    prove_tensors(report, whole, (pieces | {name: torch.cat([pieces[name], torch.ones(3, 64)])}).items(), pieces)
    assert report.frozen["bit_identical"] is True
    cut = pieces | {key: pieces[key][:500] for key in (name, "lm_head.weight")}
    prove_tensors(report, whole, cut.items(), pieces, num_rows=500)
    with pytest.raises(RunError, match="was written with 500 rows, not 512"):
        prove_tensors(report, whole, cut.items(), pieces)
    cut[name][0, 0] += 1
    with pytest.raises(RunError, match="embed_tokens"):
        prove_tensors(report, whole, cut.items(), pieces, num_rows=500)
