"""Export to transformers' own layout: what the library makes of it is what we make of the source."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from llava_ft.checkpoint.weights import WeightFiles
from llava_ft.conversation import get_template
from llava_ft.convert.export_hf import write_image_processor
from llava_ft.convert.hf_speaker import MODEL_CLASSES
from llava_ft.data.image_files import load_image
from llava_ft.data.images import ImageTransform
from llava_ft.geometry import ImageGeometry, parse_grid_pinpoints
from llava_ft.inference.generate import build_prompt, prepare_inputs
from llava_ft.inference.load import load_model
from tests.conftest import RECORDINGS
from tests.convert.conftest import LORA, export, run

IMAGES = RECORDINGS / "images/src"
ODD_SIZES = ("landscape.jpg", "portrait.png", "square.png", "gray.png", "rgba.png", "small_odd.png", "palette.png")


def load_both(source: str, exported: Path):
    kind = json.loads((exported / "config.json").read_text())["model_type"]
    model, info = MODEL_CLASSES[kind].from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return load_model(source, dtype=torch.float32, device="cpu"), model.eval(), AutoProcessor.from_pretrained(exported)


@pytest.mark.parametrize(
    ("name", "fixture"), [("llava15-tiny", "exported"), ("llava16-tiny-anyres", "exported_anyres")]
)
def test_a_chat_gives_our_ids_pixels_logits_and_answer(
    name: str, fixture: str, request: pytest.FixtureRequest, in_recordings: Path
):
    ours, model, processor = load_both(f"ckpt/{name}", request.getfixturevalue(fixture))
    file = IMAGES / "landscape.jpg"
    parts = [{"type": "image", "image": load_image(file)}, {"type": "text", "text": "What is this?"}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )  # fmt: skip
    wanted = prepare_inputs(ours, build_prompt("What is this?", 1, get_template("v1")), [file])
    ids = wanted["input_ids"].clone()
    ids[ids < 0] = model.config.image_token_index
    assert theirs["input_ids"].equal(ids)
    assert theirs["pixel_values"].reshape(wanted["pixel_values"].shape).equal(wanted["pixel_values"])
    with torch.no_grad():
        expected, got = ours.model(**wanted).logits, model(**theirs).logits
        answer = ours.model.generate(**wanted, do_sample=False, max_new_tokens=12)
        said = model.generate(**theirs, do_sample=False, max_new_tokens=12)[:, theirs["input_ids"].shape[1] :]
    assert (got[..., : expected.shape[-1]] - expected).abs().max() <= 1e-4
    assert said.equal(answer)


@pytest.mark.parametrize("aspect_ratio", ["square", "pad", "anyres"])
def test_pixels_of_any_picture_are_ours(aspect_ratio: str, tmp_path: Path):
    tiles = parse_grid_pinpoints("(1x2),(2x1),(2x2),(3x1),(1x3)", 56) if aspect_ratio == "anyres" else ()
    merge_type = "spatial_unpad" if tiles else "flat"
    geometry = ImageGeometry(56, 4, 16, 16, aspect_ratio=aspect_ratio, merge_type=merge_type, grid_pinpoints=tiles)
    transform = ImageTransform.from_pretrained(RECORDINGS / "ckpt/clip-tiny", geometry=geometry)
    write_image_processor(tmp_path, transform.settings, geometry)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for name in ODD_SIZES:
        picture = load_image(IMAGES / name)
        expected = transform.normalizer(transform.pixels(picture))
        assert processor(picture, return_tensors="pt")["pixel_values"].reshape(expected.shape).equal(expected), name


def test_one_row_is_added_and_nothing_else_changed(exported: Path):
    before = WeightFiles.open(RECORDINGS / "ckpt/llava15-tiny").read()
    after = WeightFiles.open(exported).read()
    assert len(after) == len(before)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows = after[name]
        assert rows.shape[0] == 513
        assert rows[512].equal(rows[:512].mean(dim=0))
    assert after["language_model.lm_head.weight"][:512].equal(before["lm_head.weight"])
    assert after["multi_modal_projector.linear_2.bias"].equal(before["model.mm_projector.2.bias"])


def test_added_tokens_stand_around_each_image(tmp_path: Path, in_recordings: Path):
    exported = export(RECORDINGS / "ckpt/llava15-tiny-imse", tmp_path / "hf", "hf", "--no-verify")
    ours, _, processor = load_both("ckpt/llava15-tiny-imse", exported)
    picture = Image.new("RGB", (56, 56))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    picture.save(tmp_path / "x.png")
    prompt = build_prompt("What?", 1, get_template("v1"), mm_use_im_start_end=True)
    wanted = prepare_inputs(ours, prompt, [tmp_path / "x.png"])["input_ids"][0].tolist()
    assert theirs["input_ids"][0] == [514 if index < 0 else index for index in wanted]


def test_an_adapter_is_put_in_on_the_way(tmp_path: Path):
    exported = export(LORA, tmp_path / "hf", "hf", "--max-shard-size", "200KB", "--dtype", "bfloat16")
    report = json.loads((exported / "conversion_report.json").read_text())
    assert report["passed"]
    assert len(report["changed"]) == 14
    assert {info.dtype for info in WeightFiles.open(exported).tensors.values()} == {torch.bfloat16}
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 1
    assert json.loads((exported / "lineage.json").read_text())["action"] == "export hf"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_projector_type": "linear"}, "mlp2x_gelu alone"),
        ({"image_aspect_ratio": "anyres_max_4", "mm_patch_merge_type": "spatial_unpad"}, "no bound"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}, "spatial_unpad with anyres"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(
    changes: dict, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = RECORDINGS / "ckpt" / ("llava1-tiny-linear" if "mm_projector_type" in changes else "llava16-tiny-anyres")
    copy = tmp_path / "source"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | changes
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert run(["export", "--model-path", str(copy), "--save-path", str(out), "--format", "hf"]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()
