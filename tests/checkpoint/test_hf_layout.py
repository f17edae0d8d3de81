"""transformers' own layout: every function of the program takes it, with transformers' own numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llava_ft.checkpoint.directory import identify
from llava_ft.checkpoint.hf.config import hf_fields, is_hf_config, native_fields
from llava_ft.checkpoint.model import find_model
from llava_ft.cli import main
from llava_ft.data.image_processor import ImageProcessorSettings, copy_image_settings, pads_to_square
from llava_ft.data.tokenize import tokenize_prompt
from llava_ft.data.tokenizer import load_tokenizer
from llava_ft.errors import CheckpointError, UserError
from llava_ft.inference.generate import prepare_inputs
from llava_ft.inference.load import LoadedModel, load_model
from llava_ft.models.families.llama import LlavaLlamaConfig
from tests.conftest import RECORDINGS
from tests.layouts.hf import NUM_ROWS, PINPOINTS_HW, TOKENIZER, load_hf, write_hf, write_hf_adapter
from tests.training.helpers import flags, prepare

pytestmark = pytest.mark.usefixtures("in_recordings")

TOLERANCE = 1e-4  # float32; the largest difference seen is 7e-6, with adapters: sums in another order
PICTURES = ["landscape.jpg", "panorama.png", "one_px_wide.png", "small_odd.png"]
KINDS = [
    ("llava", "today"),
    ("llava", "hub"),
    ("llava_next", "today"),
    ("llava_next", "hub"),
    ("llava_next", "modules"),
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives the directory of a model, written once."""
    root = tmp_path_factory.mktemp("hf")

    def directory(model: Any = "llava", files: Any = "today", *, pads: bool = False) -> Path:
        path = root / f"{model}-{files}-{pads}"
        if not path.exists():
            write_hf(path, model, files, pads=pads, num_shards=2)
        return path

    return directory


def run_both(
    theirs: Any, images: Any, ours: LoadedModel, picture: str | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pixels, logits and loss that transformers and this program give, for the same ids."""
    files = [] if picture is None else [f"images/src/{picture}"]
    inputs = prepare_inputs(ours, "USER: " + "<image>\n" * len(files) + "What is this? ASSISTANT:", files)
    ids = inputs.pop("input_ids")
    labels = ids.clone()
    labels[:, :-6] = -100
    image_token = ours.tokenizer.convert_tokens_to_ids("<image>")
    theirs_inputs: dict[str, Any] = {"input_ids": torch.where(ids < 0, image_token, ids)}
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    if picture is not None:
        prepared = images(Image.open(files[0]).convert("RGB"), return_tensors="pt")
        theirs_inputs |= dict(prepared)
        pairs.append((prepared["pixel_values"].reshape_as(inputs["pixel_values"]), inputs["pixel_values"]))
    with torch.no_grad():
        expected = theirs(**theirs_inputs, labels=labels)
        pairs.append((expected.logits, ours.model(ids, **inputs).logits))
        pairs.append((expected.loss, ours.model(ids, labels=labels, **inputs).loss))
    return pairs


def check_equal(theirs: Any, ours: LoadedModel, directory: Path, pictures: list[str]) -> None:
    images = AutoProcessor.from_pretrained(directory).image_processor
    for picture in (None, *pictures):
        pairs = run_both(theirs, images, ours, picture)
        if picture is not None:
            assert torch.equal(*pairs[0]), picture
        for expected, got in pairs:
            assert (expected - got).abs().max() <= TOLERANCE, picture


@pytest.mark.parametrize(("model", "files"), KINDS)
def test_pixels_logits_and_loss_are_those_of_transformers(hf: Any, model: str, files: str):
    directory = hf(model, files)
    check_equal(load_hf(directory), load_model(str(directory), dtype=torch.float32), directory, PICTURES)


@pytest.mark.parametrize("files", ["today", "hub"])
def test_a_processor_that_pads_is_pad(hf: Any, files: str):
    directory = hf("llava", files, pads=True)
    assert identify(directory).config["image_aspect_ratio"] == "pad"
    check_equal(load_hf(directory), load_model(str(directory), dtype=torch.float32), directory, PICTURES)


def test_the_class_token_is_kept_with_the_strategy_full(hf: Any, tmp_path: Path):
    shutil.copytree(hf(), tmp_path / "full")
    config = json.loads((tmp_path / "full/config.json").read_text())
    config |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    (tmp_path / "full/config.json").write_text(json.dumps(config))
    ours = load_model(str(tmp_path / "full"), dtype=torch.float32)
    assert ours.model.config.mm_vision_select_feature == "cls_patch"
    check_equal(load_hf(tmp_path / "full"), ours, tmp_path / "full", ["landscape.jpg"])


def test_the_image_processor_inside_processor_config_wins_as_in_transformers(hf: Any, tmp_path: Path):
    shutil.copytree(hf("llava", pads=True), tmp_path / "m")
    (tmp_path / "m/preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor", "size": 20}')
    assert pads_to_square(tmp_path / "m")
    assert ImageProcessorSettings.from_pretrained(tmp_path / "m").size == {"shortest_edge": 56}
    (tmp_path / "m/processor_config.json").write_text('{"patch_size": 14}')
    assert not pads_to_square(tmp_path / "m")
    assert ImageProcessorSettings.from_pretrained(tmp_path / "m").size == {"shortest_edge": 20}
    (tmp_path / "m/processor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"processor_config.json cannot be read as JSON"):
        identify(tmp_path / "m")


def test_settings_of_clip_are_copied_as_they_are(tmp_path: Path):
    copy_image_settings(Path("ckpt/clip-tiny"), tmp_path)
    name = "preprocessor_config.json"
    assert (tmp_path / name).read_bytes() == Path("ckpt/clip-tiny", name).read_bytes()


@pytest.mark.parametrize("target", ["attention", "projector beside", "all-linear"])
@pytest.mark.parametrize("model", ["llava", "llava_next"])
def test_an_adapter_that_peft_made_gives_its_logits(hf: Any, tmp_path: Path, model: str, target: Any):
    from peft import PeftModel

    # Made on one spelling of the names, put on another.
    write_hf_adapter(tmp_path / "adapter", hf(model, "today"), target)
    directory = hf(model, "hub")
    theirs = PeftModel.from_pretrained(load_hf(directory), tmp_path / "adapter").eval()
    ours = load_model(str(tmp_path / "adapter"), str(directory), dtype=torch.float32)
    check_equal(theirs, ours, directory, ["landscape.jpg"])


def test_settings_of_single_modules_are_found_by_the_names_in_the_file(hf: Any, tmp_path: Path):
    from peft import PeftModel

    patterns = {"rank_pattern": {"language_model.layers.0.self_attn.q_proj": 2}, "use_rslora": True}
    patterns["alpha_pattern"] = {"model.language_model.layers.1.self_attn.v_proj": 32}
    write_hf_adapter(tmp_path / "adapter", hf(), **patterns)
    theirs = PeftModel.from_pretrained(load_hf(hf()), tmp_path / "adapter").eval()
    check_equal(theirs, load_model(str(tmp_path / "adapter"), dtype=torch.float32), hf(), ["landscape.jpg"])


def test_a_model_is_described_by_native_fields(hf: Any):
    for model, files in KINDS:
        found = identify(hf(model, files))
        assert (found.kind, found.layout) == ("llava", "hf")
        expected = {
            "vocab_size": NUM_ROWS, "hidden_size": 64, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "mm_hidden_size": 32, "tie_word_embeddings": False,
            "max_position_embeddings": 2048, "num_key_value_heads": 4, "hidden_act": "silu",
        }  # fmt: skip
        assert {key: found.config[key] for key in expected} == expected
        assert found.config["mm_vision_config"]["image_size"] == 56
        assert found.config["mm_vision_config"]["hidden_act"] == "quick_gelu"
        assert "text_config" not in found.config
    assert found.config["image_grid_pinpoints"] == [[width, height] for height, width in PINPOINTS_HW]
    assert (found.config["image_aspect_ratio"], found.config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    assert identify(Path("ckpt/llava15-tiny")).layout == "native"


def test_what_a_file_leaves_out_is_as_transformers_has_it():
    fields = native_fields({"model_type": "llava_next", "text_config": {"model_type": "llama"}, "vision_config": None})
    assert fields["vocab_size"] == 32000
    assert fields["hidden_size"] == 4096
    assert fields["image_grid_pinpoints"] == [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
    assert fields["mm_vision_config"]["image_size"] == 336
    assert fields["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    old = {
        "model_type": "llama",
        "rope_theta": 5e6,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "vocab_size": 64,
    }
    config = LlavaLlamaConfig(**native_fields({"model_type": "llava", "text_config": old, "pad_token_id": 63}))
    assert config.rope_parameters == {"rope_theta": 5e6, "rope_type": "linear", "factor": 2.0, "type": "linear"}
    assert config.pad_token_id == 63
    assert native_fields({"model_type": "llava", "text_config": old, "pad_token_id": 64})["pad_token_id"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "mistral"}}, "language model of D is a 'mistral'. Supported .* LLaMA's"),
        ({"text_config": {"model_type": "qwen2"}}, "language model of D is a 'qwen2'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "tower of D is a 'siglip_vision_model'. Supp.*CLIP"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer of D is \[-2, -5\]; supported is one layer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act of D is 'relu'; supported is 'gelu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias of D is False"),
        ({"model_type": "llava_next", "vision_feature_select_strategy": "full"}, "'full'; supported is 'default' with"),
        ({"image_seq_length": "many"}, "config.json of D cannot be read: .* Is it complete"),
        ({"model_type": "llava_onevision"}, "D is a 'llava_onevision' model; known in this layout are llava and llava"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        native_fields({"model_type": "llava", "text_config": {"model_type": "llama"}} | changes, "D")


def test_other_models_are_not_of_this_layout(tmp_path: Path, hf: Any):
    assert not is_hf_config({"model_type": "llava", "mm_hidden_size": 1024})  # original LLaVA v1 calls itself so
    shutil.copytree(hf(), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"model_type": "llava_onevision"}))
    with pytest.raises(UserError, match=r"Of the models in transformers' own layout 'llava' and 'llava_next' are"):
        find_model(str(tmp_path / "m"))


@pytest.mark.parametrize("name", ["llava15-tiny", "llava15-tiny-imse", "llava16-tiny-anyres"])
def test_a_configuration_survives_the_way_there_and_back(name: str):
    config = find_model(f"ckpt/{name}").config
    written = json.loads(json.dumps(hf_fields(config, image_token_id=512, dtype=torch.float16)))
    assert written["dtype"] == "float16"
    back = LlavaLlamaConfig(**native_fields(written))
    different = {key for key, value in config.to_dict().items() if back.to_dict().get(key) != value}
    assert different <= {"architectures", "_name_or_path", "dtype", "mm_projector_lr"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_vision_config": None}, "it is a text-only model"),
        ({"mm_projector_type": "linear"}, "its projector is linear, and the layout knows mlp2x_gelu alone"),
        ({"s2": True, "s2_scales": "56,112"}, "sees images at several scales"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type is flat with image_aspect_ratio anyres"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is spatial_unpad with image_aspect_ratio pad"),
        (
            {"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"},
            "the layout has no bound for an image's tokens",
        ),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(changes: dict[str, Any], reason: str):
    config = find_model("ckpt/llava15-tiny").config
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(CheckpointError, match=f"cannot hold this model: .*{reason}.* Keep the native layout"):
        hf_fields(config, image_token_id=512, dtype=torch.float32)


@pytest.mark.parametrize("files", ["today", "hub"])
def test_prompts_have_the_ids_of_original_llava(hf: Any, files: str):
    ours, original = load_tokenizer(hf("llava", files)), load_tokenizer(TOKENIZER)
    assert len(ours) == len(original) + 2
    records = json.loads((RECORDINGS / "data/mix.json").read_text())
    turns = [turn["value"] for record in records for turn in record["conversations"]]
    for text in (*turns, "USER: <image>\nWhat  is   this? ASSISTANT: x</s>USER: <image> <image>", " <image>"):
        ids = tokenize_prompt(text, ours)
        assert ids == tokenize_prompt(text, original)
        assert 512 not in ids


def test_what_is_written_from_it_is_native(hf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    directory = hf("llava_next")
    run = flags(tmp_path / "run", model_name_or_path=directory, vision_tower=None, pretrain_mm_mlp_adapter=None,
                mm_projector_type=None, mm_vision_select_layer=None, image_aspect_ratio=None, max_steps=2)  # fmt: skip
    assert main(["plan", *run]) == 0
    assert "image newline" in capsys.readouterr().out
    assert main(["train", *run]) == 0
    trained = identify(tmp_path / "run")
    assert (trained.kind, trained.layout) == ("lora", "native")
    assert main(["merge", "--model-path", str(tmp_path / "run"), "--save-model-path", str(tmp_path / "merged")]) == 0
    assert identify(tmp_path / "merged").layout == "native"
    answers: list[str] = []
    for path in (tmp_path / "run", tmp_path / "merged"):
        capsys.readouterr()
        ask = ["--image-file", "images/src/panorama.png", "--query", "What is this?", "--max-new-tokens", "6"]
        assert main(["generate", "--model-path", str(path), *ask]) == 0
        answers.append(capsys.readouterr().out)
        settings = ImageProcessorSettings.from_pretrained(path / "preprocessor_config.json")
        assert settings == ImageProcessorSettings.from_pretrained(directory)
    assert answers[0] == answers[1]


def test_tokens_do_not_take_spare_rows_of_the_vocabulary(hf: Any, tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"add 2 tokens, but .* has 6 rows more .* than its tokenizer has entries"
    ):
        prepare(
            tmp_path / "run", model_name_or_path=hf(), pretrain_mm_mlp_adapter=None, mm_use_im_start_end=True
        )  # fmt: skip
