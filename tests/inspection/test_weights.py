"""What is said of weight files and directories, whole and damaged."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_ft.checkpoint.hf.names import hub_name, module_name
from llava_ft.errors import CheckpointError
from llava_ft.inspection.weight_facts import braced, fold, ranges
from llava_ft.inspection.weight_headers import PARTS_OF_FILES, TensorHeader, part_of_tensor, read_header
from llava_ft.inspection.weights import Description, describe
from llava_ft.inspection.weights_difference import compare
from tests.training.helpers import train

pytestmark = pytest.mark.usefixtures("in_recordings")

LORA = "train/lora/llava-tiny-lora"
LLAVA = "ckpt/llava15-tiny"


def copy(source: str, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    return target


def number_of(found: Description, part: str) -> int:
    return next((summary.num_tensors for summary in found.parts if summary.part == part), 0)


@pytest.mark.parametrize(
    ("path", "kind", "facts"),
    [
        (LLAVA, "llava", {"layout": "native", "hidden_size": 64, "vocab_size": 512, "projector": "mlp2x_gelu"}),
        ("ckpt/llava1-tiny-linear", "llava", {"projector": "linear", "projector_in": 32, "num_layers": 2}),
        ("ckpt/llava15-tiny-imse", "llava", {"vocab_size": 514}),
        ("ckpt/llava16-tiny-anyres", "llava", {"tower_layers": 3, "tower_width": 32}),
        ("ckpt/base-llm", "language model", {"num_layers": 2, "intermediate_size": 128}),
        ("ckpt/clip-tiny", "vision tower", {"tower_layers": 3}),
        (LORA, "lora", {"rank": "8", "hidden_size": 64, "projector": "mlp2x_gelu", "num_layers": 2}),
        ("train/pretrain_vt32/llava-tiny-pretrain", "projector", {"projector": "mlp2x_gelu", "hidden_size": 64}),
        ("ckpt/mm_projector.bin", "projector", {"projector": "mlp2x_gelu"}),
        (f"{LORA}/non_lora_trainables.bin", "trained beside an adapter", {"hidden_size": 64}),
        (f"{LORA}/adapter_model.safetensors", "lora", {"intermediate_size": 128}),
        ("ckpt/llava1-tiny-linear/pytorch_model.bin.index.json", "llava", {"vocab_size": 512}),
    ],
)
def test_everything_recorded_is_known_and_whole(path: str, kind: str, facts: dict[str, object]):
    found = describe(Path(path))
    assert found.kind == kind
    assert facts.items() <= found.facts.to_json().items()
    assert found.is_whole, (found.missing, found.damaged)


def test_a_shard_is_said_to_be_one():
    found = describe(Path("ckpt/llava1-tiny-linear/pytorch_model-00002-of-00003.bin"))
    assert found.kind == "shard"
    assert "give the directory or the index" in found.what
    assert found.is_whole


def test_an_adapter_names_its_base_and_its_sizes():
    found = describe(Path(LORA))
    assert found.what.startswith("A LoRA adapter of rank 8 on down_proj, gate_proj")
    assert found.needs is not None
    assert (found.needs.base, found.needs.is_here) == ("ckpt/base-llm", True)
    assert (found.needs.hidden_size, found.needs.num_layers) == (64, 2)
    assert (number_of(found, "LoRA A"), number_of(found, "LoRA B"), number_of(found, "projector")) == (14, 14, 4)


def test_a_file_of_a_run_knows_the_base_from_its_directory():
    needs = describe(Path(f"{LORA}/non_lora_trainables.bin")).needs
    assert needs is not None
    assert needs.base == "ckpt/base-llm"


def test_a_run_of_this_program_has_a_fingerprint_and_loses_files_noticed(tmp_path: Path):
    output = tmp_path / "llava-lora"
    train(output, max_steps="1", save_steps="1", mm_use_im_start_end="True")
    found = describe(output)
    assert found.is_whole
    assert found.needs is not None
    assert found.needs.fingerprint.startswith("sha256:")
    assert found.facts.num_new_rows == 2
    assert any("checkpoint-1" in note for note in found.notes)
    with (output / "adapter_model.bin").open("ab") as file:
        file.write(b"more")
    assert any("adapter_model.bin has" in text for text in describe(output).missing)


def test_a_base_of_another_size_does_not_fit(tmp_path: Path):
    adapter, base = copy(LORA, tmp_path / "adapter"), copy("ckpt/base-llm", tmp_path / "base")
    save_file({"model.embed_tokens.weight": torch.zeros(512, 32)}, base / "model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    found = describe(adapter)
    assert any("does not fit: it is 32 wide and not 64" in text for text in found.damaged)


@pytest.mark.parametrize("rename", [hub_name, module_name])
def test_transformers_layout_is_told_by_its_keys(rename: object, tmp_path: Path):
    tensors = load_file(f"{LLAVA}/model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    found = describe(tmp_path / "model.safetensors")
    assert (found.kind, found.layout) == ("llava", "hf")
    assert {part.part: part.num_tensors for part in found.parts} == {
        part.part: part.num_tensors for part in describe(Path(LLAVA)).parts
    }
    assert compare(Path(LLAVA), tmp_path / "model.safetensors").is_equal


def test_rows_of_added_tokens_in_a_projector_s_file_are_no_vocabulary(tmp_path: Path):
    tensors = torch.load("ckpt/mm_projector.bin", weights_only=True) | {"model.embed_tokens.weight": torch.ones(2, 64)}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    facts = describe(tmp_path / "mm_projector.bin").facts
    assert (facts.num_new_rows, facts.vocab_size, facts.hidden_size) == (2, None, 64)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("model.embed_tokens.new_rows", "rows of added tokens"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "LoRA A"),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector.weight", "DoRA magnitudes"),
        ("model.layers.0.mlp.up_proj.lora_B.bias", "LoRA biases"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "derived"),
        ("model.image_newline", "image newline"),
        ("clip.text_model.x", "CLIP text half"),
        ("optimizer.state.0.exp_avg", "other"),
        ("state.model.mm_projector.0.weight.exp_avg", "other"),
    ],
)
def test_parts(name: str, part: str):
    assert part_of_tensor(name) == part
    assert part in PARTS_OF_FILES


# What is missing


@pytest.mark.parametrize(
    ("source", "remove", "missing"),
    [
        (LORA, "non_lora_trainables.bin", "There is no projector beside the adapter"),
        (LORA, "adapter_model.safetensors", "neither adapter_model.bin nor adapter_model.safetensors"),
        (LLAVA, "tokenizer.model", "There is no tokenizer"),
        (LLAVA, "config.json", "There is no config.json"),
        ("ckpt/clip-tiny", "preprocessor_config.json", "There is no preprocessor_config.json"),
        ("ckpt/llava1-tiny-linear", "pytorch_model-00002-of-00003.bin", "1 of 3 files that pytorch_model.bin.index"),
    ],
)
def test_a_missing_file_is_missed(source: str, remove: str, missing: str, tmp_path: Path):
    directory = copy(source, tmp_path / "copy")
    (directory / remove).unlink()
    found = describe(directory)
    assert any(missing in text for text in found.missing), found.missing
    assert not found.is_whole


@pytest.mark.parametrize(
    ("source", "file", "key", "missing"),
    [
        (LORA, "adapter_model.safetensors", "layers.1.mlp.up_proj.lora_B", "LoRA B is missing for 1 modules"),
        (LLAVA, "model.safetensors", "model.layers.0.", "Layers 0 of model.layers are missing"),
        (LLAVA, "model.safetensors", "model.layers.1.", "Layers 1 of model.layers are missing"),
        (LLAVA, "model.safetensors", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight is missing"),
        (LLAVA, "model.safetensors", "lm_head", "no tensor of the part 'head'"),
        (LLAVA, "model.safetensors", "model.mm_projector", "There is no projector, though config.json says"),
        (LLAVA, "model.safetensors", "model.mm_projector.2", "The projector is mlp1x_gelu, but config.json says"),
        ("ckpt/llava16-tiny-anyres", "model.safetensors", "model.image_newline", "There is no image_newline"),
    ],
)
def test_a_missing_tensor_is_missed(source: str, file: str, key: str, missing: str, tmp_path: Path):
    directory = copy(source, tmp_path / "copy")
    tensors = load_file(directory / file)
    kept = {name: value for name, value in tensors.items() if key not in name}
    assert len(kept) < len(tensors)
    save_file(kept, directory / file)
    found = describe(directory)
    assert any(missing in text for text in found.missing), found.missing


def test_dora_magnitudes_are_missed(tmp_path: Path):
    directory = copy(LORA, tmp_path / "copy")
    tensors = load_file(directory / "adapter_model.safetensors")
    modules = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    vectors = {f"{module}.lora_magnitude_vector": torch.ones(4) for module in modules}
    save_file(tensors | vectors, directory / "adapter_model.safetensors")
    found = describe(directory)
    assert number_of(found, "DoRA magnitudes") == 14
    assert found.what.startswith("A DoRA adapter")
    assert found.is_whole
    vectors.pop(next(iter(vectors)))
    save_file(tensors | vectors, directory / "adapter_model.safetensors")
    assert any("The DoRA magnitude is missing for 1 modules" in text for text in describe(directory).missing)


def test_a_configuration_that_says_otherwise_is_noticed(tmp_path: Path):
    directory = copy(LLAVA, tmp_path / "copy")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 32000}))
    assert any("vocab_size=32000, but the tensors say 512" in text for text in describe(directory).missing)


# What is damaged


def test_a_file_that_was_cut_short_is_described_as_far_as_it_goes(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    content = Path(f"{LLAVA}/model.safetensors").read_bytes()
    path.write_bytes(content[: len(content) // 2])
    found = describe(path)
    assert len(found.tensors) == 80
    assert len(found.damaged) == 1
    assert "is cut short" in found.damaged[0]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"\x08" + b"\0" * 7 + b"not json" + b"\0" * 99])
def test_what_is_no_safetensors_file_is_one_line(content: bytes, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    found = describe(path)
    assert (found.tensors, len(found.damaged)) == ([], 1)
    assert "\n" not in found.damaged[0]


def test_a_damaged_file_does_not_hide_the_others(tmp_path: Path):
    directory = copy(LORA, tmp_path / "copy")
    content = (directory / "non_lora_trainables.bin").read_bytes()
    (directory / "non_lora_trainables.bin").write_bytes(content[:2000])
    found = describe(directory)
    assert found.kind == "lora"
    assert number_of(found, "LoRA A") == 14
    assert len(found.damaged) == 1
    assert "non_lora_trainables.bin" in found.damaged[0]


class _Marker:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_run(tmp_path: Path):
    marker = tmp_path / "was run"
    for name, content in (("zip.bin", {"w": _Marker(marker)}), ("old.bin", {"w": _Marker(marker)})):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=name == "zip.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(_Marker(marker)))
    found = describe(tmp_path)
    assert [len(one.damaged) for one in found.inside] == [1, 1, 1]
    assert not marker.exists()


def test_an_index_cannot_point_outside(tmp_path: Path):
    directory = copy("ckpt/llava1-tiny-linear", tmp_path / "copy")
    index = directory / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../../secret.bin"
    index.write_text(json.dumps(content))
    assert any("not in its own directory" in text for text in describe(directory).damaged)


# Other files


def test_any_dictionary_of_tensors_is_described(tmp_path: Path):
    content = {"state_dict": {"fc.weight": torch.ones(2, 3)}, "epoch": 3, "optimizer": {"m": {"0": torch.ones(5)}}}
    torch.save(content, tmp_path / "run.pt")
    found = describe(tmp_path / "run.pt")
    assert [(tensor.key, tensor.shape) for tensor in found.tensors] == [("fc.weight", (2, 3)), ("optimizer.m.0", (5,))]
    assert found.kind == "tensors"
    assert found.notes == ["It also holds epoch, which is no tensor."]
    assert found.is_whole


def test_types_that_this_version_does_not_know_are_listed(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    tensor = describe(path).tensors[0]
    assert (tensor.dtype, tensor.num_bytes) == ("f4", 2)


def test_directories_of_several_things_are_listed_one_by_one():
    found = describe(Path("ckpt"))
    kinds = {one.path.name: one.kind for one in found.inside}
    assert kinds["mm_projector.bin"] == "projector"
    assert kinds["llava15-tiny"] == "llava"
    assert kinds["clip-tiny"] == "vision tower"
    assert len(kinds) == 9
    assert found.is_whole


def test_of_two_files_with_the_same_content_one_counts(tmp_path: Path):
    directory = copy(LORA, tmp_path / "copy")
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    found = describe(directory)
    assert number_of(found, "LoRA A") == 14
    assert "adapter_model.bin is not read: adapter_model.safetensors is." in found.notes


def test_deepspeed_s_files_are_told(tmp_path: Path):
    step = tmp_path / "checkpoint-3" / "global_step3"
    step.mkdir(parents=True)
    for rank in (0, 1):
        (step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
        (step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    found = describe(tmp_path / "checkpoint-3")
    assert found.kind == "deepspeed"
    assert "of 2 ranks with a ZeRO stage 3" in found.what
    assert "llava-ft consolidate" in found.what
    assert [one.kind for one in describe(tmp_path).inside] == ["deepspeed"]


def test_what_holds_no_weights_says_what_it_holds(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    found = describe(tmp_path)
    assert not found.is_whole
    assert "holds no weight files. It holds notes.txt" in found.missing[0]
    with pytest.raises(CheckpointError, match="does not exist"):
        describe(tmp_path / "nowhere")


def test_tensors_that_are_alike_are_folded():
    def tensor(key: str, *shape: int) -> TensorHeader:
        return TensorHeader(key, key, "layers", shape, "float16", 2, "f")

    names = [f"model.layers.{layer}.mlp.{leaf}_proj.weight" for layer in range(4) for leaf in ("up", "gate")]
    folds = fold([tensor(name, 8, 4) for name in names] + [tensor("model.layers.0.mlp.down_proj.weight", 4, 8)])
    assert [(one.names, one.num_tensors) for one in folds] == [
        ("model.layers.0-3.mlp.{gate,up}_proj.weight", 8),
        ("model.layers.0.mlp.down_proj.weight", 1),
    ]
    assert ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"
    assert braced(["a.b.c", "a.b.d"]) == "a.b.{c,d}"
    assert braced(["a", "ab"]) == "{a,ab}"
    assert "more" in braced([f"model.{'x' * 20}{number}.weight" for number in range(9)])


def test_a_file_is_scanned_without_its_values(tmp_path: Path):
    """A sparse file of 8 GiB is described in its header's time and memory."""
    content = json.dumps({"w": {"dtype": "F16", "shape": [2**32], "data_offsets": [0, 2**33]}}).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + 2**33)
    header = read_header(path)
    assert (header.tensors[0].num_values, header.problem) == (2**32, "")


# Two of them


def test_equal_in_other_files_is_equal(tmp_path: Path):
    tensors = load_file(f"{LLAVA}/model.safetensors")
    torch.save({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "pytorch_model.bin")
    found = compare(Path(LLAVA), tmp_path / "pytorch_model.bin")
    assert found.is_equal
    assert sum(part.num_equal for part in found.parts) == len(tensors)


def test_a_difference_is_found_and_measured(tmp_path: Path):
    tensors = load_file(f"{LLAVA}/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] += 0.5
    less = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"}
    tensors |= {name: tensors[name] + 0.25 for name in less}
    tensors.pop("model.norm.weight")
    tensors["model.image_newline"] = torch.ones(64)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    tensors["model.mm_projector.0.bias"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    found = compare(Path(LLAVA), tmp_path / "model.safetensors")
    assert [tensor.name for tensor in found.only_first] == ["model.norm.weight"]
    assert [tensor.name for tensor in found.only_second] == ["model.image_newline"]
    different = {one.name: one for one in found.different}
    assert set(different) == {*less, name, "lm_head.weight", "model.mm_projector.0.bias"}
    assert different[name].max_difference == pytest.approx(0.5)
    scale = load_file(f"{LLAVA}/model.safetensors")[name].abs().max().item()
    assert different[name].relative == pytest.approx(0.5 / scale)
    assert different["lm_head.weight"].is_rounded
    assert different["model.mm_projector.0.bias"].max_difference is None
    layers = next(part for part in found.parts if part.part == "layers")
    assert (layers.num_common, layers.num_equal, layers.worst) == (18, 15, name)
    assert not found.is_equal


def test_rows_that_both_have_are_compared():
    found = compare(Path(LLAVA), Path("ckpt/llava15-tiny-imse"))
    different = {one.name: one for one in found.different}
    embeddings = different["model.embed_tokens.weight"]
    assert (embeddings.num_rows, embeddings.max_difference) == (512, 0.0)


def test_numbers_that_are_none_are_compared(tmp_path: Path):
    for name, values in (("a", [1.0, float("nan")]), ("b", [1.0, float("nan")]), ("c", [1.0, 2.0]), ("d", [-0.0, 0.0])):
        save_file({"w": torch.tensor(values)}, tmp_path / f"{name}.safetensors")
    assert compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").is_equal
    assert compare(tmp_path / "a.safetensors", tmp_path / "c.safetensors").different[0].max_difference == float("inf")
    zeros = tmp_path / "e.safetensors"
    save_file({"w": torch.zeros(2)}, zeros)
    signs = compare(tmp_path / "d.safetensors", zeros).different[0]
    assert signs.max_difference == 0.0  # other bits, same values


def test_a_lost_file_makes_two_unequal(tmp_path: Path):
    directory = copy("ckpt/llava1-tiny-linear", tmp_path / "copy")
    (directory / "tokenizer.model").unlink()  # no weights
    assert compare(Path("ckpt/llava1-tiny-linear"), directory).is_equal
    (directory / "pytorch_model-00001-of-00003.bin").unlink()
    found = compare(Path("ckpt/llava1-tiny-linear"), directory)
    assert not found.is_equal
    assert any("1 of 3 files" in text for text in found.unreadable)
    with pytest.raises(CheckpointError, match="holds no tensors to compare"):
        compare(Path(LLAVA), Path("images"))
