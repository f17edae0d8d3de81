"""`llava-ft inspect weights`: what it prints and how it ends."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_ft import cli

pytestmark = pytest.mark.usefixtures("in_recordings")

LORA = "train/lora/llava-tiny-lora"
LLAVA = "ckpt/llava15-tiny"


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["inspect", "weights", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_what_is_said_of_an_adapter(capsys: pytest.CaptureFixture[str]):
    status, out, _ = inspect(capsys, LORA)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{LORA}: A LoRA adapter of rank 8 on down_proj")
    assert lines[1] == "needs the base ckpt/base-llm, a language model 64 wide, 2 layers or more."
    assert "8 x 128  base_model.model.model.layers.0-1.mlp.down_proj.lora_A.weight" in out
    assert lines[-1].split() == ["all", "32", "23,680", "92.5", "KiB"]


def test_what_is_missing_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, out, _ = inspect(capsys, f"{LORA}/checkpoint-5")
    assert status == 1
    assert "missing: There is no projector beside the adapter (non_lora_trainables.bin)" in out


def test_every_key_can_be_listed(capsys: pytest.CaptureFixture[str]):
    _, short, _ = inspect(capsys, LLAVA)
    _, long, _ = inspect(capsys, LLAVA, "--keys")
    assert "model.layers.1.mlp.up_proj.weight" not in short
    assert "model.layers.1.mlp.up_proj.weight" in long


def test_a_model_of_7b_fits_on_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Only the header is written: the file is a hole of 13 GiB."""
    shapes = {"model.embed_tokens.weight": (32000, 4096), "model.norm.weight": (4096,), "lm_head.weight": (32000, 4096)}
    shapes |= {"model.mm_projector.0.weight": (4096, 1024), "model.mm_projector.2.weight": (4096, 4096)}
    shapes |= {"model.mm_projector.0.bias": (4096,), "model.mm_projector.2.bias": (4096,)}
    for layer in range(32):
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{leaf}.weight"] = (4096, 4096)
        for leaf, shape in (("gate_proj", (11008, 4096)), ("up_proj", (11008, 4096)), ("down_proj", (4096, 11008))):
            shapes[f"model.layers.{layer}.mlp.{leaf}.weight"] = shape
        for leaf in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{leaf}.weight"] = (4096,)
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    _, out, _ = inspect(capsys, tmp_path)
    assert len(out.splitlines()) <= 24
    assert all(len(line) <= 160 for line in out.splitlines()[2:])
    assert "model.layers.0-31.self_attn.{k,o,q,v}_proj.weight" in out
    assert f"{6_738_415_616 + 20_979_712:,}" in out  # LLaMA-7B, and a projector from CLIP-L


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]):
    _, out, _ = inspect(capsys, LORA, "--json")
    found = json.loads(out)
    assert (found["kind"], found["whole"], found["missing"]) == ("lora", True, [])
    assert found["needs"]["base"] == "ckpt/base-llm"
    assert len(found["tensors"]) == 32
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == sum(part["bytes"] for part in found["parts"])


def test_two_paths_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(LLAVA, tmp_path / "same")
    status, out, _ = inspect(capsys, LLAVA, tmp_path / "same")
    assert (status, out.splitlines()[-1]) == (0, "Equal: 80 tensors, bit for bit.")
    status, out, _ = inspect(capsys, LLAVA, "ckpt/llava15-tiny-imse")
    assert status == 1
    assert "74 of 80 tensors that both have are equal bit for bit." in out
    assert "512 x 64 / 514 x 64  float32  same values in the 512 rows of both" in out


def test_an_adapter_and_a_model_have_nothing_in_common(capsys: pytest.CaptureFixture[str]):
    status, out, _ = inspect(capsys, f"{LORA}/adapter_model.safetensors", LLAVA)
    assert status == 1
    assert "They have no tensor in common. To compare an adapter with a model, merge it first." in out


def test_a_difference_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file({"w": torch.tensor([1.0, float("nan")])}, tmp_path / "a.safetensors")
    save_file({"w": torch.tensor([1.0, 2.0])}, tmp_path / "b.safetensors")
    status, out, _ = inspect(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (status, found["equal"]) == (1, False)
    assert found["different"][0]["max_difference"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["a", "b", "c"], "3 paths are given"),
        ([], "the following arguments are required: PATH"),
        ([LLAVA, "images"], "images holds no tensors to compare"),
    ],
)
def test_wrong_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    status, out, err = inspect(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_names_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_file({"evil\x1b[2J": torch.ones(1)}, tmp_path / "model.safetensors")
    _, out, _ = inspect(capsys, tmp_path / "model.safetensors")
    assert "\x1b" not in out
