"""Files of a model that contradict each other, or hold what cannot be, are named before anything is computed."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.args import parse_args
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.load import load_model
from llava_ft.resolve import resolve_model
from tests.conftest import RECORDINGS
from tests.training.helpers import flags, train

pytestmark = pytest.mark.usefixtures("in_recordings")

BASE = RECORDINGS / "ckpt/llava15-tiny"
VALUES: tuple[Any, ...] = (0, -1, None, "text", [], {}, 10**9, 1.5, True)
WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "base"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a LoRA run."""
    path = tmp_path_factory.mktemp("trained") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(RECORDINGS)
        train(path, max_steps=1, save_steps=5, model_name_or_path=str(BASE))
    return path


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(trained, tmp_path / "adapter"))
    (path / "llava_ft.json").unlink()  # whose digests would notice all of it
    return path


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    read = load_file if file.suffix == ".safetensors" else torch.load
    tensors = read(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(tensors, file)


def use(adapter: Path) -> dict[str, torch.Tensor]:
    return load_model(str(adapter), str(BASE), device="cpu").plain_model.state_dict()


def resolve(base: Path, tmp_path: Path) -> dict[str, Any]:
    return resolve_model(parse_args(flags(tmp_path / "out", model_name_or_path=str(base)))).config.to_dict()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_value_of_a_field_ends_in_a_traceback(base: Path, tmp_path: Path, file: str):
    """Each field of a base takes each kind of value: it is refused by name, or makes no difference."""
    right, content = resolve(base, tmp_path), json.loads((base / file).read_text())
    refused = 0
    for name, old in content.items():
        for value in VALUES:
            if value == old and type(value) is type(old):
                continue
            edit(base / file, **{name: value})
            try:
                found = resolve(base, tmp_path)
            except UserError:
                refused += 1
            else:
                assert found.keys() == right.keys()
        edit(base / file, **{name: old})
    assert refused > 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0. It should be greater than 0"),
        ({"num_attention_heads": 5}, "hidden_size 64 is no multiple of num_attention_heads 5"),
        ({"hidden_act": "sily"}, "hidden_act is 'sily'. There is no such activation"),
        ({"num_hidden_layers": 1}, "would not be used: model.layers.1"),
        ({"vocab_size": 500}, "vocab_size=500, but model.embed_tokens.weight has 512 rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"mm_use_im_start_end": True}, "was trained with tokens of its own .* but its tokenizer lacks them"),
        ({"tie_word_embeddings": True}, "holds a lm_head.weight of its own, which its config.json"),
        ({"mm_vision_select_layer": "two"}, "mm_vision_select_layer is 'two'"),
        ({"image_grid_pinpoints": [[0, 1]]}, "image_grid_pinpoints"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_a_configuration_that_does_not_go_with_its_weights(base: Path, tmp_path: Path, fields: dict, message: str):
    edit(base / "config.json", **fields)
    with pytest.raises(UserError, match=message):
        load_model(str(base), device="cpu")
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", model_name_or_path=str(base))


def test_a_name_given_twice_and_a_byte_order_mark(base: Path, tmp_path: Path):
    file = base / "config.json"
    text = file.read_text()
    file.write_text(text, encoding="utf-8-sig")
    resolve(base, tmp_path)
    file.write_text(text.replace("{", '{"hidden_size": 32,', 1))
    with pytest.raises(CheckpointError, match="gives 'hidden_size' twice"):
        resolve(base, tmp_path)


def test_a_tokenizer_of_another_model(base: Path, tmp_path: Path):
    edit_weights(base / WEIGHTS, lambda t: t.update({n: t[n][:100].clone() for n in t if t[n].shape[:1] == (512,)}))
    edit(base / "config.json", vocab_size=100)
    for attempt in (lambda: train(tmp_path / "out", model_name_or_path=str(base)), lambda: load_model(str(base))):
        with pytest.raises(
            CheckpointError, match="has embeddings for 100 tokens, and its tokenizer a vocabulary of 512"
        ):
            attempt()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["base", "adapter_model.bin", "non_lora_trainables.bin"])
def test_values_that_are_no_numbers(base: Path, adapter: Path, place: str, value: float):
    file = base / WEIGHTS if place == "base" else adapter / place
    spoiled = ""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal spoiled
        spoiled = max(tensors, key=lambda name: tensors[name].numel())
        tensors[spoiled].view(-1)[7] = value

    edit_weights(file, spoil)
    with pytest.raises(CheckpointError, match=rf"{spoiled} in .*{file.name} holds values that are no numbers"):
        load_model(str(adapter), str(base), device="cpu", force="base")


ADAPTER_EDITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a layer is missing": (
        lambda path: edit_weights(
            path / "adapter_model.bin", lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.up_proj" in name]
        ),
        r"no matrices for model\.layers\.1\.mlp\.up_proj\.weight, which its adapter_config\.json \(target_modules\)",
    ),
    "half of the projector": (
        lambda path: edit_weights(
            path / "non_lora_trainables.bin",
            lambda t: [t.pop(name) for name in list(t) if "mm_projector.2.bias" in name],
        ),
        r"holds 3 tensors of a projector and not model\.mm_projector\.2\.bias",
    ),
    "another rank": (lambda path: edit(path / "adapter_config.json", r=5), "have the rank 4, and .* says r=5"),
    "no alpha": (lambda path: edit(path / "adapter_config.json", lora_alpha=None), "lora_alpha is None"),
    "alpha in words": (lambda path: edit(path / "adapter_config.json", lora_alpha="8"), "lora_alpha is '8'"),
    "an unknown setting that is on": (
        lambda path: edit(path / "adapter_config.json", use_newlora=True),
        "use_newlora=True, with which its matrices are no plain change",
    ),
    "an expression without an end": (
        lambda path: edit(path / "adapter_config.json", alpha_pattern={"(model|model.)*(a+)+$": 3}),
        "",
    ),
}


@pytest.mark.parametrize("name", ADAPTER_EDITS)
def test_an_adapter_that_does_not_fit_together(adapter: Path, name: str):
    spoil, message = ADAPTER_EDITS[name]
    spoil(adapter)
    start = time.monotonic()
    if message:
        with pytest.raises(CheckpointError, match=message):
            use(adapter)
    else:
        use(adapter)
    assert time.monotonic() - start < 20


def test_of_two_adapter_files_the_one_that_peft_takes_is_read(adapter: Path):
    tensors = torch.load(adapter / "adapter_model.bin")
    right = load_model(str(adapter), str(BASE), device="cpu").plain_model.get_parameter(
        "model.layers.0.mlp.up_proj.weight"
    )
    save_file({name: value.clone() for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    edit_weights(adapter / "adapter_model.bin", lambda t: [value.mul_(2) for value in t.values()])
    read = load_model(str(adapter), str(BASE), device="cpu").plain_model.get_parameter(
        "model.layers.0.mlp.up_proj.weight"
    )
    assert torch.equal(read, right)


def test_pickled_parameters_are_read_like_tensors(base: Path, tmp_path: Path):
    """As `torch.save(model.state_dict(keep_vars=True))` writes them."""
    expected = load_model(str(base), device="cpu").plain_model.state_dict()
    tensors = load_file(base / WEIGHTS)
    torch.save({name: torch.nn.Parameter(value) for name, value in tensors.items()}, base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    read = load_model(str(base), device="cpu").plain_model.state_dict()
    assert all(torch.equal(read[name], value) for name, value in expected.items())
    train(tmp_path / "out", model_name_or_path=str(base), max_steps=1)
