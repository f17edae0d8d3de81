"""Recorded answers of original LLaVA are given again, from every layout it reads."""

from pathlib import Path

import pytest
import torch

from llava_ft.cli import main
from llava_ft.conversation import get_template
from llava_ft.errors import UserError
from llava_ft.inference.dialogue import Picture
from llava_ft.inference.generate import build_prompt, prepare_inputs
from llava_ft.inference.load import LoadedModel, load_model, load_pretrained_model
from llava_ft.inference.responder import Responder, Sampling
from tests.conftest import read_recording

pytestmark = pytest.mark.usefixtures("in_recordings")

LOADS = read_recording("merge/index.json")["loads"]


def load_recorded(name: str) -> LoadedModel:
    path, base = (
        LOADS[name][key] and LOADS[name][key].removeprefix("golden/").replace("train/pretrain/", "train/pretrain_vt32/")
        for key in ("model_path", "model_base")
    )
    # The recording was made with weights rounded to float16.
    return load_model(path, base, dtype=torch.float16, vision_tower="ckpt/clip-tiny")


def ids_of(loaded: LoadedModel, case: dict) -> list[int]:
    """What is generated for a recorded prompt, in the dtype of the weights; the original puts a start in front."""
    inputs = prepare_inputs(loaded, case["prompt"], [f"images/src/{image}" for image in case["images"] or []])
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=len(case["new_ids"]) - 1)
    return [1, *ids[0].tolist()]


@pytest.mark.parametrize("name", list(LOADS))
def test_recorded_ids_are_generated(name: str):
    loaded = load_recorded(name)
    loaded.model.float()
    assert loaded.context_len == LOADS[name]["context_len"]
    for case in LOADS[name]["generate_fp32"]:
        assert ids_of(loaded, case) == case["new_ids"]


@pytest.mark.parametrize("name", list(LOADS))
def test_recorded_ids_are_generated_in_float16(name: str):
    loaded = load_recorded(name)
    for case in LOADS[name]["generate_fp16"]:
        # Where the original's two best logits were equal, either may be taken, and the answers part.
        certain = next((step for step, gap in enumerate(case["top1_minus_top2"]) if gap == 0), len(case["new_ids"]))
        assert ids_of(loaded, case)[: certain + 1] == case["new_ids"][: certain + 1]


def test_the_recorded_adapter_merged_here_generates_the_recorded_ids(tmp_path: Path):
    recorded = LOADS["lora_unmerged"]
    adapter = ["--model-path", recorded["model_path"].removeprefix("golden/"), "--model-base", recorded["model_base"]]
    into = ["--save-model-path", str(tmp_path / "merged"), "--dtype", "float16", "--save-vision-tower"]
    assert main(["merge", *adapter, *into]) == 0
    loaded = load_model(str(tmp_path / "merged"), dtype=torch.float16)
    loaded.model.float()
    for case in LOADS["lora_merged"]["generate_fp32"]:
        assert ids_of(loaded, case) == case["new_ids"]


def test_the_original_s_signature():
    tokenizer, model, image_processor, context_len = load_pretrained_model("ckpt/llava15-tiny")
    assert len(tokenizer) == 512
    assert model.dtype == torch.float32
    assert image_processor is not None
    assert context_len == 2048


def test_tiled_images_are_answered_about_alone_and_together():
    loaded = load_model("ckpt/llava16-tiny-anyres")
    files = ["images/src/panorama.png", "images/src/square.png"]
    inputs = prepare_inputs(loaded, "<image> <image>\nWhat?", files)
    assert inputs["image_sizes"].tolist() == [[1000, 75], [224, 224]]
    assert inputs["pixel_values"].shape == (4 + 5, 3, 56, 56)
    geometry = loaded.model.config.image_geometry
    assert int((inputs["input_ids"] < 0).sum()) == geometry.num_tokens((1000, 75)) + geometry.num_tokens((224, 224))
    pictures = [Picture.read(file) for file in files]
    sampling = Sampling(max_new_tokens=4)
    reply = Responder(loaded).answer("<image> <image>\nWhat?", pictures, get_template("v1"), sampling)
    assert reply.ids == loaded.model.generate(**inputs, do_sample=False, max_new_tokens=4)[0].tolist()


def test_one_placeholder_for_each_image():
    template = get_template("v1")
    assert build_prompt("What?", 2, template).count("<image>\n") == 2
    assert "see <image>?" in build_prompt("Do you see <image>?", 1, template)
    wrapped = build_prompt("What?", 1, template, mm_use_im_start_end=True)
    assert "<im_start><image><im_end>\nWhat?" in wrapped
    with pytest.raises(UserError, match="has 1 <image> but 2 images are given"):
        build_prompt("<image> What?", 2, template)


@pytest.mark.parametrize("beams", [1, 2])
def test_the_command_writes_the_answer_to_its_question(beams: int, capsys: pytest.CaptureFixture[str]):
    loaded = load_model("ckpt/llava15-tiny")
    file = "images/src/landscape.jpg"
    options = {"do_sample": False, "num_beams": beams, "max_new_tokens": 12}
    inputs = prepare_inputs(loaded, build_prompt("What is it?", 1, get_template("v1")), [file])
    ids = loaded.model.generate(**inputs, **options)[0]
    expected = loaded.tokenizer.decode(ids, skip_special_tokens=True).split("</s>")[0].strip()
    flags = ["--image-file", file, "--query", "What is it?", "--max-new-tokens", "12", "--num-beams", str(beams)]
    assert main(["generate", "--model-path", "ckpt/llava15-tiny", "--conv-mode", "v1", *flags]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_an_answer_may_go_on_past_the_context(capsys: pytest.CaptureFixture[str]):
    loaded = load_model("ckpt/llava15-tiny")
    prompt, template = "a " * (loaded.context_len - 8), get_template("v1")
    options = {"do_sample": False, "max_new_tokens": 24}
    ids = loaded.model.generate(**prepare_inputs(loaded, prompt, []), **options)[0].tolist()
    reply = Responder(loaded).answer(prompt, [], template, Sampling(max_new_tokens=24), may_leave_context=True)
    assert reply.ids == ids
    assert reply.num_prompt + len(ids) > loaded.context_len


def test_generation_ends_at_the_template_s_mark():
    loaded = load_model("ckpt/llava15-tiny")
    template = get_template("v0")
    free = Responder(loaded).answer("Hello", [], get_template("v1"), Sampling(max_new_tokens=12)).text
    assert template.stop_strings == ("###",)
    stopped = Responder(loaded).answer("Hello", [], template, Sampling(max_new_tokens=12)).text
    assert stopped == free.split("###")[0].strip()


def test_what_cannot_be_answered_is_refused():
    loaded = load_model("ckpt/llava15-tiny")
    with pytest.raises(UserError, match="but the model's context is 2,048"):
        prepare_inputs(loaded, "word " * 3000, [])
    with pytest.raises(UserError, match=r"nowhere\.png"):
        prepare_inputs(loaded, "<image>", ["nowhere.png"])
    with pytest.raises(UserError, match="The prompt has 2 <image>, but 1 images are given"):
        prepare_inputs(loaded, "<image> <image>", ["images/src/landscape.jpg"])
    text_only = load_model("ckpt/base-llm")
    with pytest.raises(UserError, match="the model is text-only"):
        prepare_inputs(text_only, "<image>", ["images/src/landscape.jpg"])
