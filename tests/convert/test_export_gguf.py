"""GGUF files: what is in them, read by others' code and compared with the source."""

import json
from pathlib import Path
from typing import Literal

import gguf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_ft.cli import main
from llava_ft.convert import export_gguf as gguf_export
from llava_ft.convert.export_gguf import export_gguf, find_files, load_gguf
from llava_ft.convert.gguf_file import plan_tensors, restore_rows
from llava_ft.convert.gguf_metadata import language_fields
from llava_ft.convert.proof import ConversionReport
from llava_ft.convert.verify import NativeSpeaker, fixed_questions
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.errors import CheckpointError, RunError
from llava_ft.inference.load import load_model
from tests.convert.gguf_files import ANYRES, LLAVA, changed_copy, export, values, whole
from tests.layouts.hf import write_hf

pytestmark = pytest.mark.usefixtures("in_recordings")

ADAPTER = "train/lora/llava-tiny-lora"
GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TEXTS = ["What is in the image?", "a tab\tand\nnew lines", "1234567890 + 3.14159", "naïve façade, 图像里有什么？ 🦙"]


# Tensors


def names_in_gguf(path: str) -> dict[str, str]:
    model = whole(path)
    return {tensor.native: tensor.name for tensor in plan_tensors(model.shapes, model.config, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_is_the_sources_rounded_once(tmp_path: Path, dtype: torch.dtype):
    report, _, _ = export(LLAVA, tmp_path, dtype)
    source = load_file(f"{LLAVA}/model.safetensors")
    found = {name: value for path in tmp_path.glob("*.gguf") for name, value in values(path).items()}
    names = names_in_gguf(LLAVA)
    for native, value in source.items():
        if native not in names:  # the tower has three layers, the features are those behind two
            assert "vision_tower" in native
            assert "layers.2." in native or "post_layernorm" in native
            continue
        kind, got = found.pop(names[native])
        heads = 4 if native.endswith(("q_proj.weight", "k_proj.weight")) and "vision" not in native else 0
        stored = dtype
        is_convolution = "patch_embedding" in native and dtype == torch.bfloat16
        if value.dim() < 2 or "position_embedding" in native or is_convolution:
            stored = torch.float32
        assert kind == GGML_TYPES[stored], native
        assert torch.equal(restore_rows(got, heads), value.to(stored).float()), native
    assert not found
    assert report.frozen == {"tensors": 62, "bit_identical": True if dtype == torch.float32 else None}
    assert report.changed == []


def test_names_of_files_say_model_and_type(tmp_path: Path):
    export(LLAVA, tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "llava15-tiny-F32.gguf",
        "mmproj-llava15-tiny-F32.gguf",
    ]
    checkpoint = changed_copy(LLAVA, tmp_path / "my run" / "checkpoint-6")
    export(checkpoint, tmp_path / "out", None)
    assert (tmp_path / "out" / "my-run-checkpoint-6-F32.gguf").is_file()


def test_an_adapter_is_put_in(tmp_path: Path):
    report, _, _ = export(ADAPTER, tmp_path, base="ckpt/base-llm")
    merged = load_file("merge/llava-tiny-merged/model.safetensors")
    found = values(find_files(tmp_path)[0])
    for native, name in names_in_gguf(LLAVA).items():
        if name in found:
            heads = 4 if native.endswith(("q_proj.weight", "k_proj.weight")) else 0
            wanted = merged[native].float()
            torch.testing.assert_close(restore_rows(found[name][1], heads), wanted, rtol=1e-3, atol=1e-4)
    changed = {change["name"] for change in report.changed}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.layers.0.input_layernorm.weight" not in changed
    assert report.frozen["bit_identical"] is True


# What the files say


def test_what_the_language_model_says(tmp_path: Path):
    _, language, _ = export(LLAVA, tmp_path, torch.float16)
    fields = language.fields
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "llava15-tiny",
        "general.file_type": 1,
        "llama.vocab_size": 512,
        "llama.context_length": 2048,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "USER" in fields["tokenizer.chat_template"]
    assert "llama.rope.scaling.type" not in fields


def test_keys_have_the_types_that_llama_cpp_asks_for(tmp_path: Path):
    export(LLAVA, tmp_path)
    language, vision = (gguf.GGUFReader(file).fields for file in find_files(tmp_path) if file is not None)
    expected = {
        "llama.block_count": ["UINT32"],
        "llama.rope.freq_base": ["FLOAT32"],
        "tokenizer.ggml.bos_token_id": ["UINT32"],
        "tokenizer.ggml.add_bos_token": ["BOOL"],
        "tokenizer.ggml.tokens": ["ARRAY", "STRING"],
        "tokenizer.ggml.scores": ["ARRAY", "FLOAT32"],
        "tokenizer.ggml.token_type": ["ARRAY", "INT32"],
        "clip.use_gelu": ["BOOL"],
        "clip.vision.feature_layer": ["ARRAY", "INT32"],
        "clip.vision.image_mean": ["ARRAY", "FLOAT32"],
    }
    found = language | vision
    assert {key: [kind.name for kind in found[key].types] for key in expected} == expected


def test_linear_scaling_of_positions_is_said():
    config = whole(LLAVA).config
    config.rope_parameters = {"rope_theta": 50000.0, "rope_type": "linear", "factor": 4.0}
    fields = language_fields(config, "x", torch.float32)
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 4.0
    assert fields["llama.rope.freq_base"] == 50000.0


def test_what_the_vision_file_says(tmp_path: Path):
    report, _, vision = export(LLAVA, tmp_path, torch.bfloat16)
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.file_type": 32,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.image_size": 56,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 64,
        "clip.vision.projection_dim": 64,
        "clip.vision.attention.head_count": 4,
        "clip.vision.block_count": 2,
        "clip.vision.feature_layer": [2],
        "clip.vision.mm_patch_merge_type": "flat",
    }
    assert {key: vision.fields[key] for key in expected} == expected
    assert vision.fields["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert vision.fields["clip.vision.image_std"] == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    assert "clip.vision.image_grid_pinpoints" not in vision.fields
    assert len(report.notes) == 3
    assert "class token" in report.notes[0]
    assert "does not name its template" in report.notes[1]
    assert "legacy=false" in report.notes[2]


def test_tiles_have_their_sizes_width_first_and_a_newline(tmp_path: Path):
    report, _, vision = export(ANYRES, tmp_path)
    assert vision.fields["clip.vision.image_grid_pinpoints"] == [56, 112, 112, 56, 112, 112, 168, 56, 56, 168]
    assert vision.fields["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert vision.shape("v.image_newline") == (64,)
    assert any("one after another" in note and "image_newline" in note for note in report.notes)


def test_a_template_without_an_end_token_or_turns_is_noted(tmp_path: Path):
    model = changed_copy(LLAVA, tmp_path / "blocks", conversation_template="v0")
    report, language, _ = export(model, tmp_path / "out")
    assert any("end with '###'" in note for note in report.notes)
    assert "Human" in language.fields["tokenizer.chat_template"]
    model = changed_copy(LLAVA, tmp_path / "plain", conversation_template="plain")
    report, language, _ = export(model, tmp_path / "out_plain")
    assert any("no turns" in note for note in report.notes)
    assert "tokenizer.chat_template" not in language.fields


def test_images_cropped_in_training_are_noted(tmp_path: Path):
    model = changed_copy(LLAVA, tmp_path / "model", image_aspect_ratio="square")
    report, _, _ = export(model, tmp_path / "out")
    assert any("cropped" in note for note in report.notes)


@pytest.mark.parametrize(("select_layer", "num_layers"), [(-1, 3), (-3, 1), (2, 2)])
def test_layers_behind_the_features_are_left_out(tmp_path: Path, select_layer: int, num_layers: int):
    model = changed_copy(LLAVA, tmp_path / "model", mm_vision_select_layer=select_layer)
    _, _, vision = export(model, tmp_path / "out")
    layers = {name.split(".")[2] for name in vision.names if name.startswith("v.blk.")}
    assert layers == {str(index) for index in range(num_layers)}
    assert vision.fields["clip.vision.block_count"] == num_layers
    assert vision.fields["clip.vision.feature_layer"] == [num_layers]


# Others read them


def test_transformers_reads_the_language_model(tmp_path: Path):
    """Its reader of GGUF is others' code: names, row order, configuration and vocabulary must be what it expects."""
    export(LLAVA, tmp_path)
    name = find_files(tmp_path)[0].name
    ids = torch.tensor([[1, *range(3, 40), 300, 400, 511]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32)
    ours = load_model(LLAVA, device="cpu").model
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(input_ids=ids).logits).abs().max()
    assert difference < 1e-4
    read, known = AutoTokenizer.from_pretrained(tmp_path, gguf_file=name), load_tokenizer(LLAVA)
    for text in TEXTS:  # without runs of blanks, which transformers joins in another order than llama.cpp
        assert read(text)["input_ids"] == known(text)["input_ids"]


def test_features_computed_from_the_vision_file_alone(tmp_path: Path):
    _, _, vision = export(LLAVA, tmp_path)
    loaded = load_model(LLAVA, device="cpu")
    picture = fixed_questions(loaded)[1].image
    assert loaded.image_transform is not None
    pixels = loaded.image_transform.normalizer(loaded.image_transform.pixels(picture))
    with torch.no_grad():
        wanted = loaded.model.model.mm_projector(loaded.model.model.vision_tower(pixels))[0]
    got = clip_and_projector(values(find_files(tmp_path)[1] or Path()), vision.fields, pixels)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def clip_and_projector(tensors: dict[str, tuple[str, Tensor]], fields: dict, pixels: Tensor) -> Tensor:
    """Compute what the file describes: CLIP up to its last layer, patches only, two linear layers with GELU."""
    t = {name: value for name, (_, value) in tensors.items()}
    width, heads = fields["clip.vision.embedding_length"], fields["clip.vision.attention.head_count"]
    eps = fields["clip.vision.attention.layer_norm_epsilon"]

    def norm(hidden: Tensor, name: str) -> Tensor:
        return F.layer_norm(hidden, (width,), t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def linear(hidden: Tensor, name: str) -> Tensor:
        return hidden @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    patches = F.conv2d(pixels, t["v.patch_embd.weight"], stride=fields["clip.vision.patch_size"])[0].flatten(1).T
    hidden = torch.cat([t["v.class_embd"][None], patches]) + t["v.position_embd.weight"]
    hidden = norm(hidden, "v.pre_ln")
    for index in range(fields["clip.vision.feature_layer"][0]):
        block = f"v.blk.{index}"
        normed = norm(hidden, f"{block}.ln1")
        q, k, v = (
            linear(normed, f"{block}.attn_{part}").view(len(hidden), heads, -1).transpose(0, 1) for part in "qkv"
        )
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, dim=-1)
        hidden = hidden + linear((weights @ v).transpose(0, 1).flatten(1), f"{block}.attn_out")
        inner = linear(norm(hidden, f"{block}.ln2"), f"{block}.ffn_up")
        hidden = hidden + linear(inner * torch.sigmoid(1.702 * inner), f"{block}.ffn_down")
    return linear(F.gelu(linear(hidden[1:], "mm.0")), "mm.2")


@pytest.mark.parametrize("path", [LLAVA, ANYRES, "ckpt/llava15-tiny-imse", "ckpt/llava15-tiny-unfreezevt"])
def test_the_files_as_a_model_again_say_the_same(tmp_path: Path, path: str):
    export(path, tmp_path)
    loaded = load_model(path, device="cpu")
    again = NativeSpeaker(load_gguf(tmp_path, whole(path)))
    for question in fixed_questions(loaded):
        assert torch.equal(NativeSpeaker(loaded).logits(question), again.logits(question))


@pytest.mark.parametrize("model", ["llava", "llava_next"])
def test_transformers_own_layout_is_exported_too(tmp_path: Path, model: Literal["llava", "llava_next"]):
    source = tmp_path / "source"
    write_hf(source, model, "hub")
    _, language, _ = export(str(source), tmp_path / "out")
    pieces = language.fields["tokenizer.ggml.tokens"]
    assert len(pieces) == language.fields["llama.vocab_size"] == 520
    assert "<image>" in pieces
    loaded = load_model(str(source), device="cpu")
    again = NativeSpeaker(load_gguf(tmp_path / "out", whole(str(source))))
    for question in fixed_questions(loaded):
        assert torch.equal(NativeSpeaker(loaded).logits(question), again.logits(question))


def test_biases_of_the_language_model_are_exported(tmp_path: Path):
    model = changed_copy(LLAVA, tmp_path / "model", attention_bias=True, mlp_bias=True)
    tensors = load_file(f"{model}/model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        for part, size in (("self_attn.q", 64), ("self_attn.k", 64), ("self_attn.v", 64), ("self_attn.o", 64)):
            tensors[f"model.layers.{index}.{part}_proj.bias"] = torch.randn(size, generator=generator)
        for part, size in (("gate", 128), ("up", 128), ("down", 64)):
            tensors[f"model.layers.{index}.mlp.{part}_proj.bias"] = torch.randn(size, generator=generator)
    save_file(tensors, f"{model}/model.safetensors")
    export(model, tmp_path / "out")
    loaded = load_model(model, device="cpu")
    again = NativeSpeaker(load_gguf(tmp_path / "out", whole(model)))
    for question in fixed_questions(loaded):
        assert torch.equal(NativeSpeaker(loaded).logits(question), again.logits(question))


def test_a_model_without_a_tower_gives_one_file(tmp_path: Path):
    report = ConversionReport("export gguf", "ckpt/base-llm", str(tmp_path))
    export_gguf(whole("ckpt/base-llm"), tmp_path, report, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["base-llm-F32.gguf"]
    assert not any("class token" in note for note in report.notes)
    assert not load_gguf(tmp_path, whole("ckpt/base-llm")).model.has_vision


# The files are compared with the source


def damage(monkeypatch: pytest.MonkeyPatch, name: str, position: int) -> None:
    """Change one byte of a file between writing and comparing; a negative position counts from the end."""
    write = gguf_export.write_gguf

    def and_damage(path: Path, *rest) -> None:
        write(path, *rest)
        if path.name == name:
            data = bytearray(path.read_bytes())
            data[position] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(gguf_export, "write_gguf", and_damage)


@pytest.mark.parametrize("name", ["llava15-tiny-F32.gguf", "mmproj-llava15-tiny-F32.gguf"])
def test_one_wrong_bit_in_a_tensor_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    damage(monkeypatch, name, -200)
    with pytest.raises(RunError, match="was written with other values"):
        export(LLAVA, tmp_path)


def test_a_wrong_key_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "first" / "llava15-tiny-F32.gguf"
    export(LLAVA, file.parent)
    key = b"llama.block_count"
    damage(monkeypatch, file.name, file.read_bytes().index(key) + len(key) + 4)
    with pytest.raises(RunError, match=r"says llama.block_count = 3, and not 2"):
        export(LLAVA, tmp_path / "second")


def test_a_tensor_that_is_not_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = gguf_export.write_gguf
    monkeypatch.setattr(gguf_export, "write_gguf", lambda *args: write(*args[:3], args[3][1:], args[4]))
    with pytest.raises(RunError, match=r"does not hold the tensors it should: output.weight. Nothing was kept"):
        export(LLAVA, tmp_path)


def test_a_directory_without_exactly_one_model_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds 0 language models"):
        load_gguf(tmp_path, whole(LLAVA))


# The command


def test_the_command_proves_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "out"
    request = ["export", "--format", "gguf", "--model-path", LLAVA, "--save-path", str(target), "--dtype", "float16"]
    assert main(request) == 0
    names = sorted(path.name for path in target.iterdir())
    assert names == [
        "conversion_report.json",
        "lineage.json",
        "llava15-tiny-F16.gguf",
        "mmproj-llava15-tiny-F16.gguf",
    ]
    report = ConversionReport(**json.loads((target / "conversion_report.json").read_text()))
    assert report.passed
    assert report.kind == "export gguf"
    assert [entry["input"] for entry in report.logits] == ["text", "image"]
    assert all(0 < entry["max_difference"] < entry["bound"] for entry in report.logits)
    assert [entry["input"] for entry in report.answers] == ["text", "image"]


def test_the_command_leaves_nothing_behind_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "out"
    model = "ckpt/llava1-tiny-linear"
    assert main(["export", "--format", "gguf", "--model-path", model, "--save-path", str(target)]) == 2
    assert "its projector is linear" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
